// ---- maps: one canvas for each of what is shown, all of one view, spots linked across them and the scatter
const PANELS = {
  target: "Measured", predicted: "Predicted", difference: "Predicted − measured", spread: "Spread over members",
  percentile: "Distance to training tiles (%)",
};
const paletteOf = (key) => (key === "difference" ? "difference" : key === "spread" || key === "percentile" ? "doubt" : "value");
const panelsOf = (slide) => {
  const keys = slide.planes.map((plane) => plane.key);
  const found = keys.includes("target") ? ["target", "predicted", "difference"] : ["predicted", ...keys.filter((key) => key === "spread")];
  return slide.percentile && !keys.includes("target") ? [...found, "percentile"] : found;
};
// What is covered where it is not to be trusted: all but what was measured, and how far tiles are from those trained on.
const doubtful = (key) => key !== "target" && key !== "percentile";

let panels = [];  // { key, box, canvas, veil }
let current = null;  // what is drawn: { s, slide, data, found, gene, name, scales }
let turn = 0;

function canvasOf(canvas, height) {
  const width = Math.max(60, canvas.parentElement.clientWidth);
  const dense = window.devicePixelRatio || 1;
  const [w, h] = [Math.round(width * dense), Math.round(height(width) * dense)];
  if (canvas.width !== w || canvas.height !== h) { canvas.width = w; canvas.height = h; }
  canvas.style.height = `${h / dense}px`;
  const pen = canvas.getContext("2d");
  pen.setTransform(dense, 0, 0, dense, 0, 0);
  pen.clearRect(0, 0, width, h / dense);
  pen.font = "12px system-ui, sans-serif";
  return { pen, width, height: h / dense };
}

// A bar of a round length in µm, where the slide says its resolution; `umPerPx` of the canvas.
function scaleBar(pen, width, height, umPerPx) {
  if (!umPerPx || width < 90) return;
  const most = Math.min(160, width * 0.35) * umPerPx;
  const power = 10 ** Math.floor(Math.log10(most));
  const length = [5, 2, 1].map((k) => k * power).find((um) => um <= most);
  const [wide, x, y] = [length / umPerPx, 10, height - 10];
  pen.save();
  pen.font = "600 12px system-ui, sans-serif";
  pen.textAlign = "left";
  pen.lineJoin = "round";
  for (const [colour, thick] of [["#ffffff", 6], ["#111111", 3]]) {
    pen.strokeStyle = colour;
    pen.lineWidth = thick;
    pen.beginPath(); pen.moveTo(x, y); pen.lineTo(x + wide, y); pen.stroke();
  }
  const words = length >= 1000 ? `${length / 1000} mm` : `${length} µm`;
  pen.strokeStyle = "#ffffff";
  pen.lineWidth = 3;
  pen.strokeText(words, x, y - 7);
  pen.fillStyle = "#111111";
  pen.fillText(words, x, y - 7);
  pen.restore();
}

// On a narrow screen one map is seen at a time.
function layTabs() {
  at("tabs").replaceChildren();
  panels.forEach(({ key }) => {
    const button = make("button", PANELS[key], at("tabs"), { type: "button", "data-tab": key });
    button.addEventListener("click", () => { state.tab = key; showTab(); if (current && current.found) drawMaps(); });
  });
  if (!panels.some(({ key }) => key === state.tab)) state.tab = "predicted";
  showTab();
}
function showTab() {
  panels.forEach(({ key, box }) => box.parentElement.classList.toggle("behind", key !== state.tab));
  [...at("tabs").children].forEach((button) => button.setAttribute("aria-pressed", String(button.dataset.tab === state.tab)));
}

function layPanels(slide) {
  const keys = panelsOf(slide);
  if (panels.map((panel) => panel.key).join() === keys.join()) return;
  at("maps").replaceChildren();
  panels = keys.map((key) => {
    const figure = make("figure", null, at("maps"));
    const caption = make("figcaption", PANELS[key], figure);
    const box = make("div", null, figure, { class: "map" });
    const canvas = make("canvas", null, box, { role: "img", tabindex: "0", "data-map": key });
    const veil = make("div", null, box, { class: "veil" });
    veil.hidden = true;
    const panel = { key, caption, box, canvas, veil };
    listen(panel);
    return panel;
  });
  at("which").replaceChildren();
  keys.filter((key) => key !== "percentile").forEach((key) => make("option", PANELS[key], at("which"), { value: key }));
  if (keys.includes("predicted")) at("which").value = "predicted";
  layTabs();
}

