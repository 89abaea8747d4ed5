"use strict";
// Draws the charts of a report as SVG: values under the pointer, x by step, tokens or time, y linear or logarithmic.
//
// The data of a section of charts:
//   axes    for each run: {step, tokens, seconds}, lists of equal length; tokens and seconds are empty if not known
//   marks   [{kind, step, text}]: events of the run
//   charts  [{lines, log, percent, zero}]; a line is
//           {label, seed, color, dash, run, dots, x: steps, y, average: y or null}; lines of one label share a legend entry

const HEIGHT = 250, LEFT = 58, RIGHT = 12, TOP = 12, BOTTOM = 38, PRINTED = 430;
const TIMES = [[86400, "days"], [3600, "hours"], [60, "minutes"], [1, "seconds"]];
const MARKS = {restart: "restart", bad: "bad batch", stage: "stage", best: "best checkpoint"};
const sections = [];

function add(parent, name, attributes = {}, text = "") {
  const svg = name === "svg" || parent instanceof SVGElement;
  const child = svg ? document.createElementNS("http://www.w3.org/2000/svg", name) : document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) child.setAttribute(key, value);
  if (text !== "") child.textContent = text;
  return parent.appendChild(child);
}

// Numbers, ticks and positions on the axes

const X_NAMES = {step: "step", tokens: "tokens", seconds: "time"};

const compact = new Intl.NumberFormat("en", {notation: "compact", maximumSignificantDigits: 4});
const exact = new Intl.NumberFormat("en", {maximumSignificantDigits: 5});
const whole = new Intl.NumberFormat("en", {maximumFractionDigits: 0});

const isExtreme = value => value !== 0 && (Math.abs(value) < 1e-3 || Math.abs(value) >= 1e15);

function tickText(value, percent) {
  if (percent) return `${exact.format(value * 100)}%`;
  return isExtreme(value) ? value.toExponential().replace(/(\.\d\d)\d+/, "$1") : compact.format(value);
}

function valueText(value, percent) {
  if (percent) return `${(value * 100).toFixed(2)}%`;
  return isExtreme(value) ? value.toExponential(3) : exact.format(value);
}

function duration(seconds) {
  const [hours, minutes, rest] = [Math.floor(seconds / 3600), Math.floor(seconds / 60) % 60, Math.floor(seconds % 60)];
  return hours ? `${hours}h${String(minutes).padStart(2, "0")}m` : minutes ? `${minutes}m${String(rest).padStart(2, "0")}s` : `${rest}s`;
}

const lineName = line => (line.seed ? `${line.label}, ${line.seed}` : line.label);
const xText = (unit, x) => (unit === "seconds" ? duration(x) : `${X_NAMES[unit]} ${whole.format(x)}`);

function linearTicks([low, high], count) {
  const least = (high - low) / count, power = 10 ** Math.floor(Math.log10(least));
  const step = [1, 2, 2.5, 5, 10].map(factor => factor * power).find(size => size >= least * (1 - 1e-9));
  const first = Math.ceil(low / step - 1e-9), last = Math.floor(high / step + 1e-9);
  return Array.from({length: last - first + 1}, (_, index) => Number(((first + index) * step).toPrecision(12)));
}

function logTicks([low, high]) {
  const decades = Math.log10(high) - Math.log10(low), ticks = [];
  for (let power = Math.floor(Math.log10(low)); power <= Math.log10(high); power += Math.ceil(decades / 6) || 1)
    for (const factor of decades > 3 ? [1] : [1, 2, 5]) ticks.push(Number((factor * 10 ** power).toPrecision(12)));
  const inside = ticks.filter(tick => tick >= low && tick <= high);
  return inside.length > 2 ? inside : linearTicks([low, high], 4);
}

// From steps to x

/** The value at `x` of a curve that is linear between its points, and constant before and after them. */
function interpolate(xs, ys, x) {
  const at = Math.min(Math.max(firstAfter(xs, x), 1), xs.length - 1);
  if (xs.length < 2 || xs[at] === xs[at - 1]) return ys[0];
  const share = (x - xs[at - 1]) / (xs[at] - xs[at - 1]);
  return ys[at - 1] + Math.min(Math.max(share, 0), 1) * (ys[at] - ys[at - 1]);
}

function firstAfter(sorted, x) {
  let low = 0, high = sorted.length;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (sorted[middle] > x) high = middle; else low = middle + 1;
  }
  return low;
}

const hasUnit = (axes, name) => name === "step" || axes.some(axis => axis[name].length > 1);
const toX = (axis, unit, step) => (unit === "step" ? step : interpolate(axis.step, axis[unit], step));

