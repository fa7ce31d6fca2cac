"use strict";
// Sorts and filters the table; draws the plots, of the runs that the filter leaves, with plotly.js.

const element = (id) => document.getElementById(id);
const read = (node) => JSON.parse(node.textContent);
const { runs } = read(element("comparison"));
const page = read(element("page"));
const COLOURS = ["#4269d0", "#efb118", "#ff725c", "#3ca951", "#a463f2", "#6cc5b0", "#ff8ab7", "#9c6b4e", "#97bbf5", "#9498a0"];
// Viridis, the end that stands out from the background being the better one.
const VIRIDIS = ["#440154", "#46327e", "#365c8d", "#277f8e", "#1fa187", "#4ac16d", "#a0da39", "#fde725"];
const shades = () => (dark.matches ? VIRIDIS.slice(1) : VIRIDIS.slice(0, -1).reverse());
// Plotly takes some tags in labels for formatting; whatever a run's settings hold is shown as it is.
const plain = (value) => String(value).replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");
const shown = (value) => (value === null || value === undefined ? "none" : typeof value === "string" ? value : JSON.stringify(value));
const number = (text) => (text.trim() === "" ? NaN : Number(text));

// The table.
const table = element("runs");
const heads = [...table.tHead.rows[0].cells];
const rows = [...table.tBodies[0].rows];
const names = heads.map((head) => head.dataset.name.toLowerCase());
const valueIn = (row, column) => row.cells[column].dataset.value;

function sortBy(column) {
  const sign = heads[column].getAttribute("aria-sort") === "ascending" ? -1 : 1;
  heads.forEach((head) => head.removeAttribute("aria-sort"));
  heads[column].setAttribute("aria-sort", sign > 0 ? "ascending" : "descending");
  rows.sort((one, other) => {
    const [a, b] = [valueIn(one, column), valueIn(other, column)];
    if (a === "" || b === "") return (a === "") - (b === ""); // nothing comes last, either way
    const [x, y] = [number(a), number(b)];
    return sign * (Number.isNaN(x) || Number.isNaN(y) ? a.localeCompare(b, "en", { numeric: true }) : x - y);
  });
  table.tBodies[0].append(...rows);
}

function condition(word) {
  const [, name, operator, wanted] = word.match(/^([^<>=!]+)(<=|>=|!=|=|<|>)(.+)$/) ?? [];
  const column = names.indexOf(name);
  if (column < 0) return (row) => row.textContent.toLowerCase().includes(word);
  return (row) => {
    const own = valueIn(row, column).toLowerCase();
    const [x, y] = [number(own), number(wanted)];
    const [a, b] = Number.isNaN(x) || Number.isNaN(y) ? [own, wanted] : [x, y];
    if (operator === "=") return a === b;
    if (operator === "!=") return a !== b;
    if (own === "") return false;
    return { "<": a < b, ">": a > b, "<=": a <= b, ">=": a >= b }[operator];
  };
}

function filter() {
  const conditions = element("filter").value.toLowerCase().split(/\s+/).filter(Boolean).map(condition);
  rows.forEach((row) => (row.hidden = !conditions.every((holds) => holds(row))));
  element("shown").value = `${visible().length} of ${runs.length} runs`;
}

const visible = () => rows.filter((row) => !row.hidden).map((row) => Number(row.dataset.run)).sort((a, b) => a - b);

// What plots share.
const dark = matchMedia("(prefers-color-scheme: dark)");
const narrow = () => innerWidth < 640;
const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const keys = Object.keys(page.columns);
const label = (run) => page.group_columns.map((key) => `${page.columns[key]} ${shown(runs[run].settings[key])}`).join(", ");
const described = (run) => plain(`job ${page.names[run]}: ${keys.map((key) => `${page.columns[key]} ${tidy(runs[run].settings[key])}`).join(", ")}`);