// How a slide lies on a canvas of this size: px of the canvas are ox + scale · px of the slide.
function placed(slide, width, height, view) {
  const scale = Math.min(width / slide.width, height / slide.height) * view.k;
  return { scale, ox: width / 2 - view.x * slide.width * scale, oy: height / 2 - view.y * slide.height * scale };
}
const mapHeight = (slide) => (width) => Math.min(width * (slide.height / slide.width), 620);

function paint(pen, width, height, slide, data, values, scale, palette, view, options) {
  const { scale: zoom, ox, oy } = placed(slide, width, height, view);
  pen.fillStyle = ink("--ground");
  pen.fillRect(0, 0, width, height);
  if (data.picture) pen.drawImage(data.picture, ox, oy, slide.width * zoom, slide.height * zoom);
  const bar = () => scaleBar(pen, width, height, slide.um_per_px ? slide.um_per_px / zoom : null);
  if (!values || options.tissue) { drawRegions(pen, slide, zoom, ox, oy); bar(); return; }
  const radius = Math.max(slide.square ? 0.5 : 1.1, slide.radius * zoom);
  const buckets = new Map();
  const hollow = [], covered = [];
  for (let i = 0; i < slide.n; i++) {
    const value = values[i];
    if (options.cover && data.unlike.has(i)) covered.push(i);
    else if (Number.isNaN(value)) hollow.push(i);
    else {
      const q = Math.max(0, Math.min(255, Math.round(((value - scale.from) / (scale.to - scale.from)) * 255)));
      if (buckets.has(q)) buckets.get(q).push(i);
      else buckets.set(q, [i]);
    }
  }
  const trace = (i) => {
    const [x, y] = [ox + slide.x[i] * zoom, oy + slide.y[i] * zoom];
    if (slide.square) {  // side by side, without seams
      const [left, top] = [Math.round(x - radius), Math.round(y - radius)];
      pen.rect(left, top, Math.round(x + radius) - left, Math.round(y + radius) - top);
    } else if (radius < 2) pen.rect(x - radius, y - radius, 2 * radius, 2 * radius);
    else { pen.moveTo(x + radius, y); pen.arc(x, y, radius, 0, 2 * Math.PI); }
  };
  pen.globalAlpha = options.opacity;
  for (const [q, rows] of buckets) {
    pen.beginPath();
    rows.forEach(trace);
    pen.fillStyle = LUTS[palette][q];
    pen.fill();
  }
  pen.strokeStyle = "#6b7280";
  pen.lineWidth = 1;
  pen.beginPath(); hollow.forEach(trace); pen.stroke();
  pen.beginPath();
  covered.forEach((i) => {
    const [x, y, r] = [ox + slide.x[i] * zoom, oy + slide.y[i] * zoom, radius * 0.6];
    pen.moveTo(x - r, y - r); pen.lineTo(x + r, y + r); pen.moveTo(x - r, y + r); pen.lineTo(x + r, y - r);
  });
  pen.stroke();
  pen.globalAlpha = 1;
  if (options.spot !== null && options.spot !== undefined) {
    const [x, y] = [ox + slide.x[options.spot] * zoom, oy + slide.y[options.spot] * zoom];
    for (const [colour, wide] of [["#ffffff", 4], ["#d00000", 2]]) {
      pen.strokeStyle = colour; pen.lineWidth = wide;
      pen.beginPath(); pen.arc(x, y, Math.max(5, radius + 2), 0, 2 * Math.PI); pen.stroke();
    }
  }
  drawRegions(pen, slide, zoom, ox, oy);
  bar();
}

// Outlines that a person drew, each name in a colour of its own.
function drawRegions(pen, slide, zoom, ox, oy) {
  slide.regions.forEach((region, r) => {
    pen.beginPath();
    for (const ring of region.rings) {
      ring.forEach(([x, y], i) => (i ? pen.lineTo(ox + x * zoom, oy + y * zoom) : pen.moveTo(ox + x * zoom, oy + y * zoom)));
      pen.closePath();
    }
    for (const [colour, wide] of [["#ffffff", 4], [HUES[r % HUES.length], 2]]) { pen.strokeStyle = colour; pen.lineWidth = wide; pen.stroke(); }
  });
  pen.lineWidth = 1;
}

