// Everything once, then again where the reader changes something.
const SECTIONS = { loss: data.lines.length, ablation: data.ablations.length, tuning: data.tuning.length, runs: 1,
  differences: data.tables["difference-table"].columns.length > 1, diagnostics: data.diagnostics.length,
  schedules: data.schedules.length + data.problems.length };
const DRAW = { loss: () => { drawLegend(); drawLosses(); }, ablation: drawAblations, tuning: drawTuning,
  diagnostics: drawDiagnostics, schedules: drawSchedules };
const shown = Object.keys(SECTIONS).filter((id) => SECTIONS[id] && (!only || only === id));

function choice(fieldset, name, options) {
  byId(fieldset).append(...Object.entries(options).map(([value, words], i) => element("label", {},
    element("input", { type: "radio", name, value, ...(i === 0 ? { checked: "" } : {}) }), words)));
  byId(fieldset).hidden = Object.keys(options).length < 2;
}

function readControls() {
  const form = new FormData(byId("controls"));
  Object.assign(state, { axis: form.get("axis") || state.axis, unit: form.get("unit") || state.unit, logx: form.has("logx"),
    logy: form.has("logy"), smoothing: Number(form.get("smoothing")) });
  byId("controls").elements.weight.value = state.smoothing.toFixed(2);
  drawLosses();
}

function hideAll(hide) {
  state.hidden = new Set(hide ? data.experiments.keys() : []);
  drawLegend();
  drawLosses();
}

function repaint() {
  paint();
  shown.forEach((id) => DRAW[id]?.());
}

function start() {
  if (only) { // a browser without a window takes its size late: the picture's height is told
    root.dataset.figure = only;
    root.style.setProperty("--picture-height", `${address.get("height")}px`);
  }
  document.querySelectorAll("main > section").forEach((section) => { section.hidden = !shown.includes(section.id); });
  byId("contents").append(...shown.map((id) => element("a", { href: `#${id}` }, byId(`${id}-title`).textContent)));
  choice("axis", "axis", Object.fromEntries(data.axes.map((axis) => [axis, AXES[axis][0]])));
  const units = ["val", "bits"].filter((unit) => data.lines.some((line) => line[unit]));
  choice("unit", "unit", Object.fromEntries(units.map((unit) => [unit, UNITS[unit]])));
  state.unit = units[0] || "val";
  byId("diagnosed").append(...data.diagnostics.map(({ name }, i) => element("option", { value: i }, name)));
  byId("experiment-table").hidden = data.experiments.every(({ runs }) => runs === 1); // the table of runs says it all
  ["experiment-table", "run-table"].forEach((id) => drawTable(id, false));
  drawTable("difference-table", true);
  repaint();
}

start();
byId("controls").addEventListener("input", readControls);
byId("diagnosed").addEventListener("change", drawDiagnostics);
byId("all").addEventListener("click", () => hideAll(false));
byId("none").addEventListener("click", () => hideAll(true));
byId("theme").addEventListener("click", () => { nextTheme(); repaint(); });
dark.addEventListener("change", repaint);
