// The report's page: figures, filters and the table of runs. `data` stands before this script in the page.

const $ = (id) => document.getElementById(id);
const shown = { families: new Set(Object.keys(data.families)), seed: "all", converged: false };
const runsById = new Map(data.runs.map((run) => [run.id, run]));
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
const symbol = (family, study) => data.studies[study] ?? data.families[family].symbol;

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
    + `MSE ${number(run.mse)}${run.converged ? "" : "<br>not converged"}${run.page ? "<br>pages of its latents: see All runs" : ""}`;
}

function aboutPoint(point, plane) {
  const bar = (half) => (half === null ? "" : ` ± ${Number(half.toPrecision(2))}`);
  const run = runsById.get(point.runs[0]); // the others differ from it in their seed only
  if (point.n === 1) return aboutRun(run);
  return `<b>${escaped(point.family)}</b>${point.study ? `, ${escaped(point.study)}` : ""}<br>${run.setting}, ${point.n} seeds, 95% intervals<br>`
    + `${data.names[plane.x]} ${number(point.x)}${bar(point.dx)}<br>${data.names[plane.y]} ${number(point.y)}${bar(point.dy)}${point.converged ? "" : "<br>not all converged"}`;
}

// ---- figures
// `tall`: heights are so far apart that they are drawn on a logarithmic scale.
function layout(xlabel, ylabel, log, tall) {
  const axis = { color: variable("quiet"), gridcolor: variable("line"), linecolor: variable("faint"), zeroline: false, automargin: true, ticks: "" };
  // A phone has room for "L0" but not for "L0: active latents per token".
  const title = (text) => ({ text: narrow.matches ? text.split(":")[0] : text, font: { size: 12.5, color: variable("quiet") }, standoff: 8 });
  const decades = { type: "log", tickvals: TICKS, ticktext: TICKS.map((n) => String(Number(n.toPrecision(1)))) };
  return {
    xaxis: { ...axis, title: title(xlabel), ...(log && decades) },
    yaxis: { ...axis, title: title(ylabel), rangemode: "tozero", ...(tall && decades) },
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", showlegend: false, hovermode: "closest",
    margin: { l: 8, r: 12, t: 10, b: 8 }, font: { family: getComputedStyle(document.body).fontFamily, size: 12, color: variable("ink") },
    hoverlabel: { bgcolor: variable("panel"), bordercolor: variable("faint"), font: { color: variable("ink"), size: 12.5 }, align: "left" },
    modebar: { bgcolor: "rgba(0,0,0,0)", color: variable("faint"), activecolor: variable("ink") }, dragmode: narrow.matches ? false : "zoom",
  };
}

function draw(id, traces, look) {
  Plotly.react($(id), traces, look, { displaylogo: false, responsive: true, displayModeBar: narrow.matches ? false : "hover",
    modeBarButtons: [["toImage", "zoom2d", "pan2d", "resetScale2d"]] });
}

// ---- a figure shows means over seeds, or, where one seed is chosen, the runs themselves
const markersOf = (items, family, study) => items.map((p) => symbol(family, study) + (p.converged ? "" : "-open"));

// The curves that comparisons read. Among the converged points alone they would be others.
const curvesOf = (plane) => (shown.converged ? [] : plane.lines.filter((line) => shown.families.has(line.family)));

function meansOf(plane) {
  const points = plane.points.filter((p) => shown.families.has(p.family) && (!shown.converged || p.converged));
  const best = points.filter((p) => p.best);
  const rings = { x: best.map((p) => p.x), y: best.map((p) => p.y), mode: "markers", hoverinfo: "skip",
    marker: { size: 18, symbol: "circle-open", color: variable("ink"), line: { width: 1 } } };
  const seeds = points.filter((p) => p.n > 1).flatMap((p) => p.runs.map((id) => runsById.get(id)));
  const small = grouped(seeds).map((runs) => ({ x: runs.map((r) => r[plane.x]), y: runs.map((r) => r[plane.y]), mode: "markers",
    marker: { size: 5, color: ink(runs[0].family), opacity: 0.45 }, text: runs.map(aboutRun), hovertemplate: "%{text}<extra></extra>" }));
  const curves = curvesOf(plane).map((line) => ({ x: line.x, y: line.y, mode: "lines", hoverinfo: "skip",
    line: { color: ink(line.family), dash: data.families[line.family].dash, width: 1.6 } }));
  const lines = grouped(points).map((line) => {
    const [{ family, study }] = line;
    const colour = ink(family);
    const bar = (halves) => ({ type: "data", array: halves.map((half) => half ?? 0), color: colour, thickness: 1.1, width: 3, visible: halves.some((half) => half !== null) });
    return { x: line.map((p) => p.x), y: line.map((p) => p.y), mode: "lines+markers", line: { color: colour, dash: data.families[family].dash, width: curves.length ? 0 : 1.6 },
      error_x: bar(line.map((p) => p.dx)), error_y: bar(line.map((p) => p.dy)), marker: { size: 9, color: colour, symbol: markersOf(line, family, study) },
      text: line.map((p) => aboutPoint(p, plane)), hovertemplate: "%{text}<extra></extra>" };
  });
  return [rings, ...curves, ...small, ...lines];
}