// Spots of like expression, a colour each: as measured, as predicted, and by the embeddings.
const KINDS = { measured: "Measured", predicted: "Predicted", embeddings: "Embeddings" };
function drawDomains() {
  const { slide, data } = current;
  const kinds = Object.entries(slide.domains);
  at("domains-box").hidden = !kinds.length;
  at("domains").replaceChildren();
  if (!kinds.length) return;
  const words = kinds.filter(([, of]) => of.match !== undefined).map(([kind, of]) =>
    `${KINDS[kind].toLowerCase()} ${shown(of.match, 2)}${of.chance === null ? "" : ` (${shown(of.chance, 2)} on maps moved over the slide)`}`);
  at("domains-words").textContent = words.length ? `Adjusted Rand index with what was measured${inSample(slide)}: ${words.join(", ")}.` : "There is nothing measured to match them with.";
  const canvases = kinds.map(([kind]) => {  // all of them first: each that comes makes the others narrower
    const figure = make("figure", null, at("domains"));
    make("figcaption", KINDS[kind], figure);
    return make("canvas", null, make("div", null, figure), { role: "img", "data-domains": kind });
  });
  kinds.forEach(([kind, of], k) => {
    const canvas = canvases[k];
    const { pen, width, height } = canvasOf(canvas, mapHeight(slide));
    const { scale: zoom, ox, oy } = placed(slide, width, height, { k: 1, x: 0.5, y: 0.5 });
    pen.fillStyle = ink("--ground");
    pen.fillRect(0, 0, width, height);
    if (data.picture) pen.drawImage(data.picture, ox, oy, slide.width * zoom, slide.height * zoom);
    const radius = Math.max(1.5, slide.radius * zoom);
    of.labels.forEach((label, i) => {
      pen.fillStyle = HUES[label % HUES.length];
      pen.fillRect(ox + slide.x[i] * zoom - radius, oy + slide.y[i] * zoom - radius, 2 * radius, 2 * radius);
    });
    scaleBar(pen, width, height, slide.um_per_px ? slide.um_per_px / zoom : null);
    canvas.setAttribute("aria-label", `Domains of slide ${slide.id}, ${KINDS[kind].toLowerCase()}`);
  });
}

// What is measured and predicted in each region. The interval is around a spot's value: that of a mean is not known.
function drawRegionTable() {
  const { slide, found } = current;
  at("regions").hidden = !slide.regions.length;
  at("regions-table").replaceChildren();
  if (!slide.regions.length) return;
  const of = slide.region_means, veiled = covering();
  const table = make("table", null, at("regions-table"));
  const head = make("tr", null, make("thead", null, table));
  ["Region", "spots", ...(of.target ? ["measured"] : []), "predicted", "its middle half", ...(of.target ? ["difference"] : [])].forEach((title) => make("th", title, head, { scope: "col" }));
  const body = make("tbody", null, table);
  const cell = (value) => (value === null || value === undefined ? "–" : short(value));
  slide.regions.forEach((region, r) => {
    const row = make("tr", null, body);
    const name = make("th", null, row, { scope: "row" });
    make("i", null, name, { class: "swatch" }).style.background = HUES[r % HUES.length];
    make("span", region.name, name);
    make("td", region.n, row);
    const value = (plane, key) => of[plane][r][key][found.place];
    const [mean, low, high] = ["mean", "low", "high"].map((key) => value("predicted", key));
    if (of.target) make("td", cell(value("target", "mean")), row);
    make("td", veiled ? "covered" : cell(mean), row);
    make("td", veiled || low === null ? "–" : `${cell(low)} to ${cell(high)}`, row);
    if (of.target) make("td", veiled || mean === null || value("target", "mean") === null ? "–" : cell(mean - value("target", "mean")), row);
  });
  const half = found.half === null || found.half === undefined ? "" : ` The ${Math.round(100 * D.level)} % interval is ±${short(found.half)} around the value of a spot; how far means of regions are off is not known.`;
  at("regions-words").textContent = `Means over the spots whose centres lie in a region, and between which predicted values the middle half of them lie.${half}`;
}

const symmetric = (scale) => {
  const most = Math.max(Math.abs(scale.from), Math.abs(scale.to)) || 1;
  return { ...scale, from: -most, to: most };
};

function scalesOf(slide, found) {
  const of = found.of;
  const values = [of.target, of.predicted].filter(Boolean);
  const shared = state.scale === "all" ? ends(everySlide(["target", "predicted"])) : ends(values);
  const own = (key) => (state.scale === "own" ? ends([of[key]]) : shared);
  const scales = { predicted: own("predicted") };
  if (of.target) { scales.target = own("target"); scales.difference = symmetric(ends([of.difference])); }
  if (of.spread) scales.spread = { ...ends(state.scale === "all" ? everySlide(["spread"]) : [of.spread]), from: 0 };
  if (of.percentile) scales.percentile = { from: 0, to: 100, low: 0, high: 100 };
  return scales;
}

