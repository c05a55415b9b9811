// ---- charts: folds of each head, the scatter, training, calibration
function drawScatter() {
  const { slide, found, name } = current;
  at("scatter-box").hidden = !found.of.target;
  if (!found.of.target) return;
  const { target, predicted } = found.of;
  const { pen, width, height } = canvasOf(at("scatter"), (w) => w * 0.9);
  const rows = [];
  for (let i = 0; i < slide.n; i++) if (!Number.isNaN(target[i]) && !Number.isNaN(predicted[i])) rows.push(i);
  const [left, bottom, top, right] = [46, 38, 6, 8];
  // One range for both axes: what is flat and what is shifted must look so.
  const [from, to] = range(rows.flatMap((i) => [target[i], predicted[i]]));
  const X = (v) => left + ((v - from) / (to - from)) * (width - left - right);
  const Y = (v) => height - bottom - ((v - from) / (to - from)) * (height - bottom - top);
  pen.strokeStyle = ink("--grid");
  pen.fillStyle = ink("--soft");
  for (const mark of ticks(from, to, 4)) {
    pen.beginPath(); pen.moveTo(X(mark), top); pen.lineTo(X(mark), height - bottom); pen.stroke();
    pen.beginPath(); pen.moveTo(left, Y(mark)); pen.lineTo(width - right, Y(mark)); pen.stroke();
    pen.textAlign = "center"; pen.fillText(short(mark), X(mark), height - bottom + 15);
    pen.textAlign = "right"; pen.fillText(short(mark), left - 5, Y(mark) + 4);
  }
  pen.textAlign = "center";
  pen.fillText("measured", (left + width - right) / 2, height - 6);
  pen.save(); pen.translate(11, (top + height - bottom) / 2); pen.rotate(-Math.PI / 2); pen.fillText("predicted", 0, 0); pen.restore();
  let inside = null;
  if (found.half !== null && found.half !== undefined) {  // where the measured value lies inside the interval
    pen.save();
    pen.beginPath(); pen.rect(left, top, width - left - right, height - bottom - top); pen.clip();
    pen.fillStyle = ink("--bar"); pen.globalAlpha = 0.35;
    pen.beginPath();
    pen.moveTo(X(from), Y(from - found.half)); pen.lineTo(X(to), Y(to - found.half));
    pen.lineTo(X(to), Y(to + found.half)); pen.lineTo(X(from), Y(from + found.half));
    pen.fill();
    pen.restore();
    inside = rows.filter((i) => Math.abs(target[i] - predicted[i]) <= found.half).length / Math.max(1, rows.length);
  }
  pen.setLineDash([5, 4]); pen.strokeStyle = ink("--soft");
  pen.beginPath(); pen.moveTo(X(from), Y(from)); pen.lineTo(X(to), Y(to)); pen.stroke();
  pen.setLineDash([]);
  pen.fillStyle = ink("--dot");
  pen.globalAlpha = rows.length > 800 ? 0.3 : 0.55;
  const r = rows.length > 800 ? 1.5 : 2.4;
  for (const i of rows) { pen.fillRect(X(target[i]) - r, Y(predicted[i]) - r, 2 * r, 2 * r); }
  pen.globalAlpha = 1;
  if (state.spot !== null && !Number.isNaN(target[state.spot])) {
    pen.strokeStyle = "#d00000"; pen.lineWidth = 2;
    pen.beginPath(); pen.arc(X(target[state.spot]), Y(predicted[state.spot]), 6, 0, 2 * Math.PI); pen.stroke();
    pen.lineWidth = 1;
  }
  current.scatter = { rows, X, Y };
  const pcc = slide.pcc[found.place];
  const words = pcc === null ? "PCC undefined" : `PCC ${shown(pcc, 3)}${inSample(slide)}`;
  const covers = inside === null ? "" : `; the ${Math.round(100 * D.level)} % interval (band) covers ${Math.round(100 * inside)} %`;
  at("scatter-title").textContent = `Measured against predicted: ${words}${covers}`;
  at("scatter").setAttribute("aria-label", `Scatter of measured against predicted ${name} at ${rows.length} spots of slide ${slide.id}: ${words}${covers}`);
}

function listenScatter() {
  at("scatter").addEventListener("pointermove", (event) => {
    if (!current || !current.scatter) return;
    const box = at("scatter").getBoundingClientRect();
    const [x, y] = [event.clientX - box.left, event.clientY - box.top];
    const { rows, X, Y } = current.scatter;
    const { target, predicted } = current.found.of;
    let [best, which] = [64, null];
    for (const i of rows) {
      const away = (X(target[i]) - x) ** 2 + (Y(predicted[i]) - y) ** 2;
      if (away < best) { best = away; which = i; }
    }
    point(which, event);
  });
  at("scatter").addEventListener("pointerleave", () => point(null));
}