function draw(node, data, layout = {}) {
  const axis = { gridcolor: css("--line"), linecolor: css("--line"), zerolinecolor: css("--line"), automargin: true };
  const base = {
    paper_bgcolor: "transparent", plot_bgcolor: "transparent", colorway: COLOURS,
    font: { color: css("--text"), family: "system-ui, sans-serif", size: 12 },
    margin: { l: 50, r: 20, t: 20, b: 45 },
    hoverlabel: { bgcolor: css("--card"), bordercolor: css("--line"), font: { color: css("--text") }, namelength: -1 },
    ...layout,
  };
  for (const name of new Set(["xaxis", "yaxis", ...Object.keys(layout).filter((key) => /^[xy]axis/.test(key))])) base[name] = { ...axis, ...layout[name] };
  return Plotly.react(node, data, base, { responsive: true, displaylogo: false });
}

// One axis of a setting or of the result: where each run lies on it, and how to label it.
function dimension(key, among) {
  const values = among.map((run) => (key === "result" ? page.results[run] : runs[run].settings[key]));
  const numeric = values.every((value) => typeof value === "number");
  const distinct = [...new Map(values.map((value) => [JSON.stringify(value), value])).values()];
  distinct.sort((a, b) => (numeric ? a - b : shown(a).localeCompare(shown(b), "en", { numeric: true })));
  const log = numeric && key !== "result" && distinct[0] > 0 && distinct.at(-1) / distinct[0] >= 10;
  const name = key === "result" ? `${page.result}, %` : page.columns[key];
  return { key, name, values, distinct, numeric, log };
}

const tidy = (value) => (typeof value === "number" ? String(Number(value.toPrecision(4))) : shown(value));

function colourOf(share) {
  const stops = shades();
  const place = share * (stops.length - 1);
  const low = Math.min(Math.floor(place), stops.length - 2);
  const channel = (stop, from) => parseInt(stops[stop].slice(from, from + 2), 16);
  const mix = (from) => Math.round(channel(low, from) * (low + 1 - place) + channel(low + 1, from) * (place - low));
  return `rgb(${mix(1)},${mix(3)},${mix(5)})`;
}

const scale = () => shades().map((colour, position, { length }) => [position / (length - 1), colour]);

// Learning curves.
function smooth(values, weight) {
  let [sum, norm] = [0, 0];
  return values.map((value) => ((sum = weight * sum + (1 - weight) * value), (norm = weight * norm + 1 - weight), sum / norm));
}

// Mean and standard deviation of several curves, at the steps that all of them have.
function average(curves) {
  const at = curves.map(([steps, values]) => new Map(steps.map((step, i) => [step, values[i]])));
  const steps = curves[0][0].filter((step) => at.every((map) => map.has(step)));
  const means = [], stds = [];
  for (const step of steps) {
    const values = at.map((map) => map.get(step));
    const mean = values.reduce((a, b) => a + b, 0) / values.length;
    means.push(mean);
    stds.push(values.length > 1 ? Math.sqrt(values.reduce((sum, value) => sum + (value - mean) ** 2, 0) / (values.length - 1)) : 0);
  }
  return [steps, means, stds];
}