// The gene's values on all slides that are unpacked.
function everySlide(keys) {
  const found = [];
  for (const [s, data] of ready) {
    const values = valuesOf(D.slides[s], data, state.gene);
    if (values) keys.forEach((key) => values.of[key] && found.push(values.of[key]));
  }
  return found;
}

async function draw() {
  const mine = ++turn;
  if (!D.slides.length || state.gene === null) return;
  const slide = D.slides[state.slide];
  const name = D.genes.names[state.gene];
  at("chosen").textContent = `${name} on slide ${slide.id}`;
  if (!ready.has(state.slide)) at("shown").setAttribute("aria-busy", "true");
  let data;
  try {
    data = await open(state.slide);
    if (state.scale === "all") await Promise.all(D.slides.map((_, s) => open(s)));
  } catch (error) {
    at("shown").hidden = true;
    at("note").textContent = "This browser cannot unpack the maps; a current one can (it needs DecompressionStream).";
    return;
  }
  if (mine !== turn) return;  // another gene was chosen meanwhile
  at("shown").setAttribute("aria-busy", "false");
  layPanels(slide);
  const found = valuesOf(slide, data, state.gene);
  at("shown").hidden = !found;
  at("note").textContent = [slide.label, ...describe(slide, found, name)].join(" · ");
  current = { s: state.slide, slide, data, found, gene: state.gene, name, scales: found ? scalesOf(slide, found) : {} };
  if (found) { showCrop(); drawMaps(); drawBars(); drawScatter(); drawRegionTable(); drawDomains(); tell(); }
  drawMultiples();
}

function describe(slide, found, name) {
  if (!found) {
    return [slide.panel.includes(state.gene)
      ? `the maps of ${name} are not kept in this page, for its size; its values are in the .h5ad`
      : `${name} is absent here: it is not in the gene panel of this slide's fold`];
  }
  const words = D.sets[state.gene] === undefined ? [] : [`the mean of ${D.sets[state.gene]}, each standardised on this slide: a pattern, not a level`];
  if (found.of.target) {
    if (!slide.measured[found.place]) words.push("not measured on this slide: there is only the prediction");
    else words.push(slide.pcc[found.place] === null ? "PCC undefined" : `PCC ${shown(slide.pcc[found.place], 3)} on this slide${inSample(slide)}`);
  }
  const moran = Object.entries(slide.moran).map(([key, values]) => [key, values[found.place]]).filter(([, value]) => value !== null);
  if (moran.length) words.push(`Moran's I ${moran.map(([key, value]) => `${shown(value, 2)} ${key === "target" ? "measured" : "predicted"}`).join(", ")}`);
  if (slide.unlike.length) words.push(`${slide.unlike.length} of ${slide.n} tiles are unlike the training tiles (crosses)`);
  return words;
}

// No figure of a slide that the head was trained on stands without saying so.
const inSample = (slide) => (slide.in_sample ? " (in-sample)" : "");

const covering = () => state.mask && trustedGene(state.gene) === false;

function drawMaps() {
  const { slide, data, found, name, scales } = current;
  panels.forEach(({ key, box, canvas, veil }) => {
    const { pen, width, height } = canvasOf(canvas, mapHeight(slide));
    const veiled = covering() && doubtful(key);
    const options = {
      opacity: Number(at("opacity").value) / 100, tissue: state.tissue || veiled,
      cover: state.mask && doubtful(key), spot: state.spot,
    };
    paint(pen, width, height, slide, data, found.of[key], scales[key], paletteOf(key), state.view, options);
    box.classList.toggle("zoomed", state.view.k > 1);
    veil.hidden = !veiled || state.tissue;
    if (!veil.hidden) {
      veil.replaceChildren();
      make("span", doubt(), veil);
      make("button", "Show it all the same", veil, { type: "button" }).addEventListener("click", toggleMask);
    }
    canvas.setAttribute("aria-label", `${PANELS[key]}: ${name} at ${slide.n} spots of slide ${slide.id}${veiled ? ", covered: not to be trusted" : ", over the H&E image"}`);
  });
}

