// The figures: each draw function can be called again, after a change of state or theme.
const CONFIG = { responsive: true, displaylogo: false, modeBarButtonsToRemove: ["lasso2d", "select2d", "autoScale2d"],
  displayModeBar: only ? false : undefined, toImageButtonOptions: { scale: 2 } };
const dragmode = matchMedia("(pointer: coarse)").matches ? false : "zoom"; // on a phone, dragging scrolls the page

// Deep enough for what we need: options of an axis are added to its common ones.
function layout({ xaxis = {}, yaxis = {}, ...rest } = {}) {
  const axis = { gridcolor: color("grid"), linecolor: color("rule"), zerolinecolor: color("rule"), automargin: true,
    ticks: "outside", tickcolor: color("rule"), ticklen: 4 };
  return {
    font: { family: "system-ui, sans-serif", size: 12, color: color("ink") },
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", margin: { l: 52, r: 14, t: 12, b: 42 },
    hoverlabel: { bgcolor: color("panel"), bordercolor: color("rule"), font: { color: color("ink") }, namelength: -1 },
    showlegend: false, hovermode: "closest", dragmode,
    xaxis: { ...axis, ...xaxis }, yaxis: { ...axis, ...yaxis }, ...rest,
  };
}

function plot(target, traces, options) {
  return Plotly.react(typeof target === "string" ? byId(target) : target, traces, layout(options), CONFIG);
}

function panel(container, caption, height) {
  const target = element("div", { class: "plot" });
  if (height) target.style.height = `${height}px`;
  container.append(element("figure", {}, element("figcaption", {}, caption), target));
  return target;
}

// ---- Losses ----

const AXES = { step: ["steps", "step"], tokens: ["tokens", "training tokens"], train_seconds: ["time", "training time"],
  flops: ["FLOPs", "training FLOPs"] };
const UNITS = { val: "nats per token", bits: "bits per byte", train: "nats per token" };

function timeUnit() {
  const ends = data.lines.map((line) => (line.val || line.train)?.train_seconds.at(-1) ?? 0);
  const longest = Math.max(0, ...ends);
  return longest > 7200 ? [3600, "hours"] : longest > 300 ? [60, "minutes"] : [1, "seconds"];
}

function abscissa(curve) {
  const divisor = state.axis === "train_seconds" ? timeUnit()[0] : 1;
  return divisor === 1 ? curve[state.axis] : curve[state.axis].map((x) => x / divisor);
}

function smooth(values, weight) { // an exponential mean, corrected for its start at zero
  let mean = 0, mass = 0;
  return values.map((value) => {
    mean = weight * mean + (1 - weight) * value;
    mass = weight * mass + 1 - weight;
    return mean / mass;
  });
}

function faded(hex, alpha) {
  return hex + Math.round(255 * alpha).toString(16).padStart(2, "0");
}

function lossTraces(loss) {
  const weight = loss === "train" ? state.smoothing : 0;
  const averaged = new Set(data.lines.filter((line) => line.mean).map((line) => line.experiment));
  const behind = (line) => crowded && place.get(line.experiment) >= COLORS ? 0 : line.mean ? 2 : 1;
  return data.lines.filter((line) => line[loss]?.[state.axis]).sort((a, b) => behind(a) - behind(b)).flatMap((line) => {
    const curve = line[loss], { color: stroke, dash } = style(line.experiment), x = abscissa(curve);
    const visible = !state.hidden.has(line.experiment), faint = !line.mean && averaged.has(line.experiment);
    const common = { x, visible, name: line.name, meta: { experiment: line.experiment } };
    const drawn = { ...common, y: smooth(curve.y, weight), mode: "lines", opacity: faint ? 0.35 : 1,
      line: { color: stroke, dash, width: faint ? 1 : crowded ? 1.2 : 2 },
      hovertemplate: `%{y:.4f} ${UNITS[loss]}<br>%{x:.4s} ${axisWords()}<extra>%{fullData.name}</extra>` };
    if (!line.mean) return [drawn];
    const band = { ...common, x: [...x, ...[...x].reverse()],
      y: [...smooth(curve.low, weight), ...smooth(curve.high, weight).reverse()],
      fill: "toself", fillcolor: faded(stroke, 0.15), hoverinfo: "skip", mode: "lines", line: { width: 0 } };
    return [band, drawn];
  });
}

function axisWords() {
  return state.axis === "train_seconds" ? timeUnit()[1] : AXES[state.axis][0];
}

