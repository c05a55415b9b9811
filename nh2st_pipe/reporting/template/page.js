// ---- the page: what is said, what is chosen, and the keys
function heading() {
  document.title = `${D.run} – nh2st-pipe report`;
  at("title").textContent = !D.head || D.run === D.head ? D.run : `${D.run}: ${D.head}`;
  at("about").textContent = D.about;
  const { figure, sentences } = D.verdict;
  if (figure) {
    make("b", `PCC ${shown(figure.pcc, 3)}`, at("headline"));
    if (figure.interval) make("span", `95 % interval ${shown(figure.interval[0], 3)} to ${shown(figure.interval[1], 3)} over ${figure.over}`, at("headline"));
    if (figure.genes) make("span", figure.genes, at("headline"));
    if (figure.mse !== null && figure.mse !== undefined) make("span", `MSE ${shown(figure.mse, 4)}`, at("headline"));
  } else at("headline").hidden = true;
  sentences.forEach((words) => make("li", words, at("sentences")));
  D.warnings.forEach((words) => make("p", words, at("warnings"), { class: "warning", role: "note" }));
  definitions("facts", D.facts);
  definitions("provenance", D.provenance);
  at("recipe").textContent = D.recipe;
  at("recipe-box").hidden = !D.recipe;
}

// Gene and slide stand in the address, so that what is seen can be sent.
let written = "";
function remember() {
  if (state.gene === null) return;
  const words = new URLSearchParams({ gene: D.genes.names[state.gene], slide: D.slides[state.slide].id });
  written = `#${words}`;
  try { history.replaceState(null, "", written); } catch (error) { /* a page inside another may not */ }
}
function recall() {
  const words = new URLSearchParams(location.hash.slice(1));
  const notes = [];
  if (words.has("slide")) {
    const s = D.slides.findIndex((slide) => slide.id === words.get("slide"));
    if (s >= 0) state.slide = s;
    else notes.push(`This page has no slide ${words.get("slide")}.`);
  }
  at("slide").value = String(state.slide);
  let gene = null;
  if (words.has("gene")) {
    const g = D.genes.names.indexOf(words.get("gene"));
    if (g >= 0) gene = g;
    else {
      const near = nearestNames(words.get("gene"), D.genes.names);
      notes.push(`This page has no gene ${words.get("gene")}${near.length ? `; nearest: ${near.join(", ")}` : ""}.`);
    }
  }
  at("warnings").querySelectorAll(".asked").forEach((note) => note.remove());
  notes.forEach((note) => make("p", note, at("warnings"), { class: "warning asked", role: "alert" }));
  return gene;
}

function chooseSlide(s) {
  state.slide = Math.max(0, Math.min(D.slides.length - 1, s));
  state.spot = null;
  state.view = { k: 1, x: 0.5, y: 0.5 };
  at("slide").value = String(state.slide);
  remember();
  draw();
}

function toggleTissue() { state.tissue = !state.tissue; at("tissue").setAttribute("aria-pressed", String(state.tissue)); draw(); }
function toggleMask() { state.mask = !state.mask; at("mask").setAttribute("aria-pressed", String(state.mask)); draw(); }

function explorer() {
  if (!D.slides.length) { at("explore").hidden = true; return; }
  geneTable();
  D.slides.forEach((slide, s) => make("option", slide.patient && slide.patient !== slide.id
    ? `${slide.id} (patient ${slide.patient})` : slide.id, at("slide"), { value: s }));
  at("slide").addEventListener("change", () => chooseSlide(Number(at("slide").value)));
  at("scale").addEventListener("change", () => { state.scale = at("scale").value; draw(); });
  at("opacity").addEventListener("input", draw);
  at("tissue").addEventListener("click", toggleTissue);
  at("mask").addEventListener("click", toggleMask);
  at("mask").hidden = !D.genes.trusted.length && !D.slides.some((slide) => slide.unlike.length);
  at("in").addEventListener("click", () => zoom(1.5));
  at("out").addEventListener("click", () => zoom(1 / 1.5));
  at("whole").addEventListener("click", whole);
  at("png").addEventListener("click", savePng);
  at("csv").addEventListener("click", saveCsv);
  at("which").addEventListener("change", drawMultiples);
  at("multiples-box").addEventListener("toggle", drawMultiples);
  listenScatter();
  const asked = recall();
  const slide = D.slides[state.slide];
  const first = asked ?? geneOrder.find((g) => slide.genes.includes(g)) ?? geneOrder[0];
  if (first !== undefined) choose(first);
  window.addEventListener("hashchange", () => {
    if (location.hash === written) return;
    const gene = recall();
    choose(gene ?? state.gene);
  });
}

function keys() {
  const plain = { j: () => stepGene(1), k: () => stepGene(-1), h: toggleTissue, m: toggleMask, "+": () => zoom(1.5), "=": () => zoom(1.5), "-": () => zoom(1 / 1.5), 0: whole, "[": () => chooseSlide(state.slide - 1), "]": () => chooseSlide(state.slide + 1) };
  let letters = true;  // what one presses by mistake, or a voice says, can be switched off
  try { letters = localStorage.getItem("nh2st-letters") !== "off"; } catch (error) { /* opened from disk, some browsers keep nothing */ }
  at("letters").checked = letters;
  at("letters").addEventListener("change", () => {
    letters = at("letters").checked;
    try { localStorage.setItem("nh2st-letters", letters ? "on" : "off"); } catch (error) { /* as above */ }
  });
  document.addEventListener("keydown", (event) => {
    if (!letters) return;
    if (event.ctrlKey || event.metaKey || event.altKey || !D.slides.length) return;
    const typing = event.target.matches("input:not([type=range]), select, textarea");
    if (event.key === "/" && !typing) { event.preventDefault(); at("search").focus(); return; }
    const act = plain[event.key.length === 1 ? event.key.toLowerCase() : event.key];
    if (act && !typing) { event.preventDefault(); act(); }
  });
  at("help").addEventListener("click", () => {
    at("keys").hidden = !at("keys").hidden;
    at("help").setAttribute("aria-expanded", String(!at("keys").hidden));
  });
}

function theme() {
  const dark = window.matchMedia("(prefers-color-scheme: dark)");
  const set = (to) => {
    document.documentElement.dataset.theme = to;
    at("theme").textContent = to === "dark" ? "Light" : "Dark";
    if (current && current.found) { drawMaps(); drawBars(); drawScatter(); drawMultiples(); }
  };
  let own = null;
  try { own = localStorage.getItem("nh2st-theme"); } catch (error) { /* opened from disk, some browsers keep nothing */ }
  set(own || (dark.matches ? "dark" : "light"));
  dark.addEventListener("change", () => { if (!own) set(dark.matches ? "dark" : "light"); });
  at("theme").addEventListener("click", () => {
    own = document.documentElement.dataset.theme === "dark" ? "light" : "dark";
    try { localStorage.setItem("nh2st-theme", own); } catch (error) { /* as above */ }
    set(own);
  });
}

theme();
heading();
headTables();
explorer();
drawOverGenes();
drawCurves();
drawCalibration();
keys();
at("loading").hidden = true;
let bodyWidth = document.body.clientWidth;
window.addEventListener("resize", () => {
  if (document.body.clientWidth === bodyWidth) return;  // a phone's address bar came or went
  bodyWidth = document.body.clientWidth;
  draw();
  drawOverGenes();
  drawCurves();
  drawCalibration();
});