// Why a gene is not to be trusted, in its numbers.
function doubt() {
  const known = Object.fromEntries(D.genes.columns.map((column) => [column.key, column.values[state.gene]]));
  const between = known.cv_low === undefined || known.cv_low === null ? "" : ` (${shown(known.cv_low, 2)} to ${shown(known.cv_high, 2)})`;
  const why = D.trust ? ` A gene is trusted where ${D.trust}.` : "";
  return `${D.genes.names[state.gene]} is not to be trusted: PCC ${shown(known.cv_pcc, 2)}${between} out of fold.${why}`;
}

function drawBars() {
  at("bars").replaceChildren();
  const { slide, scales } = current;
  const rows = state.scale === "own"
    ? panels.map(({ key }) => [key, PANELS[key]])
    : panels.filter(({ key }) => key !== "predicted" || !scales.target).map(({ key }) => [key, key === "target" ? "Measured and predicted" : PANELS[key]]);
  rows.forEach(([key, label]) => {
    make("div", `${label}, a range of ${short(scales[key].to - scales[key].from)}`, at("bars"), { class: "soft note" });
    const box = make("div", null, at("bars"));
    const canvas = make("canvas", null, box, { role: "img" });
    const { pen, width } = canvasOf(canvas, () => 36);
    drawBar(pen, width, scales[key], paletteOf(key));
    canvas.setAttribute("aria-label", `Colours of ${label}: ${short(scales[key].from)} to ${short(scales[key].to)}`);
  });
  at("narrow").textContent = narrow();
  at("narrow").hidden = !at("narrow").textContent;
  at("unit").textContent = `${unitWords()}The ends are the 1st and 99th percentile. This page keeps each value to 1/${slide.levels} of its gene's range on the slide.`;
}

const unitWords = () => (D.sets[state.gene] !== undefined ? "Unit: standard deviations of a gene on this slide. " : D.unit ? `Unit: ${D.unit}. ` : "");

// What colours would hide: a map of all colours may be of next to no difference.
function narrow() {
  const { of, half } = current.found;
  const span = (values) => { const { from, to } = ends([values]); return to - from; };
  const own = span(of.predicted);
  if (of.target && own < 0.5 * span(of.target)) {
    return `Predicted values span ${short(own)}, ${Math.round((100 * own) / span(of.target))} % of what was measured (${short(span(of.target))}).`
      + (state.scale === "own" ? " On a scale of their own the two maps look alike and are not." : "");
  }
  if (half !== null && half !== undefined && own < 2 * half) {
    return `Predicted values span ${short(own)}, less than the interval around each of them (${short(2 * half)}): differences between colours may be chance.`;
  }
  return "";
}

function drawBar(pen, width, scale, palette, colour = ink("--soft")) {
  for (let i = 0; i < 256; i++) {
    pen.fillStyle = LUTS[palette][i];
    pen.fillRect((i / 256) * width, 0, width / 256 + 1, 14);
  }
  pen.fillStyle = colour;
  for (const mark of [0, 0.5, 1]) {
    pen.textAlign = mark === 0 ? "left" : mark === 1 ? "right" : "center";
    let label = short(scale.from + mark * (scale.to - scale.from));
    if (mark === 0 && scale.low < scale.from) label = `≤ ${label}`;
    if (mark === 1 && scale.high > scale.to) label = `≥ ${label}`;
    pen.fillText(label, mark * width, 30);
  }
}

// ---- all slides of the gene, small
let multiplesTurn = 0;
async function drawMultiples() {
  at("multiples-box").hidden = D.slides.length < 2;
  if (D.slides.length < 2 || !at("multiples-box").open) return;
  const mine = ++multiplesTurn;
  const key = at("which").value || "predicted";
  if (!at("multiples").children.length) {
    D.slides.forEach((slide, s) => {
      const button = make("button", null, at("multiples"), { type: "button" });
      make("canvas", null, button);
      make("span", slide.id, button);
      button.addEventListener("click", () => chooseSlide(s));
    });
  }
  for (let s = 0; s < D.slides.length; s++) {
    if (!ready.has(s)) {
      at("multiples-state").textContent = `unpacking ${s + 1} of ${D.slides.length}…`;
      await open(s);
      if (mine !== multiplesTurn) return;
    }
  }
  at("multiples-state").textContent = "";
  const every = D.slides.map((slide, s) => valuesOf(slide, ready.get(s), state.gene));
  const of = every.flatMap((found) => (found ? (key === "target" || key === "predicted" ? [found.of.target, found.of.predicted] : [found.of[key]]) : [])).filter(Boolean);
  let scale = ends(of);
  if (key === "difference") scale = symmetric(scale);
  if (key === "spread") scale = { ...scale, from: 0 };
  D.slides.forEach((slide, s) => {
    const button = at("multiples").children[s];
    const [canvas, caption] = button.children;
    const { pen, width, height } = canvasOf(canvas, (w) => Math.min(w * (slide.height / slide.width), w * 1.3));
    const found = every[s];
    const veiled = covering() && doubtful(key);
    paint(pen, width, height, slide, ready.get(s), found && found.of[key], scale, paletteOf(key), { k: 1, x: 0.5, y: 0.5 },
      { opacity: Number(at("opacity").value) / 100, tissue: state.tissue || veiled, cover: state.mask && doubtful(key), spot: null });
    const pcc = found && slide.pcc.length ? slide.pcc[found.place] : undefined;
    caption.textContent = slide.id + (!found ? ": absent" : veiled ? ": covered" : pcc === undefined ? "" : pcc === null ? ": PCC –" : `: PCC ${shown(pcc, 2)}${inSample(slide)}`);
    button.setAttribute("aria-current", String(s === state.slide));
  });
}