function nearest(xs, x) {
  const after = firstAfter(xs, x);
  return after === 0 || (after < xs.length && xs[after] - x < x - xs[after - 1]) ? after : after - 1;
}

// One chart

class Chart {
  constructor(section, data, figure) {
    Object.assign(this, {section, figure, ...data, hidden: new Set()});
    this.title = figure.querySelector("figcaption").textContent;
    this.controls();
    this.plot = add(figure, "div", {class: "plot"});
    this.tip = add(figure, "div", {class: "tip", hidden: ""});
  }

  controls() {
    const bar = add(this.figure, "div", {class: "legend"});
    const labels = new Set(this.lines.map(line => line.label));
    if (labels.size > 1)
      for (const label of labels) {
        const button = add(bar, "button", {type: "button", "aria-pressed": "true", class: "series"});
        this.swatch(button, this.lines.find(line => line.label === label));
        add(button, "span", {}, label);
        button.onclick = () => {
          this.hidden.has(label) ? this.hidden.delete(label) : this.hidden.add(label);
          button.setAttribute("aria-pressed", String(!this.hidden.has(label)));
          this.draw();
        };
      }
    if (this.lines.every(line => line.y.every(value => value >= 0)) && !this.percent) {
      const button = add(this.figure.querySelector("figcaption"), "button", {type: "button", class: "log"}, "log");
      const show = () => button.setAttribute("aria-pressed", String(this.log));
      button.title = "Logarithmic y axis";
      button.onclick = () => { this.log = !this.log; show(); this.draw(); };
      show();
    }
  }

  swatch(parent, line) {
    const svg = add(parent, "svg", {width: 18, height: 8, "aria-hidden": "true"});
    add(svg, "line", {x1: 1, x2: 17, y1: 4, y2: 4, ...this.stroke(line)});
  }

  stroke(line) {
    return {style: `stroke:${line.color}`, "stroke-dasharray": line.dash, "stroke-width": 2};
  }

  /** The lines that are visible, with x in the current unit. */
  visible() {
    const unit = this.section.unit;
    const lines = this.lines.filter(line => !this.hidden.has(line.label) && (unit === "step" || this.section.axes[line.run][unit].length > 1));
    for (const line of lines)
      if (line.unit !== unit) {
        line.unit = unit;
        line.at = line.x.map(step => toX(this.section.axes[line.run], unit, step));
      }
    return lines;
  }

  range(lines) {
    const [left, right] = this.section.zoom || this.section.extent();
    let low = Infinity, high = -Infinity;
    for (const line of lines)
      line.y.forEach((value, index) => {
        if (line.at[index] < left || line.at[index] > right || (this.log && value <= 0)) return;
        low = Math.min(low, value);
        high = Math.max(high, value);
      });
    if (low > high) [low, high] = [this.log ? 0.1 : 0, 1];
    if (this.zero && !this.log) low = 0;
    if (low === high) [low, high] = this.log ? [low / 2, high * 2] : [low - Math.abs(low || 1) / 10, high + Math.abs(high || 1) / 10];
    const margin = this.log ? (high / low) ** 0.04 : (high - low) * 0.04;
    const y = this.log ? [Math.max(low / margin, Number.MIN_VALUE), Math.min(high * margin, Number.MAX_VALUE)] : [this.zero ? 0 : low - margin, high + margin];
    return {x: left < right ? [left, right] : [left - 1, left + 1], y};
  }

  draw(width = this.plot.clientWidth) {
    if (width < 80) return;
    const lines = this.visible(), {x, y} = this.range(lines), [low, high] = this.log ? y.map(Math.log) : y;
    this.domain = x;
    this.width = width;
    this.px = value => LEFT + (value - x[0]) / (x[1] - x[0]) * (width - LEFT - RIGHT);
    this.py = value => HEIGHT - BOTTOM - ((this.log ? Math.log(value) : value) - low) / (high - low) * (HEIGHT - BOTTOM - TOP);
    this.plot.textContent = "";
    const svg = this.svg = add(this.plot, "svg", {viewBox: `0 0 ${width} ${HEIGHT}`, role: "img"});
    svg.setAttribute("aria-label", `${this.title} by ${X_NAMES[this.section.unit]}: ${lines.map(line => this.lastValue(line)).join("; ")}`);
    this.drawAxes(svg, y);
    const clip = `clip-${this.section.number}-${this.section.charts.indexOf(this)}`;
    add(add(svg, "clipPath", {id: clip}), "rect", {x: LEFT, y: 0, width: width - LEFT - RIGHT, height: HEIGHT});
    const area = add(svg, "g", {"clip-path": `url(#${clip})`});
    this.drawMarks(area);
    for (const line of lines) this.drawLine(area, line);
    this.pointer = add(svg, "g", {class: "pointer"});
    this.listen(svg);
  }