function drawCurves() {
  const [metric, weight] = [element("metric").value, Number(element("smoothing").value)];
  const percent = /accuracy/.test(metric) ? 100 : 1;
  const epochs = element("over").value === "epoch";
  const along = (run, steps) => (epochs ? steps.map((step) => step / page.steps_per_epoch[run]) : steps);
  const logged = visible().filter((run) => page.curves[run][metric]);
  let lines;
  if (element("average").checked) {
    const groups = new Map();
    for (const run of logged.filter((run) => page.groups[run] >= 0)) groups.set(page.groups[run], [...(groups.get(page.groups[run]) ?? []), run]);
    lines = [...groups.entries()].sort(([a], [b]) => a - b).map(([, members]) => {
      const [steps, means, stds] = average(members.map((run) => page.curves[run][metric]));
      return { name: plain(`${label(members[0]) || "all runs"} (n = ${members.length})`), x: along(members[0], steps), y: means, stds };
    });
  } else {
    lines = logged.map((run) => ({ name: described(run), x: along(run, page.curves[run][metric][0]), y: page.curves[run][metric][1] }));
  }
  const count = Number(element("coloured").value);
  const data = [];
  const context = { x: [], y: [], mode: "lines", line: { color: css("--grey"), width: 1 }, opacity: 0.6, hoverinfo: "skip", showlegend: false };
  for (const line of lines.slice(count)) {
    context.x.push(...line.x, null);
    context.y.push(...smooth(line.y, weight).map((value) => value * percent), null);
  }
  if (context.x.length) data.push(context);
  lines.slice(0, count).forEach((line, position) => {
    const color = COLOURS[position % COLOURS.length];
    const scaled = line.y.map((value) => value * percent);
    const smoothed = smooth(scaled, weight);
    const common = { x: line.x, mode: line.x.length < 40 ? "lines+markers" : "lines", marker: { size: 4 }, line: { color, width: 2 }, name: line.name };
    if (line.stds?.some((std) => std > 0)) {
      const edge = (sign) => smoothed.map((value, i) => value + sign * percent * line.stds[i]);
      data.push({ x: [...line.x, ...[...line.x].reverse()], y: [...edge(1), ...edge(-1).reverse()], fill: "toself", fillcolor: color, opacity: 0.15, line: { width: 0 }, mode: "lines", hoverinfo: "skip", showlegend: false });
    } else if (weight > 0) {
      data.push({ ...common, y: scaled, mode: "lines", opacity: 0.25, line: { color, width: 1 }, hoverinfo: "skip", showlegend: false });
    }
    data.push({ ...common, y: smoothed });
  });
  return draw(element("curves"), data, {
    xaxis: { title: { text: epochs ? "epoch" : "step" }, rangemode: "tozero" },
    yaxis: { title: { text: plain(metric) + (percent > 1 ? ", %" : "") } },
    showlegend: !narrow() && lines.slice(0, count).length <= 30,
    legend: { x: 1.01, y: 1, font: { size: 11 } },
  });
}

// Parallel coordinates: lines in as many shades as can be told apart, so that hundreds of runs are few traces.
function drawParallel() {
  const among = visible().filter((run) => page.results[run] !== null);
  const dimensions = [...keys.filter((key) => key !== "seed" || keys.length === 1), "result"].map((key) => dimension(key, among));
  const place = dimensions.map(({ values, distinct, numeric, log }) => {
    if (!numeric) return (value) => (distinct.length > 1 ? distinct.map(shown).indexOf(shown(value)) / (distinct.length - 1) : 0.5);
    const on = log ? Math.log : Number;
    const [low, high] = [on(distinct[0]), on(distinct.at(-1))];
    return (value) => (high > low ? (on(value) - low) / (high - low) : 0.5);
  });
  const results = among.map((run) => page.results[run]);
  const [least, most] = [Math.min(...results), Math.max(...results)];
  const SHADES = 24;
  const traces = Array.from({ length: SHADES }, (_, shade) => ({
    x: [], y: [], text: [], mode: "lines+markers", marker: { size: 5 }, line: { width: 1.5 }, opacity: 0.75,
    hovertemplate: "%{text}<extra></extra>", showlegend: false, shade,
  }));
  among.forEach((run, i) => {
    const share = most > least ? (results[i] - least) / (most - least) : 1;
    const trace = traces[Math.min(Math.floor(share * SHADES), SHADES - 1)];
    trace.x.push(...dimensions.keys(), null);
    trace.y.push(...dimensions.map(({ values }, d) => place[d](values[i])), null);
    trace.text.push(...dimensions.map(() => `${described(run)}<br>${results[i].toFixed(2)} %`), "");
  });
  const used = traces.filter((trace) => trace.x.length);
  for (const trace of used) trace.line.color = trace.marker.color = colourOf((trace.shade + 0.5) / SHADES);
  for (const trace of used) delete trace.shade;
  const annotations = dimensions.flatMap(({ distinct, numeric, log }, d) => {
    let ticks = distinct;
    if (distinct.length > 8) {
      const on = (share) => (log ? distinct[0] * (distinct.at(-1) / distinct[0]) ** share : distinct[0] + share * (distinct.at(-1) - distinct[0]));
      ticks = numeric ? [0, 0.25, 0.5, 0.75, 1].map(on) : [0, 0.25, 0.5, 0.75, 1].map((share) => distinct[Math.round(share * (distinct.length - 1))]);
    }
    const last = d === dimensions.length - 1;
    return ticks.map((tick) => ({
      x: d, y: place[d](tick), text: plain(last ? tick.toFixed(1) : tidy(tick)), showarrow: false, xanchor: last ? "left" : "right", xshift: last ? 8 : -8,
      bgcolor: css("--back"), opacity: 0.85, font: { size: 11 },
    }));
  });
  element("parallel").style.minWidth = `${5.5 * dimensions.length}rem`; // with more settings a phone scrolls
  return draw(element("parallel"), used, {
    annotations: among.length ? annotations : [],
    shapes: dimensions.map((_, d) => ({ type: "line", x0: d, x1: d, y0: 0, y1: 1, line: { color: css("--faint"), width: 1 }, layer: "below" })),
    xaxis: { tickvals: [...dimensions.keys()], ticktext: dimensions.map(({ key, name }) => (key === "result" && narrow() ? "result, %" : plain(name))), range: [-0.4, dimensions.length - 0.6], showgrid: false, zeroline: false, fixedrange: true, side: "top" },
    yaxis: { visible: false, range: [-0.06, 1.06], fixedrange: true },
    margin: { l: 36, r: 40, t: 40, b: 15 }, hovermode: "closest",
  });
}