// ---- pointing, zooming, panning
function wordsOf(i) {
  const { slide, data, found } = current;
  const { of, half } = found;
  const lines = [data.barcodes[i]];
  if (of.target) lines.push(`measured ${Number.isNaN(of.target[i]) ? "–" : short(of.target[i])}`);
  if (covering()) lines.push("predicted: covered, not to be trusted");
  else {
    const between = half === null || half === undefined ? "" : ` (${short(of.predicted[i] - half)} to ${short(of.predicted[i] + half)} at ${Math.round(100 * D.level)} %)`;
    lines.push(`predicted ${Number.isNaN(of.predicted[i]) ? "–" : short(of.predicted[i])}${between}`);
    if (of.spread) lines.push(`spread over members ${short(of.spread[i])}`);
  }
  if (of.percentile) lines.push(`farther from the training tiles than ${of.percentile[i]} % of them`);
  if (data.unlike.has(i)) lines.push("unlike the training tiles");
  return lines;
}

// The H&E under the spot, or under the nearest that the page has a picture of.
function showCrop() {
  const { slide, data } = current;
  at("crop-box").hidden = !slide.crops.length;
  if (!slide.crops.length) return;
  const spot = state.spot ?? slide.crop_rows[0];
  const away = (row) => Math.hypot(slide.x[row] - slide.x[spot], slide.y[row] - slide.y[spot]);
  const which = slide.crop_rows.reduce((best, row, i) => (away(row) < away(slide.crop_rows[best]) ? i : best), 0);
  const row = slide.crop_rows[which];
  if (!at("crop")) make("img", null, at("crop-of"), { id: "crop" });
  at("crop").src = `data:image/jpeg;base64,${slide.crops[which]}`;
  const far = slide.um_per_px ? `${Math.round(away(row) * slide.um_per_px)} µm from it` : "nearest to it";
  const words = `H&E of three by three tiles at ${data.barcodes[row]}${row === spot ? "" : `, ${far}: the page keeps some of them`}`;
  at("crop-title").textContent = words;
  at("crop").alt = words;
}

function tell() {
  showCrop();
  at("spot").textContent = state.spot === null
    ? "Point at a spot, or focus a map and use the arrow keys." : wordsOf(state.spot).join(" · ");
}

function point(i, event) {
  const tip = at("tip");
  if (i === null || !event) tip.hidden = true;
  else {
    tip.textContent = wordsOf(i).join("\n");
    tip.hidden = false;
    const [x, y] = [event.clientX + 14, event.clientY + 14];
    tip.style.left = `${Math.max(4, Math.min(x, window.innerWidth - tip.offsetWidth - 4))}px`;
    tip.style.top = `${y + tip.offsetHeight > window.innerHeight ? event.clientY - tip.offsetHeight - 10 : y}px`;
  }
  if (i === state.spot) return;
  state.spot = i;
  drawMaps();
  drawScatter();
  tell();
}

function spotAt(canvas, event) {
  const { slide } = current;
  const box = canvas.getBoundingClientRect();
  const { scale, ox, oy } = placed(slide, box.width, box.height, state.view);
  const [x, y] = [(event.clientX - box.left - ox) / scale, (event.clientY - box.top - oy) / scale];
  let [best, which] = [(Math.max(slide.radius * 1.3, 5 / scale)) ** 2, null];
  for (let i = 0; i < slide.n; i++) {
    const away = (slide.x[i] - x) ** 2 + (slide.y[i] - y) ** 2;
    if (away < best) { best = away; which = i; }
  }
  return which;
}

