"use strict";
// Draws the charts of a report as SVG: values under the pointer, x by step, tokens or time, y linear or logarithmic.
// Sorts and filters tables of runs, and shows the curves of those that are chosen. Keeps a page current if a server does.
//
// A page consists of parts. The data of a part with charts:
//   axes    for each run: {step, tokens, seconds}, lists of equal length; tokens and seconds are empty if not known
//   marks   [{kind, step, text}]: events of the run
//   charts  [{lines, log, percent, zero}]; a line is {label, seed, color, dash, run: which axis, dots, x: steps, y,
//           average: {x, y} or null}; lines of one label share a legend entry
// In an answer of the server an axis or a line that has not changed is null or its name, see `lineName`.

const HEIGHT = 250, LEFT = 58, RIGHT = 12, TOP = 12, BOTTOM = 38, PRINTED = 430, DOT = 3;
const MOST_LEGENDS = 8, MOST_VALUES = 12, FEWEST_FILTERED = 6;  // runs that a table names too; values at the pointer; runs
const POLL = 2000, SHARE = 10, TIMEOUT = 30000;  // milliseconds; updates take at most 1 / SHARE of the time
const TIMES = [[86400, "days"], [3600, "hours"], [60, "minutes"], [1, "seconds"]];
const MARKS = {restart: "restart", bad: "bad batch", stage: "stage", best: "best checkpoint"};
const HEADER = "header";  // key of the part that changes
const parts = new Map();  // by key: {element, section or null, table or null}
const sections = () => [...parts.values()].map(part => part.section).filter(Boolean);

function add(parent, name, attributes = {}, text = "") {
  const svg = name === "svg" || parent instanceof SVGElement;
  const child = svg ? document.createElementNS("http://www.w3.org/2000/svg", name) : document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) child.setAttribute(key, value);
  if (text !== "") child.textContent = text;
  return parent.appendChild(child);
}

// Numbers, ticks and positions on the axes

const X_NAMES = {step: "step", tokens: "tokens", seconds: "time"};

const round = new Intl.NumberFormat("en", {notation: "compact", maximumSignificantDigits: 12});
const exact = new Intl.NumberFormat("en", {maximumSignificantDigits: 5});
const whole = new Intl.NumberFormat("en", {maximumFractionDigits: 0});

const isExtreme = value => value !== 0 && (Math.abs(value) < 1e-3 || Math.abs(value) >= 1e15);