// ---- all genes at once: how well, and how smooth
function drawOverGenes() {
  const column = (key) => D.genes.columns.find((each) => each.key === key);
  const pcc = column("cv_pcc"), [measured, predicted] = [column("moran_target"), column("moran")];
  const values = pcc ? pcc.values.filter((v) => v !== null) : [];
  const both = measured && predicted ? D.genes.names.map((_, g) => [measured.values[g], predicted.values[g], g])
    .filter(([m, p, g]) => m !== null && p !== null && D.sets[g] === undefined) : [];
  at("distribution-box").hidden = values.length < 2;
  at("moran-box").hidden = both.length < 2;
  at("over-genes").hidden = values.length < 2 && both.length < 2;
  if (values.length > 1) {
    const step = 0.05, bins = new Map();
    values.forEach((v) => { const k = Math.min(19, Math.floor(v / step)); bins.set(k, (bins.get(k) || 0) + 1); });
    const [low, high] = [Math.min(0, ...bins.keys()), Math.max(...bins.keys()) + 1];
    const most = Math.max(...bins.values());
    const sorted = [...values].sort((a, b) => a - b);
    const middle = sorted[Math.floor(sorted.length / 2)];
    const words = `${values.length} genes by PCC: median ${shown(middle, 2)}, ${values.filter((v) => v > 0).length} above 0`;
    at("distribution-title").textContent = words;
    const { svg, X, Y } = axes(at("distribution"), words, [low * step, high * step], [0, most], "PCC, genes in steps of 0.05", false);
    for (const [k, n] of bins) {
      const bar = draw_svg("rect", svg, { x: X(k * step) + 0.5, width: Math.max(1, X((k + 1) * step) - X(k * step) - 1), y: Y(n), height: Y(0) - Y(n), class: "dot" });
      draw_svg("title", bar, {}, `${shown(k * step, 2)} to ${shown((k + 1) * step, 2)}: ${n} genes`);
    }
  }
  if (both.length > 1) {
    const smoother = both.filter(([m, p]) => p > m).length;
    const words = `Moran's I of measured and predicted maps: ${smoother} of ${both.length} genes are smoother as predicted`;
    at("moran-title").textContent = words;
    const every = range(both.flatMap(([m, p]) => [m, p]));
    const { svg, X, Y } = axes(at("moran"), words, every, every, "measured (across), predicted (up)", false);
    draw_svg("line", svg, { x1: X(every[0]), y1: Y(every[0]), x2: X(every[1]), y2: Y(every[1]), class: "axis", "stroke-dasharray": "5 4" });
    both.forEach(([m, p, g]) => {
      const dot = draw_svg("circle", svg, { cx: X(m).toFixed(1), cy: Y(p).toFixed(1), r: 3, class: "dot", "fill-opacity": 0.55 });
      draw_svg("title", dot, {}, `${D.genes.names[g]}: ${shown(m, 2)} measured, ${shown(p, 2)} predicted`);
    });
  }
}

// ---- heads: figures, the best of each column in bold, and a dot per fold
const FIGURES = [["pcc", "PCC", 3, true], ["pcc_top50_train", "best 50", 3, true], ["pcc_top50", "top 50", 3, true], ["pcc_top50_null", "its null", 3, null], ["mse", "MSE", 4, false], ["mae", "MAE", 4, false]];
const SECONDS = ["train_seconds", "train s", 1];