  lastValue(line) {
    return `${lineName(line)} ${valueText((line.average || line.y)[line.y.length - 1], this.percent)}`;
  }

  drawAxes(svg, y) {
    const right = this.width - RIGHT, bottom = HEIGHT - BOTTOM;
    for (const tick of this.log ? logTicks(y) : linearTicks(y, 5)) {
      add(svg, "line", {class: "grid", x1: LEFT, x2: right, y1: this.py(tick), y2: this.py(tick)});
      add(svg, "text", {x: LEFT - 8, y: this.py(tick) + 4, "text-anchor": "end"}, tickText(tick, this.percent));
    }
    const span = this.domain[1] - this.domain[0];
    const unit = this.section.unit;
    const [size, name] = unit === "seconds" ? TIMES.find(([seconds]) => span >= 2 * seconds) || [1, "seconds"] : [1, X_NAMES[unit]];
    for (const tick of linearTicks(this.domain.map(value => value / size), Math.max(2, Math.min(7, this.width / 85))))
      add(svg, "text", {x: this.px(tick * size), y: bottom + 17, "text-anchor": "middle"}, tickText(tick, false));
    add(svg, "line", {class: "axis", x1: LEFT, x2: right, y1: bottom, y2: bottom});
    add(svg, "text", {x: right, y: HEIGHT - 3, "text-anchor": "end", class: "unit"}, unit === "seconds" ? `training time, ${name}` : name);
  }

  drawMarks(area) {
    for (const mark of this.section.marks) {
      const x = this.px(this.section.place(mark));
      add(area, "line", {class: `mark ${mark.kind}`, x1: x, x2: x, y1: TOP - 8, y2: HEIGHT - BOTTOM});
    }
  }

  drawLine(area, line) {
    const dense = line.average !== null, pale = 0.32 / Math.max(1, this.lines.length - 1);
    const path = values => values.map((value, index) => (this.log && value <= 0 ? "" :
      `${index === 0 || (this.log && values[index - 1] <= 0) ? "M" : "L"}${this.px(line.at[index]).toFixed(1)} ${this.py(value).toFixed(1)}`)).join("");
    add(area, "path", {class: "line", d: path(line.y), ...this.stroke(line), ...(dense ? {"stroke-width": 1, opacity: pale} : {})});
    if (dense) add(area, "path", {class: "line", d: path(line.average), ...this.stroke(line)});
    if (line.dots || line.y.length === 1)
      line.y.forEach((value, index) => {
        if (!this.log || value > 0)
          add(area, "circle", {cx: this.px(line.at[index]), cy: this.py(value), r: line.y.length > 60 ? 1.5 : 3, style: `fill:${line.color}`});
      });
  }

  // The pointer

  listen(svg) {
    const at = event => {
      const box = svg.getBoundingClientRect(), share = (event.clientX - box.left) / box.width * this.width;
      const [left, right] = this.domain;
      return left + Math.min(Math.max((share - LEFT) / (this.width - LEFT - RIGHT), 0), 1) * (right - left);
    };
    let start = null;
    svg.onpointerdown = event => { if (event.pointerType === "mouse" && event.button === 0) start = at(event); };
    svg.onpointermove = event => this.section.point(at(event), this, event.buttons ? start : null);
    svg.onpointerleave = () => { start = null; this.section.point(null); };
    svg.onpointerup = event => {
      const end = at(event), [left, right] = [Math.min(start, end), Math.max(start, end)];
      if (start !== null && this.px(right) - this.px(left) > 8) this.section.zoomTo([left, right]);
      start = null;
    };
    svg.ondblclick = () => this.section.zoomTo(null);
  }

  /** Show the values at x; those in a box if the pointer is here; and what would be zoomed to. */
  point(x, here, start) {
    this.pointer.textContent = "";
    this.tip.hidden = true;
    if (x === null || x < this.domain[0] || x > this.domain[1]) return;
    const bottom = HEIGHT - BOTTOM, px = this.px(x);
    if (start !== null) add(this.pointer, "rect", {class: "zoom", x: Math.min(px, this.px(start)), width: Math.abs(px - this.px(start)), y: TOP, height: bottom - TOP});
    add(this.pointer, "line", {x1: px, x2: px, y1: TOP, y2: bottom});
    const lines = this.visible();
    for (const line of lines) {
      const index = nearest(line.at, x), value = (line.average || line.y)[index];
      if (!this.log || value > 0)
        add(this.pointer, "circle", {cx: this.px(line.at[index]), cy: this.py(value), r: 4, style: `fill:${line.color}`});
    }
    if (here && lines.length) this.showTip(x, lines);
  }