function lossNote() {
  const means = data.lines.some((line) => line.mean);
  const unknown = data.lines.filter((line) => !(line.val || line.train)?.[state.axis]).length;
  return [means ? "Bold: the mean over seeds; shaded: from the least to the greatest." : "",
    unknown ? `Not drawn: ${unknown} of ${data.lines.length} lines, whose ${AXES[state.axis][0]} are not known.` : ""]
    .join(" ").trim();
}

function drawLosses() {
  byId("loss-note").textContent = lossNote();
  const xTitle = state.axis === "train_seconds" ? `training time (${timeUnit()[1]})` : AXES[state.axis][1];
  const xaxis = { title: { text: xTitle }, type: state.logx ? "log" : "linear",
    tickformat: state.axis === "train_seconds" ? "" : "~s", nticks: 8 };
  const yaxis = { type: state.logy ? "log" : "linear", nticks: 10 };
  const targets = state.unit === "val" ? data.targets : [];
  const shapes = targets.map((y) => ({ type: "line", xref: "paper", x0: 0, x1: 1, y0: y, y1: y,
    line: { color: color("quiet"), width: 1, dash: "dot" } }));
  byId("validation-caption").replaceChildren("Validation loss ", element("small", {}, `(${UNITS[state.unit]})`));
  byId("training-caption").replaceChildren("Training loss ", element("small", {}, `(${UNITS.train})`));
  plot("validation-plot", lossTraces(state.unit), { xaxis, yaxis, shapes });
  plot("training-plot", lossTraces("train"), { xaxis, yaxis });
}

// ---- Ablations ----

function drawAblations() {
  const container = byId("ablation-figures");
  container.replaceChildren();
  for (const { title, unit, rows } of data.ablations) {
    const shown = [...rows].sort((a, b) => a.difference - b.difference); // the greatest on top: bars count from below
    const wide = container.clientWidth > 600;
    const hue = ({ verdict }) => color({ helps: "c0", hurts: "c1" }[verdict.slice(0, 5)] || "faint");
    const reach = (row) => row.high === null ? [0, 0] : [row.high - row.difference, row.difference - row.low];
    const bars = { type: "bar", orientation: "h", x: shown.map((row) => row.difference), y: shown.map((row) => row.name),
      width: 0.6, marker: { color: shown.map(hue) },
      customdata: shown.map(({ low, high, p_holm, n, verdict }) => [low, high, p_holm, n, verdict]),
      error_x: { type: "data", array: shown.map((row) => reach(row)[0]), arrayminus: shown.map((row) => reach(row)[1]),
        color: color("ink"), thickness: 1.3, width: 4 },
      hovertemplate: `%{x:+.4f} ${unit}<br>95 %: %{customdata[0]:+.4f} to %{customdata[1]:+.4f}<br>` +
        "Holm's p %{customdata[2]:.2g}, n=%{customdata[3]}<br>%{customdata[4]}<extra>%{y}</extra>" };
    const notes = shown.map((row) => ({ xref: "paper", x: 1.01, xanchor: "left", y: row.name, showarrow: false,
      font: { color: color("quiet") },
      text: `${row.difference > 0 ? "+" : ""}${row.difference.toFixed(4)}  ${row.verdict.split(/[;:]/)[0]}` }));
    plot(panel(container, title, 90 + 28 * shown.length), [bars], {
      xaxis: { title: { text: `difference (${unit})` }, zeroline: true, zerolinecolor: color("ink"), nticks: wide ? 10 : 5 },
      yaxis: { ticks: "", showgrid: false }, margin: { l: 10, r: wide ? 210 : 14, t: 6, b: 42 },
      annotations: wide ? notes : [] });
  }
}

// ---- Tuning ----

function logTicks(values) { // 1, 2 and 5 of each power of ten; fewer where there are many powers
  const low = Math.floor(Math.log10(Math.min(...values))), high = Math.ceil(Math.log10(Math.max(...values)));
  const powers = Array.from({ length: high - low + 1 }, (_, i) => low + i);
  const digits = powers.length > 3 ? [1] : [1, 2, 5];
  const tickvals = powers.flatMap((power) => digits.map((digit) => Number(`${digit}e${power}`)));
  return { tickvals, ticktext: tickvals.map((value) => spell.tick(value)) };
}