// Any two settings: each run a point, or the mean result of the runs of each pair of values.
function drawPlane() {
  const among = visible().filter((run) => page.results[run] !== null);
  const [across, up] = [element("across").value, element("up").value].map((key) => dimension(key, among));
  const results = among.map((run) => page.results[run]);
  const bar = { title: { text: narrow() ? "%" : `${page.result}, %`, side: "right" }, outlinewidth: 0, thickness: 12 };
  const axis = ({ name, log, numeric }, categories) =>
    categories ? { type: "category", title: { text: plain(name) }, showgrid: false } : { type: log ? "log" : numeric ? "linear" : "category", title: { text: plain(name) } };
  if (element("kind").value === "scatter") {
    const marker = { size: 10, color: results, colorscale: scale(), showscale: true, colorbar: bar, line: { color: css("--text"), width: 0.5 } };
    const at = ({ values, numeric }) => (numeric ? values : values.map((value) => plain(shown(value))));
    const text = among.map((run, i) => `${described(run)}<br>${results[i].toFixed(2)} %`);
    const data = [{ x: at(across), y: at(up), text, mode: "markers", marker, hovertemplate: "%{text}<extra></extra>" }];
    return draw(element("plane"), data, { xaxis: axis(across), yaxis: axis(up), hovermode: "closest" });
  }
  const cells = new Map();
  among.forEach((_, i) => {
    const cell = JSON.stringify([across.values[i], up.values[i]]);
    cells.set(cell, [...(cells.get(cell) ?? []), results[i]]);
  });
  const of = (x, y) => cells.get(JSON.stringify([x, y])) ?? [];
  const mean = (values) => (values.length ? values.reduce((a, b) => a + b, 0) / values.length : null);
  const z = up.distinct.map((y) => across.distinct.map((x) => mean(of(x, y))));
  const n = up.distinct.map((y) => across.distinct.map((x) => of(x, y).length));
  const few = across.distinct.length <= (narrow() ? 5 : 12) && up.distinct.length <= 12;
  const data = [{
    type: "heatmap", x: across.distinct.map((x) => plain(tidy(x))), y: up.distinct.map((y) => plain(tidy(y))), z, customdata: n,
    colorscale: scale(), colorbar: bar, xgap: 2, ygap: 2, hoverongaps: false,
    hovertemplate: "%{x}, %{y}: %{z:.2f} %, n = %{customdata}<extra></extra>",
  }];
  const all = z.flat().filter((value) => value !== null);
  const [least, most] = [Math.min(...all), Math.max(...all)];
  // Plotly's own choice of text colour is hard to read on the middle of the scale.
  const ink = (value) => {
    const [red, green, blue] = colourOf(most > least ? (value - least) / (most - least) : 0.5).match(/\d+/g).map(Number);
    return 0.299 * red + 0.587 * green + 0.114 * blue > 120 ? "#000" : "#fff";
  };
  const annotations = z.flatMap((line, y) => line.flatMap((value, x) =>
    few && value !== null ? [{ x, y, text: value.toFixed(1), showarrow: false, font: { color: ink(value) } }] : []));
  return draw(element("plane"), data, { annotations, xaxis: axis(across, true), yaxis: axis(up, true) });
}

