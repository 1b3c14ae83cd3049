// The figures of the report's page, and the words and colours in which they show runs. The scripts of the page share one
// scope: this one, address.js, panel.js, keys.js, live.js and page.js.

const $ = (id) => document.getElementById(id);
let data;
let runsById;

function learn(facts) {
  data = facts;
  runsById = new Map(data.runs.map((run) => [run.id, run]));
}

learn(JSON.parse($("data").textContent));
const shown = { families: new Set(Object.keys(data.families)), seed: "all", converged: false, runs: [] }; // runs: in the panel
const narrow = matchMedia("(max-width: 700px)");
// Ticks of logarithmic axes: plotly's own leave out the powers of ten ("2 5 2 5"), or crowd.
const TICKS = [1e-4, 0.001, 0.01, 0.1, 1, 10, 100, 1000, 10000].flatMap((n) => [n, 2 * n, 5 * n]);

// ---- which runs are shown, and in which words and colours
const isShown = (run) => shown.families.has(run.family) && (!shown.converged || run.converged)
  && (shown.seed === "all" || String(run.seed) === shown.seed);
const ink = (family) => data.families[family][isDark() ? "dark" : "light"];
// A colour of the style sheet as rgb(), for plotly, which knows neither variables nor light-dark().
const variable = (name) => {
  const probe = $("filters").appendChild(document.createElement("i"));
  probe.style.color = `var(--${name})`;
  const colour = getComputedStyle(probe).color;
  probe.remove();
  return colour;
};
const escaped = (text) => text.replace(/[&<>"]/g, (c) => `&#${c.charCodeAt(0)};`);
const number = (value) => (value === null ? "–" : Number(value.toPrecision(4)).toString());

// Points or runs of one family, and of one study where several are pooled, are joined by one line.
function grouped(items) {
  const groups = new Map();
  for (const item of items) {
    const key = `${item.family}\n${item.study}`;
    groups.set(key, [...(groups.get(key) ?? []), item]);
  }
  return [...groups.values()];
}

function aboutRun(run) {
  return `<b>${escaped(run.family)}</b>${run.study ? `, ${escaped(run.study)}` : ""}<br>${escaped(run.id)}<br>`
    + `${run.setting}, seed ${run.seed}<br>L0 ${number(run.l0)}, L1 ${number(run.l1)}<br>${run.degradation === null ? `FVU ${number(run.fvu)}` : `CE increase ${number(run.degradation)} nats`}, `
    + `MSE ${number(run.mse)}${run.converged ? "" : "<br>not converged"}`;
}

function aboutPoint(point, plane) {
  const bar = (half) => (half === null ? "" : ` ± ${Number(half.toPrecision(2))}`);
  const run = runsById.get(point.runs[0]); // the others differ from it in their seed only
  if (point.n === 1) return aboutRun(run);
  return `<b>${escaped(point.family)}</b>${point.study ? `, ${escaped(point.study)}` : ""}<br>${run.setting}, ${point.n} seeds, 95% intervals<br>`
    + `${data.names[plane.x]} ${number(point.x)}${bar(point.dx)}<br>${data.names[plane.y]} ${number(point.y)}${bar(point.dy)}${point.converged ? "" : "<br>not all converged"}`;
}

// ---- figures
const decades = { type: "log", tickvals: TICKS, ticktext: TICKS.map((n) => String(Number(n.toPrecision(1)))) };

// `tall`: heights are so far apart that they are drawn on a logarithmic scale.
function layout(xlabel, ylabel, log, tall) {
  const axis = { color: variable("quiet"), gridcolor: variable("line"), linecolor: variable("faint"), zeroline: false, automargin: true, ticks: "" };
  // A phone has room for "MSE" but not for "MSE (per dimension, normalised activations)".
  const title = (text) => ({ text: narrow.matches && text.length > 30 ? text.split(" (")[0] : text, font: { size: 12.5, color: variable("quiet") }, standoff: 8 });
  return {
    xaxis: { ...axis, title: title(xlabel), ...(log && decades) },
    yaxis: { ...axis, title: title(ylabel), rangemode: "tozero", ...(tall && decades) },
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", showlegend: false, hovermode: "closest",
    margin: { l: 8, r: 12, t: 10, b: 8 }, font: { family: getComputedStyle(document.body).fontFamily, size: 12, color: variable("ink") },
    hoverlabel: { bgcolor: variable("panel"), bordercolor: variable("faint"), font: { color: variable("ink"), size: 12.5 }, align: "left" },
    modebar: { bgcolor: "rgba(0,0,0,0)", color: variable("faint"), activecolor: variable("ink") }, dragmode: narrow.matches ? false : "zoom",
  };
}

function draw(id, title, traces, look) {
  const plot = $(id);
  Plotly.react(plot, traces, look, { displaylogo: false, responsive: true, displayModeBar: narrow.matches ? false : "hover",
    modeBarButtons: [["toImage", "zoom2d", "pan2d", "resetScale2d"]] });
  if (plot.dataset.listens) return;
  plot.dataset.listens = "yes";
  plot.on("plotly_click", ({ points }) => openRuns(runsAt(points[0].data, points[0].pointNumber)));
  if (traces.some((trace) => trace.customdata)) {
    listenToKeys(plot, title);
  } else {
    plot.setAttribute("role", "group");
    plot.setAttribute("aria-label", title);
  }
}

// The runs that a point stands for; none if it is only part of a line. A whole line may stand for one run.
const runsAt = (trace, i) => trace.customdata?.[i] ?? trace.meta ?? [];

// ---- a figure shows means over seeds, or, where one seed is chosen, the runs themselves
// The markers of runs that had not converged are hollow: filled with the colour of the page, so that no line shows through.
function markersOf(items, family) {
  const [colour, paper] = [ink(family), variable("paper")];
  return { size: 8, symbol: data.families[family].symbol, color: items.map((p) => (p.converged ? colour : paper)), line: { color: colour, width: 1.5 } };
}

// Where studies are pooled, the letter of its study stands at the end of each line.
function letterOf(items, x, y) {
  const letter = data.studies[items[0].study];
  const last = items.reduce((a, b) => (x(b) > x(a) ? b : a));
  return letter ? [{ x: [x(last)], y: [y(last)], mode: "text", text: [letter], textposition: "top right", hoverinfo: "skip", textfont: { color: ink(items[0].family), size: 12 } }] : [];
}

// The curves that comparisons read. Among the converged points alone they would be others.
const curvesOf = (plane) => (shown.converged ? [] : plane.lines.filter((line) => shown.families.has(line.family)));

function meansOf(plane) {
  const points = plane.points.filter((p) => shown.families.has(p.family) && (!shown.converged || p.converged));
  const best = points.filter((p) => p.best);
  const rings = { x: best.map((p) => p.x), y: best.map((p) => p.y), mode: "markers", hoverinfo: "skip",
    marker: { size: 18, symbol: "circle-open", color: variable("ink"), line: { width: 1 } } };
  const seeds = points.filter((p) => p.n > 1).flatMap((p) => p.runs.map((id) => runsById.get(id)));
  const small = grouped(seeds).map((runs) => ({ x: runs.map((r) => r[plane.x]), y: runs.map((r) => r[plane.y]), mode: "markers",
    marker: { size: 5, color: ink(runs[0].family), opacity: 0.45 }, text: runs.map(aboutRun), customdata: runs.map((r) => [r.id]), hovertemplate: "%{text}<extra></extra>" }));
  const curves = curvesOf(plane).map((line) => ({ x: line.x, y: line.y, mode: "lines", hoverinfo: "skip",
    line: { color: ink(line.family), dash: data.families[line.family].dash, width: 1.6 } }));
  const lines = grouped(points).flatMap((line) => {
    const [{ family }] = line;
    const colour = ink(family);
    const bar = (halves) => ({ type: "data", array: halves.map((half) => half ?? 0), color: colour, thickness: 1.1, width: 3, visible: halves.some((half) => half !== null) });
    return [{ x: line.map((p) => p.x), y: line.map((p) => p.y), mode: "lines+markers", line: { color: colour, dash: data.families[family].dash, width: curves.length ? 0 : 1.6 },
      error_x: bar(line.map((p) => p.dx)), error_y: bar(line.map((p) => p.dy)), marker: markersOf(line, family),
      text: line.map((p) => aboutPoint(p, plane)), customdata: line.map((p) => p.runs), hovertemplate: "%{text}<extra></extra>" }, ...letterOf(line, (p) => p.x, (p) => p.y)];
  });
  return [rings, ...curves, ...small, ...lines];
}

function runsOf(plane) {
  const sorted = grouped(data.runs.filter((run) => isShown(run) && run.progress === null)).map((runs) => runs.sort((a, b) => a[plane.x] - b[plane.x]));
  const places = (runs) => ({ x: runs.map((r) => r[plane.x]), y: runs.map((r) => r[plane.y]) });
  const lines = sorted.map((runs) => ({ ...places(runs), mode: "lines", hoverinfo: "skip",
    line: { color: ink(runs[0].family), dash: data.families[runs[0].family].dash, width: 1.6 } }));
  const markers = sorted.flatMap((runs) => [{ ...places(runs), mode: "lines+markers", line: { width: 0 }, marker: markersOf(runs, runs[0].family),
    text: runs.map(aboutRun), customdata: runs.map((r) => [r.id]), hovertemplate: "%{text}<extra></extra>" }, ...letterOf(runs, (r) => r[plane.x], (r) => r[plane.y])]);
  return [...lines, ...markers];
}

// Of rows of known features: the truth is the diagonal.
function drawMagnitudes({ lines, xlabel, ylabel }) {
  const end = Math.max(1, ...lines.flatMap((line) => line.x));
  const truth = { x: [0, end], y: [0, end], mode: "lines", hoverinfo: "skip", line: { color: variable("faint"), width: 1.5 } };
  const traces = lines.filter((line) => shown.families.has(line.family)).map((line) => ({ x: line.x, y: line.y, mode: "lines+markers",
    line: { color: ink(line.family), dash: data.families[line.family].dash, width: 1.6 }, marker: { size: 7, color: ink(line.family), symbol: data.families[line.family].symbol },
    hovertemplate: `<b>${escaped(line.family)}</b>, L0 ${number(line.l0)}<br>magnitude %{x:.3g}, latent %{y:.3g}<extra></extra>` }));
  draw("magnitudes", `${ylabel} against ${xlabel}`, [truth, ...traces], layout(xlabel, ylabel, false, false));
}

function drawAll() {
  data.planes.forEach((plane, i) => {
    $(`title-${i}`).textContent = plane.title;
    draw(`plane-${i}`, plane.title, shown.seed === "all" ? meansOf(plane) : runsOf(plane), layout(plane.xlabel, plane.ylabel, plane.log, plane.tall));
  });
  if (data.truth && $("magnitudes")) drawMagnitudes(data.truth);
  data.curves.forEach((curve, i) => {
    $(`curve-title-${i}`).textContent = curve.title;
    drawCurve(`curve-${i}`, curve, data.runs.filter(isShown));
  });
}

// One column of the training curves of some runs. A marker now and then tells nonlinearities apart without colour.
function drawCurve(id, { column, title, log }, runs) {
  const traces = runs.map((run) => {
    const { dash, symbol } = data.families[run.family];
    const values = run.curve[column];
    const sizes = values.map((_, i) => (i === values.length - 1 || i % 25 === 12 ? 5 : 0));
    return { x: run.curve.tokens, y: values, mode: "lines+markers", meta: [run.id], opacity: 0.8,
      line: { color: ink(run.family), dash, width: 1.1 }, marker: { symbol, size: sizes, color: ink(run.family), line: { width: 0 } },
      hovertemplate: `${escaped(run.id)}<br>%{y:.4g}<extra></extra>` };
  });
  const look = layout("training tokens", "", false, false);
  if (log) {
    const heights = runs.flatMap((run) => run.curve[column].filter((value) => value > 0)).sort((a, b) => a - b);
    const isWide = heights.at(-1) > 5 * heights[0]; // over less, plotly has ticks enough
    Object.assign(look.yaxis, isWide ? decades : { type: "log" });
  }
  look.yaxis.nticks = 7; // more would overlap in figures as low as these
  draw(id, title, traces, look);
}