function drawTuning() {
  const container = byId("tuning-figures");
  container.replaceChildren();
  for (const { setting, log, joined, lines } of data.tuning) {
    const traces = lines.map(({ label, x, y, low, high, n }, i) => {
      const stroke = color(`c${i % COLORS}`);
      return { x, y, customdata: n, name: label || setting, mode: joined ? "lines+markers" : "markers",
        line: { color: stroke, width: 1.6, dash: DASHES[Math.floor(i / COLORS) % DASHES.length] },
        marker: { color: stroke, size: 7, opacity: joined ? 1 : 0.75 },
        error_y: { type: "data", visible: n.some((count) => count > 1), array: high.map((value, k) => value - y[k]),
          arrayminus: low.map((value, k) => y[k] - value), color: stroke, thickness: 1, width: 3 },
        hovertemplate: `%{y:.4f} nats, n=%{customdata}<br>${setting} %{x}<extra>${label}</extra>` };
    });
    const named = lines.length > 1 && lines.length <= COLORS * DASHES.length;
    plot(panel(container, setting, named ? 290 + 18 * Math.ceil(lines.length) : 0), traces, {
      showlegend: named, legend: { orientation: "h", y: -0.28, yanchor: "top", x: 0, font: { size: 11 } },
      xaxis: { title: { text: setting },
        ...(log ? { type: "log", ...logTicks(lines.flatMap(({ x }) => x)) } : { nticks: 7 }) },
      yaxis: { nticks: 7 } });
  }
}

// ---- Diagnostics ----

function drawDiagnostics() {
  const container = byId("diagnostics-figures"), run = data.diagnostics[Number(byId("diagnosed").value)];
  container.replaceChildren();
  for (const { name, rows, steps, z } of run ? run.maps : []) {
    const known = z.flat().filter((value) => value !== null);
    const log = known.every((value) => value > 0);
    const shown = log ? z.map((row) => row.map((value) => value === null ? null : Math.log10(value))) : z;
    const ends = [Math.min(...shown.flat().filter((v) => v !== null)), Math.max(...shown.flat().filter((v) => v !== null))];
    const ticks = [0, 0.5, 1].map((part) => ends[0] + part * (ends[1] - ends[0]));
    const map = { type: "heatmap", x: steps, y: rows, z: shown, customdata: z, colorscale: "Cividis", xgap: 1, ygap: 1,
      colorbar: { thickness: 10, outlinewidth: 0, tickvals: ticks,
        ticktext: ticks.map((v) => Number((log ? 10 ** v : v).toPrecision(2))) },
      hovertemplate: `%{customdata:.4g}<br>step %{x:,}<extra>%{y}</extra>` };
    plot(panel(container, name, 80 + Math.max(110, 22 * rows.length)), [map], {
      xaxis: { title: { text: "step" }, showgrid: false, type: "linear", nticks: 7 }, margin: { l: 10, r: 6, t: 8, b: 40 },
      yaxis: { autorange: "reversed", showgrid: false, ticks: "", type: "category" } });
  }
}

// ---- Schedules ----

const QUANTITIES = { lr: ["learning rate, as a factor", ""], weight_decay: ["weight decay, as a factor", ""],
  momentum: ["momentum", ""], batch_tokens: ["batch", "tokens"], sequence_tokens: ["sequence", "tokens"],
  window_tokens: ["attention window", "tokens"] };

function drawSchedules() {
  const container = byId("schedules-figures"), flat = [];
  container.replaceChildren();
  for (const [name, [words, unit]] of Object.entries(QUANTITIES)) {
    const values = new Set(data.schedules.flatMap((one) => one[name]));
    if (values.size <= 1) {
      const known = [...values].filter((value) => value !== null);
      flat.push(...known.map((value) => `${words} ${value.toLocaleString("en")} ${unit}`.trim()));
      continue;
    }
    const traces = data.schedules.map((one, i) => {
      const own = { color: color(`c${i % COLORS}`), dash: "solid" }; // where experiments have no colours, or there is one
      const { color: stroke, dash } = crowded || data.schedules.length === 1 ? own : style(one.experiments[0]);
      const names = one.experiments.map((i) => data.experiments[i].name);
      const more = names.length > 3 ? ` and ${names.length - 3} more` : "";
      return { x: one.step, y: one[name], mode: "lines", name: names.slice(0, 3).join(", ") + more,
        line: { color: stroke, dash, width: 1.8, shape: unit === "tokens" ? "hv" : "linear" },
        hovertemplate: "%{y:.4~g}<br>step %{x:,}<extra>%{fullData.name}</extra>" };
    });
    const target = panel(container, unit ? `${words} (${unit})` : words);
    plot(target, traces, { xaxis: { title: { text: "step" }, nticks: 7 }, yaxis: { rangemode: "tozero", nticks: 6 } });
  }
  byId("schedules-note").textContent = [flat.length ? `The same throughout: ${flat.join("; ")}.` : "",
    data.problems.length ? `Not read: ${data.problems.join("; ")}` : ""].join(" ").trim();
}