function drawFigures() {
  for (const node of document.querySelectorAll(".figure")) {
    node.content ??= read(node.querySelector("script"));
    draw(node, structuredClone(node.content.data), structuredClone(node.content.layout));
  }
}

// What there is to choose from, what is chosen at first, and what a choice redraws.
function options(id, entries, chosen) {
  element(id).append(...entries.map(([value, text]) => new Option(text, value, value === chosen, value === chosen)));
}

const plots = [];
if (element("curves")) {
  const metrics = [...new Set(page.curves.flatMap((curves) => Object.keys(curves)))];
  options("metric", metrics.map((metric) => [metric, metric]), ["val/accuracy", "train/loss", metrics[0]].find((metric) => metrics.includes(metric)));
  element("average").parentElement.hidden = new Set(page.groups.filter((group) => group >= 0)).size === page.groups.filter((group) => group >= 0).length;
  for (const id of ["metric", "over", "coloured", "smoothing", "average"]) element(id).addEventListener("input", drawCurves);
  plots.push(drawCurves);
}
if (element("parallel")) plots.push(drawParallel);
if (element("plane")) {
  const entries = [...keys.map((key) => [key, page.columns[key]]), ["result", page.result]];
  const [first, second] = [...keys.filter((key) => key !== "seed"), ...keys.filter((key) => key === "seed"), "result"];
  options("across", entries, first);
  options("up", entries, second);
  const among = [...runs.keys()].filter((run) => page.results[run] !== null);
  const [columns, lines] = [first, second].map((key) => dimension(key, among).distinct.length);
  // What a search has drawn from intervals is no grid: its map would be holes.
  element("kind").value = columns * lines > 2 * among.length || second === "result" ? "scatter" : "heatmap";
  for (const id of ["across", "up", "kind"]) element(id).addEventListener("input", drawPlane);
  plots.push(drawPlane);
}
plots.push(drawFigures);

const redraw = () => plots.forEach((plot) => plot());
heads.forEach((head, column) => head.firstElementChild.addEventListener("click", () => sortBy(column)));
let waiting;
element("filter").addEventListener("input", () => {
  filter();
  clearTimeout(waiting);
  waiting = setTimeout(redraw, 150);
});
dark.addEventListener("change", redraw);
matchMedia("(max-width: 640px)").addEventListener("change", redraw);
element("copy")?.addEventListener("click", async ({ target }) => {
  getSelection().selectAllChildren(element("command"));
  try {
    await navigator.clipboard.writeText(element("command").textContent);
    target.textContent = "Copied";
  } catch {
    target.textContent = document.execCommand("copy") ? "Copied" : "Press Ctrl-C";
  }
  setTimeout(() => (target.textContent = "Copy"), 2000);
});

// The table is there at once; plots follow one by one, so that the page answers meanwhile.
(async () => {
  for (const plot of plots) {
    await new Promise((resolve) => setTimeout(resolve));
    await plot();
  }
  document.body.dataset.drawn = "yes";
})();