function headTables() {
  if (!D.heads.length || !D.heads[0].summary) { at("judged").hidden = true; return; }
  const best = Object.fromEntries(FIGURES.map(([key, , digits, more]) => {
    const values = D.heads.map((head) => head.summary && head.summary[key]).filter((v) => v !== null && v !== undefined);
    return [key, values.length && more !== null ? shown(more ? Math.max(...values) : Math.min(...values), digits) : null];
  }));
  const every = D.heads.flatMap((head) => head.folds.map((fold) => fold.pcc)).filter((v) => v !== null);
  const [from, to] = range([...every, 0]);
  const table = make("table", null, at("heads"));
  const titles = make("tr", null, make("thead", null, table));
  make("th", "Head", titles, { scope: "col" });
  FIGURES.forEach(([, title]) => make("th", title, titles, { scope: "col" }));
  make("th", "PCC of each fold", titles, { scope: "col", class: "dots" });
  if (D.heads.some((head) => head.against && head.against.difference)) {
    make("th", "Δ PCC", titles, { scope: "col", title: "This run's head less it, paired, with a 95 % interval" });
    make("th", "Δ MSE", titles, { scope: "col", title: "This run's head less it, paired, with a 95 % interval" });
  }
  const body = make("tbody", null, table);
  D.heads.forEach((head, i) => {
    const row = make("tr", null, body, i ? {} : { class: "own" });
    const name = make("th", head.name, row, { scope: "row" });
    if (!i) make("span", "this run", name, { class: "tag" });
    FIGURES.forEach(([key, , digits]) => {
      const value = head.summary ? head.summary[key] : null;
      const text = shown(value, digits);
      const cell = make("td", text, row, value !== null && value !== undefined && best[key] === text ? { class: "best" } : {});
      if (key === "pcc" && head.summary && head.summary.pcc_low != null) make("span", `${shown(head.summary.pcc_low, 3)} to ${shown(head.summary.pcc_high, 3)}`, cell, { class: "under" });
    });
    const cell = make("td", null, row, { class: "dots" });
    const values = head.folds.map((fold) => fold.pcc).filter((v) => v !== null);
    const words = head.folds.map((fold) => `${fold.fold}: ${shown(fold.pcc, 3)}`).join(", ");
    const svg = draw_svg("svg", cell, { viewBox: "0 0 150 18", width: 150, height: 18, role: "img", "aria-label": `PCC of each fold: ${words}` });
    const X = (v) => 4 + ((v - from) / (to - from)) * 142;
    draw_svg("line", svg, { x1: X(0), x2: X(0), y1: 0, y2: 18, class: "grid" });
    values.forEach((v) => draw_svg("circle", svg, { cx: X(v), cy: 9, r: 3.2, class: "dot", "fill-opacity": 0.6 }));
    if (head.summary && head.summary.pcc != null) draw_svg("line", svg, { x1: X(head.summary.pcc), x2: X(head.summary.pcc), y1: 2, y2: 16, class: "axis", "stroke-width": 2 });
    draw_svg("title", svg, {}, words);
    if (D.heads.some((each) => each.against && each.against.difference)) {
      for (const [key, digits] of [["pcc", 3], ["mse", 4]]) {
        const of = head.against && head.against.difference ? head.against.difference[key] : null;
        const sign = (v) => (v > 0 ? "+" : "") + shown(v, digits);
        const chance = of && of.p !== null && of.p !== undefined ? `, p ${shown(of.p, 3)}` : "";
        const cell = make("td", of && of.mean !== null ? sign(of.mean) : "", row);
        if (of && of.mean !== null && of.low !== null) make("span", `${sign(of.low)} to ${sign(of.high)}${chance}`, cell, { class: "under" });
      }
    }
  });
  const rows = make("table", null, at("folds"));
  const head = make("tr", null, make("thead", null, rows));
  ["Head, fold", ...[...FIGURES, SECONDS].map(([, title]) => title), "slides", "spots", "genes", "PCC undefined"].forEach((title) => make("th", title, head, { scope: "col" }));
  const all = make("tbody", null, rows);
  D.heads.forEach((each, i) => each.folds.forEach((fold) => {
    const row = make("tr", null, all, i ? {} : { class: "own" });
    make("th", `${each.name}, ${fold.fold}`, row, { scope: "row" });
    [...FIGURES, SECONDS].forEach(([key, , digits]) => make("td", shown(fold[key], digits), row));
    [fold.slides, fold.n_spots, fold.n_genes, fold.n_genes_pcc_undefined ?? "–"].forEach((value) => make("td", value, row));
  }));
}

// ---- training curves
const HUES = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#a07800", "#8a63d2", "#7f7f7f"];
const DASHES = { choose: "5 4" };
const PHASES = { choose: "choosing epochs", train: "training" };

function drawCurves() {
  if (!D.history.length) { at("training").hidden = true; return; }
  const folds = [...new Set(D.history.map((curve) => curve.fold))];
  const hue = (fold) => HUES[folds.indexOf(fold) % HUES.length];
  chart("loss", "loss", "loss", hue);
  const any = chart("pcc", "pcc", "PCC", hue);
  at("watched").textContent = `PCC by epoch on ${D.watched}; a ring: the epoch that was chosen`;
  at("watched").parentElement.hidden = !any;
  const legend = at("legend");
  legend.replaceChildren();
  const entry = (text, colour, style) => {
    const item = make("span", null, legend);
    const line = make("i", null, item);
    line.style.borderTopColor = colour;
    line.style.borderTopStyle = style;
    make("span", text, item);
  };
  if (folds.length <= HUES.length) folds.forEach((fold) => entry(fold, hue(fold), "solid"));
  else make("span", `${folds.length} folds; colours repeat`, legend);
  const phases = [...new Set(D.history.map((curve) => curve.phase))].filter((phase) => phase);
  if (phases.length > 1) phases.forEach((phase) => entry(PHASES[phase] || phase, "#7f7f7f", DASHES[phase] ? "dashed" : "solid"));
}

