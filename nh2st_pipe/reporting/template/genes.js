// ---- the gene table: sortable, searchable; so many rows at a time
const PAGE = 300;
let geneOrder = [];
let geneBody = null, geneColumns = [], geneShown = PAGE;
const geneRow = new Map();

const trustedGene = (g) => (D.genes.trusted.length ? D.genes.trusted[g] : null);

function geneTable() {
  const known = D.genes.trusted.length > 0;
  geneColumns = [
    { label: "Gene", words: "Gene", value: (g) => D.genes.names[g] },
    ...(known ? [{ label: "trusted", words: `Trusted: ${D.trust || "the verdict of the version that made it"}`, value: (g) => (D.genes.trusted[g] === null ? null : Number(D.genes.trusted[g])), text: (v) => (v === null ? "not judged" : v ? "yes" : "no") }] : []),
    ...D.genes.columns.map((column) => ({ ...column, value: (g) => column.values[g] })),
  ];
  const sorted = geneColumns.findIndex((column) => column.key === D.genes.sort);
  [state.column, state.up] = [Math.max(0, sorted), sorted < 0];  // by name where there is no such column
  const table = make("table", null, at("genes"), { "aria-label": "Genes", role: "grid" });
  const headRow = make("tr", null, make("thead", null, table));
  geneColumns.forEach((column, c) => {
    column.cell = make("th", null, headRow, { scope: "col" });
    make("button", column.label, column.cell, { type: "button", title: `${column.words}; sort` }).addEventListener("click", () => {
      state.up = state.column === c ? !state.up : c === 0;
      state.column = c;
      sortGenes();
    });
    if (column.bar) {
      const values = column.values.filter((v) => v !== null);
      column.most = Math.max(1e-9, ...values);
    }
  });
  geneBody = make("tbody", null, table);
  geneOrder = D.genes.names.map((_, g) => g);
  at("genes-note").textContent = `${D.genes.columns.filter((column) => column.note).map((column) => `${column.label}: ${column.words}`).join(". ")}. ${known ? `Struck through: not to be trusted. A gene is trusted where ${D.trust || "an earlier version said so"}. Not judged: too few slides or patients for a verdict either way. ` : ""}${Object.keys(D.sets).length ? "Sets of genes stand last: search for set. " : ""}Choose with a click, or with ↑ and ↓.`;
  at("search").addEventListener("input", () => { geneShown = PAGE; fillGenes(); });
  at("search").addEventListener("keydown", (event) => {
    if (event.key === "Enter" || event.key === "ArrowDown") {
      const first = visibleGenes()[0];
      if (first !== undefined) { event.preventDefault(); choose(first, true); }
    } else if (event.key === "Escape") { at("search").value = ""; fillGenes(); }
  });
  geneBody.addEventListener("keydown", (event) => {
    const step = { ArrowDown: 1, ArrowUp: -1 }[event.key];
    if (step) { event.preventDefault(); stepGene(step, true); }
  });
  geneBody.addEventListener("click", (event) => {
    const row = event.target.closest("tr");
    if (row) choose(Number(row.dataset.gene));
  });
  at("more").addEventListener("click", () => { geneShown += PAGE; fillGenes(); });
  sortGenes();
}

// What is searched for: names or parts of them, with commas or spaces between several.
const wantedGenes = () => at("search").value.toLowerCase().split(/[\s,;]+/).filter(Boolean);
function visibleGenes() {
  const wanted = wantedGenes();
  return geneOrder.filter((g) => !wanted.length || wanted.some((part) => D.genes.names[g].toLowerCase().includes(part)));
}
// Parts that no gene has, each with the names that are nearest.
function missedGenes() {
  const names = D.genes.names.map((name) => name.toLowerCase());
  return wantedGenes().filter((part) => !names.some((name) => name.includes(part))).map((part) => {
    const near = nearestNames(part, D.genes.names);
    return `${part}${near.length ? ` (nearest: ${near.join(", ")})` : ""}`;
  });
}

function sortGenes() {
  const { value } = geneColumns[state.column] || geneColumns[0];
  const order = state.up ? 1 : -1;
  geneOrder.sort((a, b) => {
    const [x, y] = [value(a), value(b)];
    if (x === null || y === null) return (x === null) - (y === null) || a - b;  // what is undefined stays last
    return order * (typeof x === "string" ? x.localeCompare(y) : x - y) || a - b;
  });
  geneColumns.forEach((column, c) => {
    const on = c === state.column;
    column.cell.setAttribute("aria-sort", on ? (state.up ? "ascending" : "descending") : "none");
    column.cell.firstChild.textContent = column.label + (on ? (state.up ? " ▲" : " ▼") : "");
  });
  fillGenes();
}

function fillGenes() {
  const known = D.genes.trusted.length > 0;
  const visible = visibleGenes();
  const rows = visible.slice(0, geneShown).map((g) => {
    if (!geneRow.has(g)) {
      const row = make("tr", null, null, { "data-gene": g, "aria-selected": "false" });
      if (trustedGene(g) === false) row.className = "untrusted";
      else if (known && trustedGene(g) === null) row.className = "unjudged";
      make("button", D.genes.names[g], make("td", null, row), { type: "button", tabindex: "-1", title: D.genes.names[g] });
      geneColumns.slice(1).forEach((column) => {
        const v = column.value(g);
        const cell = make("td", column.text ? column.text(v) : shown(v, column.digits), row);
        if (column.bar) { cell.className = "bar"; cell.style.setProperty("--part", `${Math.max(0, (100 * (v || 0)) / column.most)}%`); }
      });
      geneRow.set(g, row);
    }
    return geneRow.get(g);
  });
  geneBody.replaceChildren(...rows);
  const missed = missedGenes();
  at("found").textContent = `${visible.length} of ${geneOrder.length} genes${missed.length ? `; none is called ${missed.join(", ")}` : ""}`;
  at("more").hidden = visible.length <= geneShown;
  markGene(false);
}

function markGene(focus) {
  geneRow.forEach((row, g) => {
    row.setAttribute("aria-selected", String(g === state.gene));
    row.querySelector("button").tabIndex = g === state.gene ? 0 : -1;
  });
  const row = geneRow.get(state.gene);
  if (!row || !row.isConnected) return;
  const box = at("genes"), top = row.offsetTop - row.offsetHeight;  // the header stands above it
  if (top < box.scrollTop) box.scrollTop = top;
  else if (row.offsetTop + row.offsetHeight > box.scrollTop + box.clientHeight) box.scrollTop = row.offsetTop + row.offsetHeight - box.clientHeight;
  if (focus) row.querySelector("button").focus({ preventScroll: true });
}

function stepGene(step, focus) {
  const visible = visibleGenes();
  const here = visible.indexOf(state.gene);
  const next = visible[Math.min(visible.length - 1, Math.max(0, here + step))];
  if (next === undefined) return;
  if (visible.indexOf(next) >= geneShown) { geneShown += PAGE; fillGenes(); }
  choose(next, focus);
}

function choose(gene, focus = false) {
  state.gene = gene;
  state.spot = null;
  markGene(focus);
  remember();
  draw();
}