function runsOf(plane) {
  return grouped(data.runs.filter(isShown)).map((runs) => {
    const [{ family, study }] = runs;
    const sorted = [...runs].sort((a, b) => a[plane.x] - b[plane.x]);
    return { x: sorted.map((r) => r[plane.x]), y: sorted.map((r) => r[plane.y]), mode: "lines+markers",
      line: { color: ink(family), dash: data.families[family].dash, width: 1.6 },
      marker: { size: 9, color: ink(family), symbol: markersOf(sorted, family, study) },
      text: sorted.map(aboutRun), hovertemplate: "%{text}<extra></extra>" };
  });
}

// Of rows of known features: the truth is the diagonal.
function drawMagnitudes({ lines, xlabel, ylabel }) {
  const end = Math.max(1, ...lines.flatMap((line) => line.x));
  const truth = { x: [0, end], y: [0, end], mode: "lines", hoverinfo: "skip", line: { color: variable("faint"), width: 1.5 } };
  const traces = lines.filter((line) => shown.families.has(line.family)).map((line) => ({ x: line.x, y: line.y, mode: "lines+markers",
    line: { color: ink(line.family), dash: data.families[line.family].dash, width: 1.6 }, marker: { size: 7, color: ink(line.family), symbol: data.families[line.family].symbol },
    hovertemplate: `<b>${escaped(line.family)}</b>, L0 ${number(line.l0)}<br>magnitude %{x:.3g}, latent %{y:.3g}<extra></extra>` }));
  draw("magnitudes", [truth, ...traces], layout(xlabel, ylabel, false, false));
}

function drawAll() {
  data.planes.forEach((plane, i) => {
    $(`title-${i}`).textContent = plane.title;
    draw(`plane-${i}`, shown.seed === "all" ? meansOf(plane) : runsOf(plane), layout(plane.xlabel, plane.ylabel, plane.log, plane.tall));
  });
  if (data.truth && $("magnitudes")) drawMagnitudes(data.truth);
  data.curves.forEach((curve, i) => {
    $(`curve-title-${i}`).textContent = curve.title;
    const traces = data.runs.filter(isShown).map((run) => ({ x: curve.lines[run.id][0], y: curve.lines[run.id][1], mode: "lines",
      line: { color: ink(run.family), dash: data.families[run.family].dash, width: 1.1 }, opacity: 0.8,
      hovertemplate: `${escaped(run.id)}<br>%{y:.4g}<extra></extra>` }));
    const look = layout("training tokens", "", false, false);
    if (curve.log) look.yaxis.type = "log";
    look.yaxis.nticks = 7; // more would overlap in figures as low as these
    draw(`curve-${i}`, traces, look);
  });
}

// ---- filters
// The line and the marker of a family as its figures draw them. Pooled studies use markers to tell studies apart, so
// there a family has only its line.
function swatch(family) {
  const { symbol: shape, dash } = data.families[family];
  const colour = ink(family);
  const marks = { circle: '<circle cx="17" cy="7" r="4"/>', square: '<rect x="13" y="3" width="8" height="8"/>', "triangle-up": '<path d="M17 2l5 9h-10z"/>',
    "triangle-down": '<path d="M17 12l5-9h-10z"/>', diamond: '<path d="M17 1.5l5 5.5l-5 5.5l-5-5.5z"/>', cross: '<path d="M15 2h4v3h3v4h-3v3h-4v-3h-3v-4h3z"/>',
    "triangle-left": '<path d="M12 7l9-5v10z"/>', "triangle-right": '<path d="M22 7l-9-5v10z"/>', x: '<path d="M14 2l3 3l3-3l2 2l-3 3l3 3l-2 2l-3-3l-3 3l-2-2l3-3l-3-3z"/>' };
  const dashes = dash === "solid" ? "" : `stroke-dasharray="${dash.replaceAll("px", "")}"`;
  return `<svg viewBox="0 0 34 14" aria-hidden="true"><line x1="0" x2="34" y1="7" y2="7" stroke="${colour}" stroke-width="2" ${dashes}/>`
    + `<g fill="${colour}">${Object.keys(data.studies).length ? "" : marks[shape] ?? ""}</g></svg>`;
}