  showTip(x, lines) {
    this.tip.textContent = "";
    const closest = lines.reduce((best, line) => {
      const found = line.at[nearest(line.at, x)];
      return Math.abs(found - x) < Math.abs(best - x) ? found : best;
    }, Infinity);
    add(this.tip, "div", {class: "at"}, xText(this.section.unit, closest));
    for (const line of lines) {
      const row = add(this.tip, "div", {class: "value"}), index = nearest(line.at, x);
      this.swatch(row, line);
      add(row, "span", {}, lineName(line));
      add(row, "b", {}, valueText(line.y[index], this.percent));
      if (line.average) add(row, "i", {}, `mean ${valueText(line.average[index], this.percent)}`);
    }
    for (const mark of this.section.marks) {
      if (Math.abs(this.px(this.section.place(mark)) - this.px(x)) > 5) continue;
      add(this.tip, "div", {class: `what ${mark.kind}`}, mark.text);
    }
    this.tip.hidden = false;
    const scale = this.plot.clientWidth / this.width, left = this.px(x) * scale, wide = this.tip.offsetWidth;
    const place = left + 14 + wide > this.plot.clientWidth ? left - wide - 14 : left + 14;
    this.tip.style.left = `${this.plot.offsetLeft + Math.max(0, Math.min(place, this.plot.clientWidth - wide))}px`;
    this.tip.style.top = `${this.plot.offsetTop + 8}px`;
  }
}

// Charts that share their x axis

class Section {
  constructor(element, number) {
    Object.assign(this, JSON.parse(element.querySelector("script").textContent), {number, zoom: null});
    const figures = [...element.querySelectorAll("figure")];
    this.charts = this.charts.map((data, index) => new Chart(this, data, figures[index]));
    this.legend(element);
  }

  legend(element) {
    const kinds = Object.keys(MARKS).filter(kind => this.marks.some(mark => mark.kind === kind));
    if (!kinds.length) return;
    const bar = document.createElement("div");
    bar.className = "legend marks";
    element.before(bar);
    for (const kind of kinds) {
      const item = add(bar, "span", {class: "key"}), svg = add(item, "svg", {width: 8, height: 14, "aria-hidden": "true"});
      add(svg, "line", {class: `mark ${kind}`, x1: 4, x2: 4, y1: 0, y2: 14});
      const count = this.marks.filter(mark => mark.kind === kind).length;
      add(item, "span", {}, count > 1 ? `${MARKS[kind]} × ${count}` : MARKS[kind]);
    }
  }

  draw(width) { for (const chart of this.charts) chart.draw(width); }

  place(mark) { return toX(this.axes[0], this.unit, mark.step); }

  /** The range of x of all charts. */
  extent() {
    const lines = this.charts.flatMap(chart => chart.visible());
    if (!lines.length) return [0, 1];
    return [Math.min(...lines.map(line => line.at[0])), Math.max(...lines.map(line => line.at[line.at.length - 1]))];
  }

  point(x, here = null, start = null) {
    for (const chart of this.charts) if (chart.pointer) chart.point(x, chart === here, chart === here ? start : null);
  }

  zoomTo(range) {
    this.zoom = range;
    this.draw();
  }
}

function chooseUnit(chosen) {
  for (const button of document.querySelectorAll("#units button"))
    button.setAttribute("aria-pressed", String(button.value === chosen));
  for (const section of sections) {
    section.unit = hasUnit(section.axes, chosen) ? chosen : "step";
    section.zoomTo(null);
  }
}

function addUnits(names) {
  const bar = document.createElement("div");
  bar.id = "units";
  document.querySelector(".charts").before(bar);
  if (names.length > 1) add(bar, "span", {}, "x axis");
  for (const name of names.length > 1 ? names : [])
    add(bar, "button", {type: "button", value: name}, X_NAMES[name]).onclick = () => chooseUnit(name);
  add(bar, "span", {class: "hint"}, "drag to zoom, double-click to reset");
}

document.querySelectorAll(".charts").forEach((element, number) => sections.push(new Section(element, number)));
if (sections.length) {
  addUnits(Object.keys(X_NAMES).filter(name => sections.some(section => hasUnit(section.axes, name))));
  chooseUnit("step");
  let width = innerWidth;
  const redraw = narrow => { for (const section of sections) section.draw(narrow); };
  addEventListener("resize", () => { if (innerWidth !== width) { width = innerWidth; redraw(); } });
  addEventListener("beforeprint", () => redraw(PRINTED));
  addEventListener("afterprint", () => redraw());
}
