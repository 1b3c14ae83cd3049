const $ = (id) => document.getElementById(id);
const shown = { families: new Set(Object.keys(data.families)), seed: "all", converged: false };
const runsById = new Map(data.runs.map((run) => [run.id, run]));
const narrow = matchMedia("(max-width: 700px)");
const DECADES = [1e-4, 0.001, 0.01, 0.1, 1, 10, 100, 1000, 10000].flatMap((n) => [n, 2 * n, 5 * n]);

// ---- what is shown
const isShown = (run) => shown.families.has(run.family) && (!shown.converged || run.converged)
  && (shown.seed === "all" || String(run.seed) === shown.seed);
const ink = (family) => data.families[family][isDark() ? "dark" : "light"];
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
    + `${run.setting}, seed ${run.seed}<br>L0 ${number(run.l0)}, L1 ${number(run.l1)}<br>nats lost ${number(run.degradation)}, `
    + `MSE ${number(run.mse)}${run.converged ? "" : "<br>not converged"}`;
}

function aboutPoint(point, plane) {
  const bar = (half) => (half === null ? "" : ` ± ${Number(half.toPrecision(2))}`);
  const run = runsById.get(point.runs[0]);
  if (point.n === 1) return aboutRun(run);
  return `<b>${escaped(point.family)}</b>${point.study ? `, ${escaped(point.study)}` : ""}<br>${run.setting}, ${point.n} seeds, 95% intervals<br>`
    + `${data.names[plane.x]} ${number(point.x)}${bar(point.dx)}<br>${data.names[plane.y]} ${number(point.y)}${bar(point.dy)}${point.converged ? "" : "<br>not all converged"}`;
}

// ---- figures
function layout(xlabel, ylabel, log, tall) {
  const axis = { color: variable("quiet"), gridcolor: variable("line"), linecolor: variable("faint"), zeroline: false, automargin: true, ticks: "" };
  const title = (text) => ({ text: narrow.matches ? text.split(":")[0] : text, font: { size: 12.5, color: variable("quiet") }, standoff: 8 });
  const decades = { type: "log", tickvals: DECADES, ticktext: DECADES.map((n) => String(Number(n.toPrecision(1)))) };
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

const filled = (items, family, study) => items.map((p) => symbol(family, study) + (p.converged ? "" : "-open"));

function meansOf(plane) {
  const points = plane.points.filter((p) => shown.families.has(p.family) && (!shown.converged || p.converged));
  const best = points.filter((p) => p.best);
  const rings = { x: best.map((p) => p.x), y: best.map((p) => p.y), mode: "markers", hoverinfo: "skip",
    marker: { size: 18, symbol: "circle-open", color: variable("ink"), line: { width: 1 } } };
  const seeds = points.filter((p) => p.n > 1).flatMap((p) => p.runs.map((id) => runsById.get(id)));
  const faint = grouped(seeds).map((runs) => ({ x: runs.map((r) => r[plane.x]), y: runs.map((r) => r[plane.y]), mode: "markers",
    marker: { size: 5, color: ink(runs[0].family), opacity: 0.45 }, text: runs.map(aboutRun), hovertemplate: "%{text}<extra></extra>" }));
  const lines = grouped(points).map((line) => {
    const [{ family, study }] = line, colour = ink(family);
    const bar = (halves) => ({ type: "data", array: halves.map((half) => half ?? 0), color: colour, thickness: 1.1, width: 3, visible: halves.some((half) => half !== null) });
    return { x: line.map((p) => p.x), y: line.map((p) => p.y), mode: "lines+markers", line: { color: colour, dash: data.families[family].dash, width: 1.6 },
      error_x: bar(line.map((p) => p.dx)), error_y: bar(line.map((p) => p.dy)), marker: { size: 9, color: colour, symbol: filled(line, family, study) },
      text: line.map((p) => aboutPoint(p, plane)), hovertemplate: "%{text}<extra></extra>" };
  });
  return [rings, ...faint, ...lines];
}

function runsOf(plane) {
  return grouped(data.runs.filter(isShown)).map((runs) => {
    const [{ family, study }] = runs, sorted = [...runs].sort((a, b) => a[plane.x] - b[plane.x]);
    return { x: sorted.map((r) => r[plane.x]), y: sorted.map((r) => r[plane.y]), mode: "lines+markers",
      line: { color: ink(family), dash: data.families[family].dash, width: 1.6 },
      marker: { size: 9, color: ink(family), symbol: filled(sorted, family, study) },
      text: sorted.map(aboutRun), hovertemplate: "%{text}<extra></extra>" };
  });
}

function drawAll() {
  data.planes.forEach((plane, i) => {
    $(`title-${i}`).textContent = plane.title;
    draw(`plane-${i}`, shown.seed === "all" ? meansOf(plane) : runsOf(plane), layout(plane.xlabel, plane.ylabel, plane.log, plane.tall));
  });
  data.curves.forEach((curve, i) => {
    $(`curve-title-${i}`).textContent = curve.title;
    const traces = data.runs.filter(isShown).map((run) => ({ x: curve.lines[run.id][0], y: curve.lines[run.id][1], mode: "lines",
      line: { color: ink(run.family), dash: data.families[run.family].dash, width: 1.1 }, opacity: 0.8,
      hovertemplate: `${escaped(run.id)}<br>%{y:.4g}<extra></extra>` }));
    const look = layout("training tokens", "", false, false);
    if (curve.log) look.yaxis.type = "log";
    look.yaxis.nticks = 7;
    draw(`curve-${i}`, traces, look);
  });
}

// ---- filters
function swatch(family) {
  const { symbol: shape, dash } = data.families[family], colour = ink(family);
  const marks = { circle: '<circle cx="17" cy="7" r="4"/>', square: '<rect x="13" y="3" width="8" height="8"/>', "triangle-up": '<path d="M17 2l5 9h-10z"/>',
    "triangle-down": '<path d="M17 12l5-9h-10z"/>', diamond: '<path d="M17 1.5l5 5.5l-5 5.5l-5-5.5z"/>', cross: '<path d="M15 2h4v3h3v4h-3v3h-4v-3h-3v-4h3z"/>' };
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
    chip.title = "click: show or hide; double click: this one alone";
    chip.innerHTML = swatch(family);
    chip.append(family);
    return chip;
  }));
}