function clampView() {
  const { view } = state;
  view.k = Math.max(1, Math.min(40, view.k));
  const room = 0.5 / view.k;
  view.x = Math.max(room, Math.min(1 - room, view.x));
  view.y = Math.max(room, Math.min(1 - room, view.y));
}
// Zoom, keeping the place under (px, py) of a canvas where it is; the middle where none is given.
function zoom(factor, canvas, px, py) {
  const { view } = state;
  if (canvas && current) {
    const box = canvas.getBoundingClientRect();
    const before = placed(current.slide, box.width, box.height, view);
    const [x, y] = [(px - before.ox) / before.scale, (py - before.oy) / before.scale];
    view.k = Math.max(1, Math.min(40, view.k * factor));
    const after = placed(current.slide, box.width, box.height, view);
    view.x += (x - (px - after.ox) / after.scale) / current.slide.width;
    view.y += (y - (py - after.oy) / after.scale) / current.slide.height;
  } else view.k *= factor;
  clampView();
  if (current && current.found) drawMaps();
}
function pan(dx, dy) {
  state.view.x += dx / state.view.k;
  state.view.y += dy / state.view.k;
  clampView();
  if (current && current.found) drawMaps();
}
function whole() { state.view = { k: 1, x: 0.5, y: 0.5 }; if (current && current.found) drawMaps(); }

function listen({ canvas }) {
  const held = new Map();
  let apart = 0;
  canvas.addEventListener("pointerdown", (event) => {
    held.set(event.pointerId, event);
    if (state.view.k > 1 || held.size > 1) canvas.setPointerCapture(event.pointerId);
  });
  const let_go = (event) => { held.delete(event.pointerId); apart = 0; };
  canvas.addEventListener("pointerup", let_go);
  canvas.addEventListener("pointercancel", let_go);
  canvas.addEventListener("pointerleave", (event) => { let_go(event); point(null); });
  canvas.addEventListener("pointermove", (event) => {
    if (!current || !current.found) return;
    const before = held.get(event.pointerId);
    if (before) {
      held.set(event.pointerId, event);
      const box = canvas.getBoundingClientRect();
      if (held.size === 2) {
        const [a, b] = [...held.values()];
        const now = Math.hypot(a.clientX - b.clientX, a.clientY - b.clientY);
        if (apart) zoom(now / apart, canvas, (a.clientX + b.clientX) / 2 - box.left, (a.clientY + b.clientY) / 2 - box.top);
        apart = now;
      } else if (state.view.k > 1) {
        const { scale } = placed(current.slide, box.width, box.height, { ...state.view, k: 1 });
        pan(-(event.clientX - before.clientX) / (current.slide.width * scale), -(event.clientY - before.clientY) / (current.slide.height * scale));
      }
    }
    if (!state.tissue) point(spotAt(canvas, event), event);
  });
  canvas.addEventListener("wheel", (event) => {
    if (!event.ctrlKey && !event.metaKey && document.activeElement !== canvas) return;  // the page scrolls
    event.preventDefault();
    const box = canvas.getBoundingClientRect();
    zoom(Math.exp(-event.deltaY * 0.002), canvas, event.clientX - box.left, event.clientY - box.top);
  }, { passive: false });
  canvas.addEventListener("dblclick", (event) => {
    const box = canvas.getBoundingClientRect();
    zoom(2, canvas, event.clientX - box.left, event.clientY - box.top);
  });
  canvas.addEventListener("keydown", (event) => {
    const way = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key];
    if (!way || !current || !current.found) return;
    event.preventDefault();
    if (event.shiftKey) pan(way[0] * 0.1, way[1] * 0.1);
    else point(nextSpot(way), null);
  });
}

// The nearest spot in a direction (within 45° of it).
function nextSpot([dx, dy]) {
  const { slide } = current;
  if (state.spot === null) return 0;
  let [best, which] = [Infinity, state.spot];
  for (let i = 0; i < slide.n; i++) {
    const [x, y] = [slide.x[i] - slide.x[state.spot], slide.y[i] - slide.y[state.spot]];
    const [along, across] = [x * dx + y * dy, Math.abs(x * dy) + Math.abs(y * dx)];
    if (along > 0 && across <= along && along + across < best) { best = along + across; which = i; }
  }
  return which;
}