// Axes in a box of the page; returns what places a point on them.
function axes(box, label, [x0, x1], [y0, y1], title, whole) {
  box.replaceChildren();
  const width = Math.max(240, box.clientWidth), height = Math.round(Math.min(300, width * 0.6));
  const svg = draw_svg("svg", box, { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": label });
  const [left, bottom, top, right] = [48, 36, 8, 8];
  const X = (v) => left + ((v - x0) / (x1 - x0)) * (width - left - right);
  const Y = (v) => height - bottom - ((v - y0) / (y1 - y0)) * (height - bottom - top);
  for (const mark of ticks(y0, y1, 4)) {
    draw_svg("line", svg, { x1: left, x2: width - right, y1: Y(mark), y2: Y(mark), class: "grid" });
    draw_svg("text", svg, { x: left - 6, y: Y(mark) + 4, "text-anchor": "end" }, short(mark));
  }
  for (const mark of ticks(x0, x1, 5)) {
    if (!whole || Number.isInteger(mark)) draw_svg("text", svg, { x: X(mark), y: height - bottom + 16, "text-anchor": "middle" }, short(mark));
  }
  draw_svg("text", svg, { x: (left + width - right) / 2, y: height - 3, "text-anchor": "middle" }, title);
  return { svg, X, Y };
}

function chart(id, key, title, hue) {
  const points = (curve) => curve.epoch.map((epoch, i) => [epoch, curve[key][i]]).filter(([, value]) => value !== null);
  const curves = D.history.map((curve) => ({ ...curve, points: points(curve) })).filter((curve) => curve.points.length);
  if (!curves.length) { at(id).replaceChildren(); return false; }
  const every = curves.flatMap((curve) => curve.points);
  const last = Math.max(...every.map(([epoch]) => epoch), 2);
  const { svg, X, Y } = axes(at(id), `${title} by epoch, one line per fold`, [1, last], range(every.map(([, value]) => value)), "epoch", true);
  for (const curve of curves) {
    const line = curve.points.map(([epoch, value]) => `${X(epoch).toFixed(1)},${Y(value).toFixed(1)}`).join(" ");
    const style = { fill: "none", stroke: hue(curve.fold), "stroke-width": 1.6, "stroke-dasharray": DASHES[curve.phase] || "none" };
    if (curve.points.length > 1) draw_svg("polyline", svg, { points: line, ...style });
    else draw_svg("circle", svg, { cx: line.split(",")[0], cy: line.split(",")[1], r: 3, fill: hue(curve.fold) });
    const chosen = curve.chosen && curve.points.find(([epoch]) => epoch === curve.chosen);
    if (chosen) draw_svg("circle", svg, { cx: X(chosen[0]), cy: Y(chosen[1]), r: 5, fill: "none", stroke: hue(curve.fold), "stroke-width": 2, class: "chosen" });
  }
  return true;
}

function drawCalibration() {
  const of = D.calibration;
  if (!of) { at("calibration").hidden = true; return; }
  const { svg, X, Y } = axes(at("coverage"), "Share of held-out values that intervals of each level covered", [0.4, 1], [0.4, 1], "level of the interval", false);
  draw_svg("line", svg, { x1: X(0.4), y1: Y(0.4), x2: X(1), y2: Y(1), class: "axis", "stroke-dasharray": "5 4" });
  of.levels.forEach(({ level, reached }) => {
    draw_svg("circle", svg, { cx: X(level), cy: Y(Math.max(0.4, reached)), r: 5, class: "dot" });
    draw_svg("text", svg, { x: X(level) - 8, y: Y(Math.max(0.4, reached)) - 8, "text-anchor": "end" }, `${Math.round(100 * reached)} %`);
  });
  const few = of.levels.filter(({ promised }) => !promised).map(({ level }) => `${Math.round(100 * level)} %`);
  at("coverage-words").textContent = `The intervals on this page are of what was off on ${of.groups} ${of.by}s held out, for ${of.genes} genes. They cover these shares`
    + ` of the values of a new ${of.by}, found by leaving one of the ${of.groups} out at a time (n = ${of.groups})`
    + `: ${of.levels.map(({ level, reached }) => `${(100 * reached).toFixed(1)} % at ${Math.round(100 * level)} %`).join(", ")}.`
    + (few.length ? ` ${few.join(" and ")}: not promised (${of.groups} ${of.by}s).` : "");
}