function apply() {
  for (const chip of $("chips").children) chip.setAttribute("aria-pressed", shown.families.has(chip.dataset.family));
  let n = 0;
  for (const row of document.querySelectorAll(".runs tbody tr")) {
    row.hidden = !isShown(data.runs[row.dataset.run]);
    n += !row.hidden;
  }
  $("shown").textContent = n === data.runs.length ? `${n} runs` : `${n} of ${data.runs.length} runs`;
  const all = shown.families.size === Object.keys(data.families).length;
  $("all").textContent = all ? "No families" : "All families";
  drawAll();
}

function listen() {
  $("chips").addEventListener("click", (event) => {
    const family = event.target.closest(".chip")?.dataset.family;
    if (family === undefined) return;
    if (event.detail === 2) shown.families = new Set([family]);
    else if (!shown.families.delete(family)) shown.families.add(family);
    apply();
  });
  $("all").addEventListener("click", () => {
    shown.families = new Set($("all").textContent === "All families" ? Object.keys(data.families) : []);
    apply();
  });
  $("seed").addEventListener("change", () => { shown.seed = $("seed").value; apply(); });
  $("converged").addEventListener("change", () => { shown.converged = $("converged").checked; apply(); });
  document.addEventListener("theme", () => { showChips(); apply(); });
  narrow.addEventListener("change", drawAll);
}

// ---- the table
function sortable() {
  const body = document.querySelector(".runs tbody"), heads = [...document.querySelectorAll(".runs thead th")];
  const value = (row, i) => {
    const text = row.cells[i].textContent, asNumber = Number(text);
    return text === "" || Number.isNaN(asNumber) ? text : asNumber;
  };
  heads.forEach((head, i) => head.addEventListener("click", () => {
    const up = head.getAttribute("aria-sort") !== "ascending", way = up ? 1 : -1;
    for (const other of heads) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", up ? "ascending" : "descending");
    const rows = [...body.rows].map((row) => [value(row, i), row]);
    rows.sort(([a], [b]) => way * (typeof a === typeof b ? (a < b ? -1 : a > b ? 1 : 0) : typeof a === "number" ? -1 : 1));
    body.append(...rows.map(([, row]) => row));
  }));
}

// What one jumps to must not end up under the filters.
function keepClear() {
  const bar = $("filters"), covers = getComputedStyle(bar).position === "sticky";
  root.style.scrollPaddingTop = `${covers ? bar.offsetHeight + 10 : 0}px`;
}

function begin() {
  const seeds = [...new Set(data.runs.map((run) => run.seed))].sort((a, b) => a - b);
  for (const seed of ["all", ...seeds]) $("seed").append(new Option(seed === "all" ? "all, means and intervals" : seed, seed));
  const several = data.planes[0].points.some((p) => p.n > 1), studies = Object.entries(data.studies);
  $("legend").textContent = `${several ? "Points are means over init seeds with 95% t intervals, small ones the runs" : "One seed a point, so no intervals: small differences are not findings"}. `
    + "Filled: converged. Hollow: still moving, or not known not to be, so it decides nothing. Ringed: no other converged point is better in both. Hover for numbers."
    + (studies.length ? ` Shapes: ${studies.map(([name, shape]) => `${name} ${shape}`).join(", ")}.` : "");
  sortable();
  listen();
  showChips();
  apply();
  new ResizeObserver(keepClear).observe($("filters"));
  document.body.dataset.ready = "yes";
}

begin();