// ---- to keep
function save(blob, name) {
  const link = make("a", null, document.body, { download: name.replace(/[^\w.-]+/g, "_"), href: URL.createObjectURL(blob) });
  link.click();
  link.remove();
  setTimeout(() => URL.revokeObjectURL(link.href), 10000);
}

function savePng() {
  if (!current || !current.found) return;
  const { slide, data, found, name, scales } = current;
  const [side, pad, top] = [640, 24, 70];
  const high = Math.round(side * Math.min(1.4, slide.height / slide.width));
  const canvas = document.createElement("canvas");
  canvas.width = pad + panels.length * (side + pad);
  canvas.height = top + high + 108;
  const pen = canvas.getContext("2d");
  pen.fillStyle = "#ffffff";
  pen.fillRect(0, 0, canvas.width, canvas.height);
  pen.fillStyle = "#1d2129";
  pen.font = "600 22px system-ui, sans-serif";
  pen.fillText(`${name} on slide ${slide.id} – ${slide.label}`, pad, 30);
  panels.forEach(({ key }, i) => {
    const picture = document.createElement("canvas");
    [picture.width, picture.height] = [side, high];
    const veiled = covering() && doubtful(key);
    paint(picture.getContext("2d"), side, high, slide, data, found.of[key], scales[key], paletteOf(key), state.view,
      { opacity: Number(at("opacity").value) / 100, tissue: state.tissue || veiled, cover: state.mask && doubtful(key), spot: null });
    const left = pad + i * (side + pad);
    pen.drawImage(picture, left, top);
    pen.fillStyle = "#1d2129";
    pen.font = "18px system-ui, sans-serif";
    pen.fillText(PANELS[key] + (veiled ? " (covered: not to be trusted)" : ""), left, top - 10);
    pen.save();
    pen.translate(left, top + high + 12);
    pen.font = "15px system-ui, sans-serif";
    drawBar(pen, side, scales[key], paletteOf(key), "#5a6270");
    pen.restore();
  });
  pen.fillStyle = "#1d2129";
  pen.font = "15px system-ui, sans-serif";
  const scaled = { shared: "one scale for measured and predicted", own: "each map on a scale of its own", all: "one scale for all slides" }[state.scale];
  pen.fillText(`${unitWords()}Colours: ${scaled}, from the 1st to the 99th percentile. ${narrow()}`, pad, top + high + 78, canvas.width - 2 * pad);
  pen.fillText(`${D.run}${D.head ? `, ${D.head}` : ""}; nh2st-pipe`, pad, top + high + 98, canvas.width - 2 * pad);
  canvas.toBlob((blob) => save(blob, `${name}_${slide.id}.png`), "image/png");
}

function csvOf() {
  const { slide, data, found, name } = current;
  const { of, half } = found;
  const cell = (value) => {
    const text = String(value);
    const safe = /^[=+\-@\t\r]/.test(text) ? `'${text}` : text;  // no spreadsheet runs it
    return /[",\n\r]/.test(safe) ? `"${safe.replace(/"/g, '""')}"` : safe;
  };
  const figure = (value) => (value === undefined || Number.isNaN(value) ? "" : Number(value.toPrecision(6)));
  // A page keeps values in so many steps of a gene's range: each row says how large one is. The file has them exactly.
  const steps = slide.planes.map((plane) => (plane.high[found.place] - plane.low[found.place]) / slide.levels);
  const step = Number(Math.max(...steps).toPrecision(2));
  const columns = ["barcode", "slide", "gene", ...(of.target ? ["measured"] : []), "predicted",
    ...(half === null ? [] : ["low", "high"]), ...(of.spread ? ["spread"] : []), ...(of.percentile ? ["train_percentile"] : []), "unlike", "rounded_to"];
  const lines = [columns.join(",")];
  for (let i = 0; i < slide.n; i++) {
    lines.push([cell(data.barcodes[i]), cell(slide.id), cell(name), ...(of.target ? [figure(of.target[i])] : []), figure(of.predicted[i]),
      ...(half === null ? [] : [figure(of.predicted[i] - half), figure(of.predicted[i] + half)]),
      ...(of.spread ? [figure(of.spread[i])] : []), ...(of.percentile ? [of.percentile[i]] : []), data.unlike.has(i), step].join(","));
  }
  return `${lines.join("\n")}\n`;
}
function saveCsv() {
  if (!current || !current.found) return;
  save(new Blob([csvOf()], { type: "text/csv" }), `${current.name}_${current.slide.id}.csv`);
}