/** A tick is a round number, of which no digit is left out: its neighbor may differ in the last one. */
function tickText(value, percent) {
  if (percent) return `${round.format(value * 100)}%`;
  return isExtreme(value) ? value.toExponential() : round.format(value);
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

const stroke = line => ({style: `stroke:${line.color}`, "stroke-dasharray": line.dash, "stroke-width": 2});

function swatch(parent, line) {
  const svg = add(parent, "svg", {width: 18, height: 8, "aria-hidden": "true"});
  add(svg, "line", {x1: 1, x2: 17, y1: 4, y2: 4, ...stroke(line)});
}

class Chart {
  constructor(section, figure) {
    Object.assign(this, {section, figure, lines: [], hidden: new Set(), looks: "", isStale: false, pointed: null});
    this.title = figure.querySelector("figcaption").textContent;
    this.legend = add(figure, "div", {class: "legend"});
    this.plot = add(figure, "div", {class: "plot"});
    this.svg = add(this.plot, "svg", {role: "img", tabindex: "0"});
    this.tip = add(figure, "div", {class: "tip", hidden: "", "aria-live": "polite"});
    this.listen();
    new IntersectionObserver(([entry]) => { if ((this.isInView = entry.isIntersecting) && this.isStale) this.draw(); }).observe(figure);
  }

  update({lines, log, percent, zero}) {
    const known = new Map(this.lines.map(line => [lineName(line), line]));
    this.lines = lines.map(line => known.get(line) || line).filter(line => line.label !== undefined);
    for (const line of this.lines) line.unit = null;
    Object.assign(this, {percent, zero});
    if (this.log === undefined) this.addLog(log);
  }

  addLog(isLog) {
    this.log = isLog;
    if (this.percent || this.lines.some(line => line.y.some(value => value < 0))) return;
    const button = add(this.figure.querySelector("figcaption"), "button", {type: "button", class: "log", title: "Logarithmic y axis"}, "log");
    const show = () => button.setAttribute("aria-pressed", String(this.log));
    button.onclick = () => { this.log = !this.log; show(); this.draw(); };
    show();
  }

  drawLegend() {
    let labels = [...new Set(this.lines.map(line => line.label))].filter(label => this.section.shows(label));
    if (labels.length < 2 || (this.section.table && labels.length > MOST_LEGENDS)) labels = [];
    const first = label => this.lines.find(line => line.label === label);
    const looks = labels.map(label => `${label} ${first(label).color} ${first(label).dash}`).join("\n");
    if (looks === this.looks) return;
    this.looks = looks;
    this.legend.textContent = "";
    for (const label of labels) {
      const button = add(this.legend, "button", {type: "button", "aria-pressed": String(!this.hidden.has(label)), class: "series"});
      swatch(button, first(label));
      add(button, "span", {}, label);
      button.onclick = () => {
        this.hidden.has(label) ? this.hidden.delete(label) : this.hidden.add(label);
        button.setAttribute("aria-pressed", String(!this.hidden.has(label)));
        this.draw();
      };
    }
  }

  /** The lines that are visible, with x in the current unit. */
  visible() {
    const unit = this.section.unit;
    const axis = line => this.section.axes[line.run];
    const lines = this.lines.filter(line => !this.hidden.has(line.label) && this.section.shows(line.label) && (unit === "step" || axis(line)[unit].length > 1));
    for (const line of lines)
      if (line.unit !== unit) {
        line.unit = unit;
        line.at = line.x.map(step => toX(axis(line), unit, step));
        if (line.average) line.average.at = line.average.x.map(step => toX(axis(line), unit, step));
      }
    return lines;
  }

  range(lines, [left, right]) {
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

  draw(width = this.plot.clientWidth, xs = this.section.range()) {
    if (width < 80) return;
    const lines = this.visible(), {x, y} = this.range(lines, xs), [low, high] = this.log ? y.map(Math.log) : y;
    Object.assign(this, {domain: x, width, isStale: false});
    this.px = value => LEFT + (value - x[0]) / (x[1] - x[0]) * (width - LEFT - RIGHT);
    this.py = value => HEIGHT - BOTTOM - ((this.log ? Math.log(value) : value) - low) / (high - low) * (HEIGHT - BOTTOM - TOP);
    this.drawLegend();
    const svg = this.svg;
    svg.textContent = "";
    svg.setAttribute("viewBox", `0 0 ${width} ${HEIGHT}`);
    svg.setAttribute("aria-label", `${this.title} by ${X_NAMES[this.section.unit]}: ${lines.map(line => this.lastValue(line)).join("; ")}`);
    this.drawAxes(svg, y);
    const clip = this.clip ||= `clip-${Chart.count = (Chart.count || 0) + 1}`;
    add(add(svg, "clipPath", {id: clip}), "rect", {x: LEFT - DOT, y: 0, width: width - LEFT - RIGHT + 2 * DOT, height: HEIGHT});
    const area = add(svg, "g", {"clip-path": `url(#${clip})`});
    this.drawMarks(area);
    for (const line of lines) this.drawLine(area, line);
    this.pointer = add(svg, "g", {class: "pointer"});
    if (this.pointed) this.point(...this.pointed);
  }

  lastValue(line) {
    return `${lineName(line)} ${valueText((line.average || line).y.at(-1), this.percent)}`;
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
    const pale = 0.32 / Math.max(1, this.lines.length - 1);
    const path = ({at, y}) => y.map((value, index) => (this.log && value <= 0 ? "" :
      `${index === 0 || (this.log && y[index - 1] <= 0) ? "M" : "L"}${this.px(at[index]).toFixed(1)} ${this.py(value).toFixed(1)}`)).join("");
    add(area, "path", {class: "line", d: path(line), ...stroke(line), ...(line.average ? {"stroke-width": 1, opacity: pale} : {})});
    if (line.average) add(area, "path", {class: "line", d: path(line.average), ...stroke(line)});
    if (line.dots || line.y.length === 1)
      line.y.forEach((value, index) => {
        if (!this.log || value > 0)
          add(area, "circle", {cx: this.px(line.at[index]), cy: this.py(value), r: line.y.length > 60 ? DOT / 2 : DOT, style: `fill:${line.color}`});
      });
  }

  // The pointer

  listen() {
    const svg = this.svg;
    const at = event => {
      const box = svg.getBoundingClientRect(), share = (event.clientX - box.left) / box.width * this.width;
      const [left, right] = this.domain;
      return left + Math.min(Math.max((share - LEFT) / (this.width - LEFT - RIGHT), 0), 1) * (right - left);
    };
    let start = null;
    svg.onpointerdown = event => { if (event.pointerType === "mouse" && event.button === 0) start = at(event); };
    svg.onpointermove = event => this.section.point(at(event), this, event.buttons ? start : null, event.offsetY);
    svg.onpointerleave = () => { start = null; this.section.point(null); };
    svg.onpointerup = event => {
      const end = at(event), [left, right] = [Math.min(start, end), Math.max(start, end)];
      if (start !== null && this.px(right) - this.px(left) > 8) this.section.zoomTo([left, right]);
      start = null;
    };
    svg.ondblclick = () => this.section.zoomTo(null);
    svg.onblur = () => this.section.point(null);
    svg.onkeydown = event => {
      const [left, right] = this.domain, x = this.pointed ? this.pointed[0] : (left + right) / 2;
      const zoom = size => this.section.zoomTo([Math.max(x - (x - left) * size, this.section.extent()[0]), Math.min(x + (right - x) * size, this.section.extent()[1])]);
      const move = to => this.section.point(Math.min(Math.max(to, left), right), this);
      const step = (right - left) / (event.shiftKey ? 10 : 100);
      const keys = {
        ArrowLeft: () => move(x - step), ArrowRight: () => move(x + step), Home: () => move(left), End: () => move(right),
        "+": () => zoom(0.5), "=": () => zoom(0.5), "-": () => zoom(2), Escape: () => this.section.zoomTo(null),
      };
      if (event.ctrlKey || event.metaKey || event.altKey || !keys[event.key]) return;
      event.preventDefault();
      keys[event.key]();
    };
  }

  /** Show the values at x; those in a box if the pointer is here, at `height`; and what would be zoomed to. */
  point(x, here, start, height) {
    this.pointed = x === null ? null : [x, here, start, height];
    this.pointer.textContent = "";
    this.tip.hidden = true;
    if (x === null || x < this.domain[0] || x > this.domain[1]) return;
    const bottom = HEIGHT - BOTTOM, px = this.px(x);
    if (start !== null) add(this.pointer, "rect", {class: "zoom", x: Math.min(px, this.px(start)), width: Math.abs(px - this.px(start)), y: TOP, height: bottom - TOP});
    add(this.pointer, "line", {x1: px, x2: px, y1: TOP, y2: bottom});
    const found = this.visible().map(line => this.found(line, x));
    for (const {line, at, value} of found)
      if (!this.log || value > 0) add(this.pointer, "circle", {cx: this.px(at), cy: this.py(value), r: 4, style: `fill:${line.color}`});
    if (here && found.length) this.showTip(x, found, height);
  }

  /** The point of a line that is nearest to x: of its average, if it has one. */
  found(line, x) {
    const shown = line.average || line, index = nearest(shown.at, x);
    return {line, at: shown.at[index], value: shown.y[index], own: line.y[nearest(line.at, x)]};
  }

  showTip(x, found, height) {
    this.tip.textContent = "";
    const closest = found.reduce((best, {at}) => (Math.abs(at - x) < Math.abs(best - x) ? at : best), Infinity);
    add(this.tip, "div", {class: "at"}, xText(this.section.unit, closest));
    const distance = ({value}) => Math.abs(this.py(value) - (height ?? HEIGHT / 2));
    const near = new Set([...found].sort((a, b) => distance(a) - distance(b)).slice(0, MOST_VALUES));
    for (const {line, value, own} of found.filter(each => near.has(each))) {
      const row = add(this.tip, "div", {class: "value"});
      swatch(row, line);
      add(row, "span", {}, lineName(line));
      add(row, "b", {}, valueText(own, this.percent));
      if (line.average) add(row, "i", {}, `mean ${valueText(value, this.percent)}`);
    }
    if (found.length > near.size) add(this.tip, "div", {class: "at"}, `and ${found.length - near.size} more`);
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
  constructor(element, data) {
    Object.assign(this, {axes: [], unit: "step", zoom: null, table: null});
    const grid = element.querySelector(".charts");
    this.legend = add(element, "div", {class: "legend marks"});
    grid.before(this.legend);
    this.charts = [...grid.querySelectorAll("figure")].map(figure => new Chart(this, figure));
    this.update(data);
  }

  update({axes, marks, charts}) {
    this.axes = axes.map((axis, index) => axis || this.axes[index]);
    this.marks = marks;
    charts.forEach((data, index) => this.charts[index].update(data));
    this.drawLegend();
  }

  drawLegend() {
    this.legend.textContent = "";
    for (const kind of Object.keys(MARKS)) {
      const count = this.marks.filter(mark => mark.kind === kind).length;
      if (!count) continue;
      const item = add(this.legend, "span", {class: "key"}), svg = add(item, "svg", {width: 8, height: 14, "aria-hidden": "true"});
      add(svg, "line", {class: `mark ${kind}`, x1: 4, x2: 4, y1: 0, y2: 14});
      add(item, "span", {}, count > 1 ? `${MARKS[kind]} × ${count}` : MARKS[kind]);
    }
  }

  /** Whether the table above, if there is one, has chosen the run. */
  shows(label) { return !this.table || this.table.shows(label); }

  draw(width, charts = this.charts) {
    const range = this.range(), widths = charts.map(chart => width || chart.plot.clientWidth);  // before the layout changes
    charts.forEach((chart, index) => chart.draw(widths[index], range));
  }

  /** Draw what can be seen, and the rest when it can be. */
  redraw() {
    for (const chart of this.charts) chart.isStale = true;
    this.draw(undefined, this.charts.filter(chart => chart.isInView));
  }

  place(mark) { return toX(this.axes[0], this.unit, mark.step); }

  range() { return this.zoom || this.extent(); }

  /** The range of x of all charts. */
  extent() {
    const lines = this.charts.flatMap(chart => chart.visible());
    return lines.length ? [Math.min(...lines.map(line => line.at[0])), Math.max(...lines.map(line => line.at.at(-1)))] : [0, 1];
  }

  point(x, here = null, start = null, height = null) {
    for (const chart of this.charts) if (chart.pointer) chart.point(x, chart === here, chart === here ? start : null, height);
  }

  zoomTo(range) {
    this.zoom = range;
    this.draw();
  }

  setUnit(name) {
    this.unit = hasUnit(this.axes, name) ? name : "step";
    this.zoomTo(null);
  }
}

// Tables of runs

class RunTable {
  constructor(element) {
    Object.assign(this, {element, chosen: new Map(), sorted: null, isDescending: false, section: null, rows: []});
    const bar = document.createElement("div");
    bar.className = "filter";
    element.querySelector(".runs").before(bar);
    this.filter = add(bar, "input", {type: "search", placeholder: "Filter runs", "aria-label": "Filter runs"});
    this.filter.oninput = () => this.arrange();
    this.count = add(bar, "span", {role: "status"});
    this.setUp(element.querySelector("table"));
  }

  setUp(table) {
    this.table = table;
    this.header = table.tHead.textContent;
    for (const [index, cell] of [...table.tHead.rows[0].cells].entries()) {
      const button = document.createElement("button");
      button.type = "button";
      button.append(...cell.childNodes);
      cell.append(button);
      button.onclick = () => {
        this.isDescending = this.sorted === button.textContent && !this.isDescending;
        this.sorted = button.textContent;
        this.arrange();
      };
    }
    const first = document.createElement("th");
    table.tHead.rows[0].prepend(first);
    this.all = add(first, "input", {type: "checkbox", "aria-label": "Show all runs of the table in the charts"});
    this.all.onchange = () => {
      for (const row of this.rows) if (!row.hidden) this.chosen.set(row.dataset.run, this.all.checked);
      this.choose();
    };
    this.rows = [...table.tBodies[0].rows];
    for (const row of this.rows) this.addBox(row);
    this.arrange();
  }

  addBox(row) {
    const label = add(row.insertCell(0), "label"), box = add(label, "input", {type: "checkbox", "aria-label": `Show ${row.dataset.run} in the charts`});
    swatch(label, row.dataset);
    box.onchange = () => { this.chosen.set(row.dataset.run, box.checked); this.choose(); };
  }

  /** Take over the rows of a new version of the table. Elements stay, so that nothing is lost that is being clicked. */
  update(table) {
    if (table.tHead.textContent !== this.header) {
      this.table.replaceWith(table);
      this.setUp(table);
      return;
    }
    const known = new Map(this.rows.map(row => [row.dataset.run, row]));
    this.rows = [...table.tBodies[0].rows].map(row => {
      const old = known.get(row.dataset.run);
      known.delete(row.dataset.run);
      if (!old || old.dataset.color !== row.dataset.color || old.dataset.dash !== row.dataset.dash) {
        if (old) old.remove();
        this.addBox(row);
        return row;
      }
      old.toggleAttribute("data-shown", "shown" in row.dataset);
      [...row.cells].forEach((cell, index) => { if (cell.outerHTML !== old.cells[index + 1].outerHTML) old.cells[index + 1].replaceWith(cell); });
      return old;
    });
    for (const row of known.values()) row.remove();
    this.arrange();
  }

  /** Sort and filter the rows. */
  arrange() {
    const heads = [...this.table.tHead.rows[0].cells], column = heads.findIndex(cell => this.sorted !== null && cell.textContent === this.sorted);
    heads.forEach((cell, index) => cell.setAttribute("aria-sort", index !== column ? "none" : this.isDescending ? "descending" : "ascending"));
    const key = row => row.cells[column].dataset.value ?? (column < 3 ? row.cells[column].textContent : "");
    const ordered = column < 0 ? this.rows : [...this.rows].sort((a, b) => {
      const [x, y] = [key(a), key(b)];
      if (x === "" || y === "") return (x === "") - (y === "");
      return (this.isDescending ? -1 : 1) * (column < 3 ? x.localeCompare(y, "en", {numeric: true}) : x - y);
    });
    const body = this.table.tBodies[0], focused = document.activeElement;
    if (ordered.some((row, index) => body.rows[index] !== row)) {
      body.append(...ordered);
      if (body.contains(focused)) focused.focus();
    }
    this.filter.hidden = this.rows.length < FEWEST_FILTERED;
    const words = this.filter.value.toLowerCase().split(/\s+/);
    const text = row => `${row.cells[1].textContent} ${row.cells[2].textContent}`.toLowerCase();  // name and state
    for (const row of this.rows) row.hidden = !words.every(word => text(row).includes(word));
    this.choose();
  }

  shows(name) {
    return this.chosen.get(name) ?? this.rows.some(row => row.dataset.run === name && "shown" in row.dataset);
  }

  /** Mark the runs that the charts show. */
  choose() {
    const boxes = this.rows.map(row => row.querySelector("input")), rows = this.rows.filter(row => !row.hidden);
    this.rows.forEach((row, index) => { boxes[index].checked = this.shows(row.dataset.run); });
    const shown = rows.filter(row => this.shows(row.dataset.run)).length;
    Object.assign(this.all, {checked: rows.length > 0 && shown === rows.length, indeterminate: shown > 0 && shown < rows.length});
    const of = rows.length === this.rows.length ? "" : `${rows.length} of `;
    this.count.textContent = `${of}${this.rows.length} run${this.rows.length === 1 ? "" : "s"}, ${boxes.filter(box => box.checked).length} in the charts`;
    if (this.section) this.section.redraw();
  }
}

// The page

let unit = "step";

function chooseUnit(chosen) {
  unit = chosen;
  for (const button of document.querySelectorAll("#units button"))
    button.setAttribute("aria-pressed", String(button.value === chosen));
  for (const section of sections()) section.setUnit(chosen);
}

/** Add the buttons for x axes above the first charts. */
function addUnits() {
  const first = document.querySelector(".charts"), names = Object.keys(X_NAMES).filter(name => sections().some(section => hasUnit(section.axes, name)));
  const old = document.getElementById("units");
  if (old && first && old.dataset.names === names.join() && old.nextElementSibling.contains(first)) return;
  if (old) old.remove();
  if (!first) return;
  const bar = document.createElement("div");
  bar.id = "units";
  bar.dataset.names = names.join();
  first.closest("section").before(bar);
  if (names.length > 1) add(bar, "span", {}, "x axis");
  for (const name of names.length > 1 ? names : [])
    add(bar, "button", {type: "button", value: name, "aria-pressed": String(name === unit)}, X_NAMES[name]).onclick = () => chooseUnit(name);
  add(bar, "span", {class: "hint"}, "drag or press + to zoom, double-click or press Esc to reset");
}

function addPart(element, data) {
  const table = element.querySelector(".runs") && new RunTable(element);
  parts.set(element.dataset.part, {element, table, section: data ? new Section(element, data) : null});
}

/** Let each table of runs choose what the charts below it show, and draw what is new. */
function arrangeParts(isNew) {
  addUnits();
  let table = null;
  for (const element of document.querySelectorAll("main > section")) {
    const part = parts.get(element.dataset.part);
    if (part.table) table = part.table;
    if (!part.section) continue;
    Object.assign(part.section, {table});
    if (table) table.section = part.section;
    table = null;
    if (isNew(element)) part.section.setUnit(unit);
  }
}

for (const element of document.querySelectorAll("main > section")) {
  const script = element.querySelector("script");
  addPart(element, script && JSON.parse(script.textContent));
}
arrangeParts(() => true);
let width = innerWidth;
const drawAll = narrow => { for (const section of sections()) section.draw(narrow); };
addEventListener("resize", () => { if (innerWidth !== width) { width = innerWidth; drawAll(); } });
addEventListener("beforeprint", () => drawAll(PRINTED));
addEventListener("afterprint", () => drawAll());

// A page that a server keeps current

const parsed = html => Object.assign(document.createElement("template"), {innerHTML: html}).content;

/** Take over an answer: {title, parts: [{key, html, data}]} in their order; html and data only if they have changed. */
function takeOver(answer) {
  document.title = answer.title;
  const added = new Set(), main = document.querySelector("main");
  let next = main.querySelector(":scope > section");
  for (const {key, html, data} of answer.parts) {
    const known = parts.get(key);
    if (!known) {
      const element = document.createElement("section");
      element.dataset.part = key;
      element.append(parsed(html));
      main.insertBefore(element, next);
      addPart(element, data);
      added.add(element);
      continue;
    }
    if (html && known.table) known.table.update(parsed(html).querySelector("table"));
    else if (html && key === HEADER) known.element.replaceChildren(parsed(html));  // other keys change with the HTML
    if (data) known.section.update(data);
    if (known.element !== next) main.insertBefore(known.element, next);
    else do next = next.nextElementSibling; while (next && next.id === "units");
  }
  const keys = new Set(answer.parts.map(part => part.key));
  for (const [key, {element}] of [...parts]) if (!keys.has(key)) { element.remove(); parts.delete(key); }
  arrangeParts(element => added.has(element));
  for (const {key, data} of answer.parts) if (data && !added.has(parts.get(key).element)) parts.get(key).section.redraw();
}

function follow(version, state) {
  let isAsking = false, timer;
  const show = (text, tone) => {
    document.querySelector("header").append(state);
    state.className = tone;
    state.textContent = text;
  };
  const describe = ({time, unread}) => `as of ${new Date(time).toLocaleTimeString()}${unread > 0.01 ? `, ${whole.format(100 - 100 * unread)}% read` : ""}`;
  let last = "";
  const ask = async () => {
    if (isAsking || document.hidden) return;
    isAsking = true;
    clearTimeout(timer);
    let cost = 0;
    try {
      const response = await fetch(`?since=${version}`, {cache: "no-store", signal: AbortSignal.timeout(TIMEOUT)});
      if (!response.ok) throw new Error(response.status);
      const answer = await response.json(), start = performance.now();
      takeOver(answer);
      cost = answer.cost + performance.now() - start;
      version = answer.version;
      last = describe(answer);
      show(last, "live");
    } catch (error) {
      show(`${last && `${last}; `}no answer from the server`, "live bad");
      if (!(error instanceof TypeError || error instanceof DOMException || /^\d+$/.test(error.message))) console.error(error);
    }
    isAsking = false;
    timer = setTimeout(ask, Math.max(POLL, SHARE * cost));
  };
  document.addEventListener("visibilitychange", ask);
  ask();
}

const {version} = document.querySelector("main").dataset;
if (version) follow(Number(version), document.createElement("span"));
