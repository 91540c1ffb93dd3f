// The page's state, colours, legend and tables. Figures are in figures.js.
const data = JSON.parse(document.getElementById("data").textContent);
const root = document.documentElement;
const byId = (id) => document.getElementById(id);
const address = new URLSearchParams(location.hash.slice(1));
const only = address.get("figure"); // one section alone: for pictures
const state = { axis: data.axes[0], unit: "val", logx: false, logy: false, smoothing: 0.6, hidden: new Set() };

// ---- Elements and numbers ----

function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...children);
  return made;
}

function prefixed(value, prefixes, base) {
  let power = 0;
  while (Math.abs(value) >= base && power < prefixes.length - 1) { value /= base; power += 1; }
  return `${Number(value.toPrecision(3))} ${prefixes[power]}`.trim();
}

function duration(seconds) {
  if (seconds < 100) return `${Number(seconds.toPrecision(3))} s`;
  if (seconds < 7200) return `${(seconds / 60).toFixed(1)} min`;
  return `${(seconds / 3600).toFixed(2)} h`;
}

const spell = {
  text: (value) => String(value),
  number: (value) => Math.abs(value) >= 0.001 || value === 0 ? value.toFixed(4) : value.toExponential(2),
  count: (value) => Math.round(value).toLocaleString("en"),
  si: (value) => prefixed(value, ["", "k", "M", "G", "T"], 1000),
  bytes: (value) => prefixed(value, ["B", "KiB", "MiB", "GiB", "TiB"], 1024),
  seconds: duration,
  tick: (value) => value >= 1e5 || value < 1e-3 ? value.toExponential(0) : String(value),
};

// ---- Theme ----

const dark = matchMedia("(prefers-color-scheme: dark)");
let chosen = "auto";
try { chosen = localStorage.getItem("theme") || "auto"; } catch { /* no storage: the system decides */ }

const color = (name) => getComputedStyle(root).getPropertyValue(`--${name}`).trim();

function paint() {
  const theme = only ? "light" : chosen === "auto" ? (dark.matches ? "dark" : "light") : chosen;
  root.dataset.theme = theme;
  byId("theme").textContent = `Theme: ${chosen}`;
}

function nextTheme() {
  const themes = ["auto", "light", "dark"];
  chosen = themes[(themes.indexOf(chosen) + 1) % themes.length];
  try { localStorage.setItem("theme", chosen); } catch { /* as above */ }
}

// ---- Experiments: one colour and dash each; where there are too many to tell apart, the best in colour ----

const COLORS = 7, DASHES = ["solid", "dash", "dot", "dashdot"];
const crowded = data.experiments.length > COLORS * DASHES.length;
const order = data.experiments.map((_, i) => i)
  .sort((a, b) => (data.experiments[a].loss ?? Infinity) - (data.experiments[b].loss ?? Infinity) || a - b);
const place = new Map((crowded ? order : [...order].sort((a, b) => a - b)).map((experiment, i) => [experiment, i]));

function style(experiment) {
  const rank = place.get(experiment);
  if (crowded && rank >= COLORS) return { color: color("faint"), dash: "solid" };
  return { color: color(`c${rank % COLORS}`), dash: DASHES[Math.floor(rank / COLORS)] };
}

function swatch(experiment) {
  const { color: stroke, dash } = style(experiment);
  const dashes = { solid: "", dash: "6 3", dot: "2 2", dashdot: "6 2 2 2" }[dash];
  const holder = element("span");
  holder.innerHTML = `<svg width="20" height="8" aria-hidden="true"><line x1="0" y1="4" x2="20" y2="4" stroke="${stroke}"
    stroke-width="2.5" stroke-dasharray="${dashes}"/></svg>`;
  return holder.firstChild;
}

function drawLegend() {
  const told = only && crowded ? order.slice(0, COLORS) : order; // a picture does not scroll
  byId("legend").replaceChildren(...told.map((experiment) => {
    const { name, runs, loss } = data.experiments[experiment];
    const outcome = [loss === null ? "" : spell.number(loss), runs > 1 ? `n=${runs}` : ""].filter(Boolean).join(", ");
    const button = element("button", { type: "button", "aria-pressed": !state.hidden.has(experiment) }, swatch(experiment),
      element("span", {}, name), element("span", { class: "quiet" }, outcome));
    button.addEventListener("click", () => {
      state.hidden[state.hidden.has(experiment) ? "delete" : "add"](experiment);
      button.setAttribute("aria-pressed", !state.hidden.has(experiment));
      drawLosses();
    });
    return button;
  }));
}

// ---- Tables ----

const compare = (a, b) => typeof a === "number" && typeof b === "number" ? a - b
  : String(a).localeCompare(String(b), "en", { numeric: true });

function sorted(rows, column, direction) { // what is not known stays last either way
  const known = (row) => row[column] !== null;
  return [...rows].sort((a, b) => known(b) - known(a) || (known(a) ? direction * compare(a[column], b[column]) : 0));
}

function usualValue(values) { // what at least half of them are; undefined where there is no such value
  const counts = new Map();
  for (const value of values) counts.set(value, (counts.get(value) || 0) + 1);
  const [value, count] = [...counts].reduce((best, one) => one[1] > best[1] ? one : best);
  return count > 1 && 2 * count >= values.length ? value : undefined;
}

function fillBody(body, { columns, rows }, usual) {
  body.replaceChildren(...rows.map((row) => element("tr", {}, ...row.map((value, i) => {
    const { kind } = columns[i];
    const cell = element("td", kind === "text" && typeof value !== "number" ? { class: "text" } : {});
    cell.textContent = value === null ? "–" : spell[kind](value);
    if (typeof value === "string") cell.title = value;
    if (usual && i > 0 && usual[i] !== undefined && value !== usual[i]) cell.classList.add("odd");
    return cell;
  }))));
}

function drawTable(id, marked) {
  const table = data.tables[id];
  const usual = marked && table.columns.map((_, i) => usualValue(table.rows.map((row) => row[i])));
  const body = element("tbody");
  const heads = table.columns.map(({ label, kind }, i) => {
    const button = element("button", { type: "button" }, label);
    const head = element("th", { scope: "col", class: kind === "text" ? "text" : "", "aria-sort": "none" }, button);
    button.addEventListener("click", () => {
      const direction = head.getAttribute("aria-sort") === "ascending" ? "descending" : "ascending";
      heads.forEach((other) => other.setAttribute("aria-sort", other === head ? direction : "none"));
      fillBody(body, { ...table, rows: sorted(table.rows, i, direction === "ascending" ? 1 : -1) }, usual);
    });
    return head;
  });
  fillBody(body, table, usual);
  byId(id).replaceChildren(element("table", {}, element("thead", {}, element("tr", {}, ...heads)), body));
}
