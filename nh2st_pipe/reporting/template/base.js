"use strict";
// Text of the data reaches the page through textContent and setAttribute alone.
const D = JSON.parse(document.getElementById("data").textContent);
const at = (id) => document.getElementById(id);
const NO_VALUE = 255;

function make(tag, text, parent, attributes = {}) {
  const element = document.createElement(tag);
  if (text !== null && text !== undefined) element.textContent = text;
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  if (parent) parent.appendChild(element);
  return element;
}
function draw_svg(tag, parent, attributes = {}, text) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  if (text !== undefined) element.textContent = text;
  if (parent) parent.appendChild(element);
  return element;
}
const minus = (text) => text.replace("-", "−");
const shown = (value, digits) => (value === null || value === undefined ? "–" : minus(value.toFixed(digits)));
const short = (value) => minus(String(Number(value.toPrecision(3))));
const ink = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

function definitions(id, pairs) {
  for (const [term, words] of pairs) { make("dt", term, at(id)); make("dd", words, at(id)); }
}

// What is chosen. `view` is what of the slide is seen: k times as large, its middle at x, y (shares of the slide).
const state = {
  gene: null, slide: 0, column: 1, up: false, scale: "shared", tab: "predicted", tissue: false, mask: true, spot: null,
  view: { k: 1, x: 0.5, y: 0.5 },
};

// ---- colours
const lut = (stops) => {
  const colours = stops.map((hex) => [0, 2, 4].map((i) => parseInt(hex.slice(i, i + 2), 16)));
  return Array.from({ length: 256 }, (_, i) => {
    const place = (i / 255) * (colours.length - 1);
    const k = Math.min(colours.length - 2, Math.floor(place));
    return `rgb(${colours[k].map((c, j) => Math.round(c + (place - k) * (colours[k + 1][j] - c))).join(",")})`;
  });
};
// viridis; a scale with a white middle for differences; and one for what is not a level of expression.
const LUTS = {
  value: lut(["440154", "482878", "3e4989", "31688e", "26828e", "1f9e89", "35b779", "6ece58", "b5de2b", "fde725"]),
  difference: lut(["053061", "2166ac", "4393c3", "92c5de", "f7f7f7", "fdb863", "e08214", "b35806", "7f3b08"]),
  doubt: lut(["f7f4f9", "d4b9da", "c994c7", "df65b0", "dd1c77", "980043", "67001f"]),
};

// ---- unpacking
async function inflate(text) {
  const raw = atob(text);
  const bytes = new Uint8Array(raw.length);
  for (let i = 0; i < raw.length; i++) bytes[i] = raw.charCodeAt(i);
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
  return new Uint8Array(await new Response(stream).arrayBuffer());
}

const opened = new Map();
const ready = new Map();
// Returns a promise of one slide's bytes, barcodes and picture; each is unpacked once.
function open(s) {
  if (!opened.has(s)) opened.set(s, (async () => {
    const slide = D.slides[s];
    const [bytes, names, percentile] = await Promise.all([
      inflate(slide.values), inflate(slide.barcodes), slide.percentile ? inflate(slide.percentile) : null]);
    let picture = null;
    if (slide.image) {
      picture = new Image();
      picture.src = slide.image;
      await picture.decode();
    }
    const data = { bytes, percentile, picture, barcodes: JSON.parse(new TextDecoder().decode(names)), unlike: new Set(slide.unlike) };
    ready.set(s, data);
    return data;
  })());
  return opened.get(s);
}

// Returns a gene's values on an opened slide by plane (measured, predicted, spread; NaN where there is none), and the difference.
function valuesOf(slide, data, gene) {
  const place = slide.genes.indexOf(gene);
  if (place < 0) return null;
  const of = {};
  slide.planes.forEach((plane, p) => {
    const [low, high] = [plane.low[place], plane.high[place]];
    const start = (p * slide.genes.length + place) * slide.n;
    const values = new Float32Array(slide.n);
    for (let i = 0; i < slide.n; i++) {
      const q = data.bytes[start + i];
      values[i] = q === NO_VALUE ? NaN : low + (q / slide.levels) * (high - low);
    }
    of[plane.key] = values;
  });
  if (of.target) of.difference = of.predicted.map((value, i) => value - of.target[i]);
  if (data.percentile) of.percentile = Float32Array.from(data.percentile);
  return { place, of, half: slide.half_width.length ? slide.half_width[place] : null };
}

// Ends of a scale: the 1st and 99th percentile, so that one spot does not take all the colours.
function ends(arrays) {
  const all = arrays.flatMap((values) => Array.from(values)).filter((v) => !Number.isNaN(v)).sort((a, b) => a - b);
  if (!all.length) return { from: 0, to: 1, low: 0, high: 1 };
  const part = (share) => all[Math.round(share * (all.length - 1))];
  let [from, to] = [part(0.01), part(0.99)];
  if (!(to > from)) { from -= 0.5; to += 0.5; }
  return { from, to, low: all[0], high: all[all.length - 1] };
}

function ticks(from, to, count) {
  const raw = (to - from) / count;
  const power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 5, 10].map((k) => k * power).find((k) => k >= raw * 0.7);
  const found = [];
  for (let k = Math.ceil(from / step - 1e-9); k * step <= to + step * 1e-9; k++) found.push(k * step);
  return found;
}
const range = (values) => {
  let [from, to] = [Infinity, -Infinity];
  for (const value of values) { from = Math.min(from, value); to = Math.max(to, value); }
  if (!(to >= from)) return [0, 1];
  const pad = to > from ? (to - from) * 0.05 : 0.5;
  return [from - pad, to + pad];
};

// The names most like one that is not there: those that hold it, then those that share most pairs of letters.
function nearestNames(wrong, names) {
  const pairs = (word) => new Set([...word.toLowerCase()].slice(1).map((c, i) => word[i].toLowerCase() + c));
  const wanted = pairs(wrong);
  const like = (name) => {
    const own = pairs(name);
    let both = 0;
    own.forEach((pair) => { both += wanted.has(pair); });
    return (2 * both) / Math.max(1, own.size + wanted.size) + (name.toLowerCase().includes(wrong.toLowerCase()) ? 1 : 0);
  };
  return names.map((name) => [like(name), name]).filter(([score]) => score > 0.3).sort((a, b) => b[0] - a[0]).slice(0, 3).map(([, name]) => name);
}
