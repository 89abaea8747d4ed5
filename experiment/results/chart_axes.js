"use strict";
// Numbers, ticks and positions on the axes of charts.

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
