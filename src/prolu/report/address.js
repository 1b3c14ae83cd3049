// What is shown stands in the address, behind the #, so that a link shows the same:
// #family=relu+%2B+l1&family=topk&seed=0&converged=yes&run=RUN_ID
// Families are named if some are hidden. Several runs are those of one point. An address such as #verdicts, without an
// equals sign, names a section.

function addressOf(runs) {
  const words = new URLSearchParams();
  if (!allAreShown()) for (const family of shown.families.size ? shown.families : [""]) words.append("family", family);
  if (shown.seed !== "all") words.append("seed", shown.seed);
  if (shown.converged) words.append("converged", "yes");
  for (const run of runs) words.append("run", run);
  return words.size ? `#${words}` : location.pathname + location.search;
}

// Filters change the address in place, so that the back button leaves the page and not the last ten clicks.
function keepAddress() {
  history.replaceState(history.state, "", addressOf(shown.runs));
}

// To open a run is a step that the back button takes back; from run to run it is the same step.
function openRuns(runs) {
  if (!runs.length) return;
  if (shown.runs.length) history.replaceState(history.state, "", addressOf(runs));
  else history.pushState({ opened: true }, "", addressOf(runs));
  shown.runs = runs;
  showPanel();
}

function closeRuns() {
  if (!shown.runs.length) return;
  shown.runs = [];
  if (history.state?.opened) history.back();
  else keepAddress();
}

// Take what the address says for what is shown; what this study does not have is left out.
function readAddress() {
  const words = new URLSearchParams(location.hash.includes("=") ? location.hash.slice(1) : "");
  const families = words.getAll("family");
  shown.families = new Set(Object.keys(data.families).filter((family) => !families.length || families.includes(family)));
  const seed = words.get("seed");
  shown.seed = [...$("seed").options].some((option) => option.value === seed) ? seed : "all";
  shown.converged = words.get("converged") === "yes";
  shown.runs = words.getAll("run").filter((id) => runsById.has(id));
  $("seed").value = shown.seed;
  $("converged").checked = shown.converged;
}

addEventListener("popstate", () => {
  if (location.hash && !location.hash.includes("=")) return; // a section: the filters stay as they are
  const before = addressOf([]);
  readAddress();
  if (addressOf([]) !== before) apply();
  showPanel();
});
