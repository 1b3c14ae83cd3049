// The filters and the table of runs, and the beginning of the page.

// ---- filters
// The line and the marker of a family as its figures draw them.
function swatch(family) {
  const { symbol: shape, dash } = data.families[family];
  const colour = ink(family);
  const marks = { circle: '<circle cx="17" cy="7" r="4"/>', square: '<rect x="13" y="3" width="8" height="8"/>', "triangle-up": '<path d="M17 2l5 9h-10z"/>',
    "triangle-down": '<path d="M17 12l5-9h-10z"/>', diamond: '<path d="M17 1.5l5 5.5l-5 5.5l-5-5.5z"/>', cross: '<path d="M15 2h4v3h3v4h-3v3h-4v-3h-3v-4h3z"/>',
    "triangle-left": '<path d="M12 7l9-5v10z"/>', "triangle-right": '<path d="M22 7l-9-5v10z"/>', x: '<path d="M14 2l3 3l3-3l2 2l-3 3l3 3l-2 2l-3-3l-3 3l-2-2l3-3l-3-3z"/>' };
  const dashes = dash === "solid" ? "" : `stroke-dasharray="${dash.replaceAll("px", "")}"`;
  return `<svg viewBox="0 0 34 14" aria-hidden="true"><line x1="0" x2="34" y1="7" y2="7" stroke="${colour}" stroke-width="2" ${dashes}/>`
    + `<g fill="${colour}">${marks[shape] ?? ""}</g></svg>`;
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

// What the reader does with a filter: the page follows, and the address keeps it.
function filtered() {
  apply();
  keepAddress();
}

// Bring the page to what the filters say.
function apply() {
  for (const chip of $("chips").children) chip.setAttribute("aria-pressed", shown.families.has(chip.dataset.family));
  let n = 0;
  for (const row of document.querySelectorAll(".runs tbody tr")) {
    const run = runsById.get(row.dataset.run); // a table in which the reader is may still have others
    row.hidden = !run || !isShown(run);
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
    filtered();
  });
  $("all").addEventListener("click", () => {
    shown.families = new Set(allAreShown() ? [] : Object.keys(data.families));
    filtered();
  });
  $("seed").addEventListener("change", () => { shown.seed = $("seed").value; filtered(); });
  $("converged").addEventListener("change", () => { shown.converged = $("converged").checked; filtered(); });
  document.addEventListener("theme", () => { showChips(); apply(); showPanel(); });
  narrow.addEventListener("change", drawAll);
  // Of the whole page, because tables are replaced while a study trains.
  document.querySelector("main").addEventListener("click", (event) => {
    const head = event.target.closest("#table thead th");
    if (head) sortBy(head.cellIndex);
    const row = event.target.closest(".runs tbody tr");
    if (!row || event.target.closest("a:not(.open)") || event.ctrlKey || event.metaKey || !getSelection().isCollapsed) return;
    event.preventDefault();
    openRuns([row.dataset.run]);
  });
}

// ---- the table
const order = { column: -1, up: true }; // as it is in the file, until the reader chooses a column

function sortBy(column) {
  order.up = order.column !== column || !order.up;
  order.column = column;
  sortRows();
}

function sortRows() {
  const body = document.querySelector("#table tbody");
  if (order.column < 0 || !body) return;
  const value = (row) => {
    const text = row.cells[order.column].textContent;
    const asNumber = Number(text);
    return text === "" || Number.isNaN(asNumber) ? text : asNumber;
  };
  for (const head of document.querySelectorAll("#table thead th")) {
    if (head.cellIndex === order.column) head.setAttribute("aria-sort", order.up ? "ascending" : "descending");
    else head.removeAttribute("aria-sort");
  }
  const rows = [...body.rows].map((row) => [value(row), row]);
  const compare = (a, b) => (typeof a === typeof b ? (a < b ? -1 : a > b ? 1 : 0) : typeof a === "number" ? -1 : 1); // numbers before text
  rows.sort(([a], [b]) => (order.up ? 1 : -1) * compare(a, b));
  body.append(...rows.map(([, row]) => row));
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
    "Filled markers have converged. Hollow ones had not when training ended, or it is not known.",
    "A ring marks the frontier: no other converged point is better on both axes.",
    "Point at a marker for its numbers; click it for its runs.",
  ];
  const studies = Object.entries(data.studies).map(([name, letter]) => `${letter} is ${name}`);
  if (studies.length) sentences.push(`A letter at the end of a line names its study: ${studies.join(", ")}.`);
  if (data.planes.length) $("legend").textContent = sentences.join(" "); // the page of one SAE has no planes
  followStudy(); // before anything changes what the server sent
  listen();
  listenInPanel();
  readAddress();
  showChips();
  apply();
  showPanel();
  new ResizeObserver(keepClear).observe($("filters"));
  document.body.dataset.ready = "yes"; // the tests wait for this
}

begin();