function showChips() {
  $("chips").replaceChildren(...Object.keys(data.families).map((family) => {
    const chip = document.createElement("button");
    chip.className = "chip";
    chip.type = "button";
    chip.dataset.family = family;
    chip.setAttribute("aria-pressed", shown.families.has(family));
    chip.title = "Click to show or hide this family; double-click to show it alone.";
    chip.innerHTML = swatch(family);
    chip.append(family);
    return chip;
  }));
}

const allAreShown = () => shown.families.size === Object.keys(data.families).length;

// Bring the page to what the filters say.
function apply() {
  for (const chip of $("chips").children) chip.setAttribute("aria-pressed", shown.families.has(chip.dataset.family));
  let n = 0;
  for (const row of document.querySelectorAll(".runs tbody tr")) {
    row.hidden = !isShown(data.runs[row.dataset.run]);
    n += !row.hidden;
  }
  $("shown").textContent = n === data.runs.length ? `${n} runs` : `${n} of ${data.runs.length} runs`;
  $("all").textContent = allAreShown() ? "Hide all" : "Show all";
  drawAll();
}

function listen() {
  $("chips").addEventListener("click", (event) => {
    const family = event.target.closest(".chip")?.dataset.family;
    if (family === undefined) return;
    // The first click of the two has already hidden or shown the family; either way it is now the only one.
    if (event.detail === 2) shown.families = new Set([family]);
    else if (!shown.families.delete(family)) shown.families.add(family);
    apply();
  });
  $("all").addEventListener("click", () => {
    shown.families = new Set(allAreShown() ? [] : Object.keys(data.families));
    apply();
  });
  $("seed").addEventListener("change", () => { shown.seed = $("seed").value; apply(); });
  $("converged").addEventListener("change", () => { shown.converged = $("converged").checked; apply(); });
  document.addEventListener("theme", () => { showChips(); apply(); });
  narrow.addEventListener("change", drawAll);
}

// ---- the table
function sortable() {
  const body = document.querySelector(".runs tbody");
  const heads = [...document.querySelectorAll(".runs thead th")];
  const value = (row, i) => {
    const text = row.cells[i].textContent;
    const asNumber = Number(text);
    return text === "" || Number.isNaN(asNumber) ? text : asNumber;
  };
  heads.forEach((head, i) => head.addEventListener("click", () => {
    const up = head.getAttribute("aria-sort") !== "ascending";
    const way = up ? 1 : -1;
    for (const other of heads) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", up ? "ascending" : "descending");
    const rows = [...body.rows].map((row) => [value(row, i), row]);
    const compare = (a, b) => (typeof a === typeof b ? (a < b ? -1 : a > b ? 1 : 0) : typeof a === "number" ? -1 : 1); // numbers before text
    rows.sort(([a], [b]) => way * compare(a, b));
    body.append(...rows.map(([, row]) => row));
  }));
}

// A section that one jumps to must not end up under the filters, which stay at the top of the window.
function keepClear() {
  const bar = $("filters");
  const covers = getComputedStyle(bar).position === "sticky"; // not on a phone
  root.style.scrollPaddingTop = `${covers ? bar.offsetHeight + 10 : 0}px`;
}

function begin() {
  const seeds = [...new Set(data.runs.map((run) => run.seed))].sort((a, b) => a - b);
  const several = data.planes.some((plane) => plane.points.some((point) => point.n > 1));
  for (const seed of ["all", ...seeds]) $("seed").append(new Option(seed !== "all" ? seed : several ? "all: means with 95% intervals" : "all", seed));
  const sentences = [
    several ? "Points are means over init seeds with 95% t intervals; the small points are the runs."
      : "Every point is one run with one seed, so there are no intervals: small differences are not findings.",
    "Filled markers have converged. Hollow ones were still moving when training ended, or it is not known.",
    "A ring marks the frontier: no other converged point is better on both axes.",
    "Point at a marker for its numbers.",
  ];
  const studies = Object.entries(data.studies).map(([name, shape]) => `${name} ${shape}`);
  if (studies.length) sentences.push(`Shapes of markers: ${studies.join(", ")}.`);
  if (data.planes.length) $("legend").textContent = sentences.join(" "); // the page of one SAE has no planes
  sortable();
  listen();
  showChips();
  apply();
  new ResizeObserver(keepClear).observe($("filters"));
  document.body.dataset.ready = "yes"; // the tests wait for this
}

begin();
