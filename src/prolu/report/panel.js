// The panel of one run: how to load it, its settings, its training curves, how often its latents are active. For a point
// that is a mean over seeds the panel lists the runs.

// An element with its attributes and its content. Text is always text: names may come from strangers.
function element(name, attributes, ...content) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...content.filter((part) => part !== null));
  return made;
}

const shownValue = (value) => (typeof value === "string" ? value : typeof value === "number" ? String(Number(value.toPrecision(6))) : JSON.stringify(value)?.replaceAll(",", ", "));
const CONVERGED = new Map([[true, "yes"], [false, "no"], [null, "not known"]]);

// The folder of a run, for Python and the shell: a page on the disk knows where it lies, one that is served does not.
function pathOf(folder) {
  if (location.protocol !== "file:") return folder;
  const address = new URL(folder.split("/").map(encodeURIComponent).join("/"), location.href);
  return decodeURIComponent(address.pathname);
}

const quotedForShell = (path) => (/^[\w@%+=:,./-]+$/.test(path) ? path : `'${path.replaceAll("'", "'\\''")}'`);

function code(text) {
  const button = element("button", { type: "button", class: "copy" }, "Copy");
  const block = element("pre", { tabindex: "0" }, text);
  button.addEventListener("click", async () => {
    try {
      await navigator.clipboard.writeText(text);
      button.textContent = "Copied";
    } catch { // some browsers give pages from the disk no clipboard
      getSelection().selectAllChildren(block);
      button.textContent = "Selected";
    }
    setTimeout(() => { button.textContent = "Copy"; }, 1500);
  });
  return element("div", { class: "code" }, block, button);
}

function facts(pairs) {
  return element("dl", {}, ...pairs.map(([name, value]) => element("div", {}, element("dt", {}, name), element("dd", {}, value))));
}

function linkTo(run, text) {
  const link = element("a", { href: addressOf([run.id]) }, text);
  link.addEventListener("click", (event) => {
    if (event.ctrlKey || event.metaKey) return;
    event.preventDefault();
    openRuns([run.id]);
  });
  return link;
}

function scoresOf(run) {
  const shownScores = ["l0", "degradation", "recovered", "kl", "mse", "fvu", "dead_fraction"].filter((name) => run[name] !== null && run[name] !== undefined);
  const state = run.progress !== null ? ["training", `${Math.floor(100 * run.progress)}% in the last checkpoint`] : ["converged", CONVERGED.get(run.converged)];
  return facts([...shownScores.map((name) => [data.names[name] ?? name, number(run[name])]), state]);
}

function howToLoad(run) {
  const path = pathOf(run.folder);
  const study = path.replace(/\/?[^/]*$/, "") || ".";
  const name = path.split("/").pop(); // a run has the name of its folder
  const loading = run.folder ? code(`import prolu\n\nsae = prolu.SAE.load(${JSON.stringify(path)})`)
    : element("p", { class: "quiet" }, run.progress !== null ? "It has no result yet." : "Its weights are not beside its results.");
  if (run.page) return [loading, element("p", {}, element("a", { href: run.page }, "Pages of its latents"), ": the text on which each is active.")];
  if (!run.folder) return [loading];
  return [loading, element("p", {}, "It has no pages of its latents yet. This command makes them:"),
    code(`prolu report ${quotedForShell(study)} --latent-pages ${quotedForShell(name)}`)];
}

function settingsOf(run) {
  const changed = Object.entries(run.changed).map(([name, value]) => [name, shownValue(value)]);
  const others = Object.entries(data.usual).filter(([name]) => !(name in run.changed) && !run.unknown.includes(name));
  const unknown = run.unknown.length ? element("p", { class: "quiet" }, `Not recorded: ${run.unknown.join(", ")}.`) : null;
  return [
    facts(changed),
    element("details", {}, element("summary", {}, `${others.length} settings with their defaults`), facts(others.map(([name, value]) => [name, shownValue(value)])), unknown),
  ];
}

function drawDensities(id, run) {
  const edges = data.densityEdges;
  const names = run.density.map((_, i) => (i === 0 ? `under ${number(edges[0])}` : i === edges.length ? `over ${number(edges[i - 1])}` : `${number(edges[i - 1])} to ${number(edges[i])}`));
  const look = layout("density: fraction of held-out tokens on which a latent is active", "number of latents", false, false);
  look.xaxis = { ...look.xaxis, tickvals: edges.map((_, i) => i + 0.5), ticktext: edges.map((edge, i) => (i % 2 ? "" : `${Number(edge.toPrecision(1))}`)) };
  draw(id, "Latents by their density", [{ type: "bar", x: run.density.map((_, i) => i), y: run.density, width: 0.94, marker: { color: ink(run.family) }, text: names, textposition: "none", hovertemplate: "%{text}: %{y} latents<extra></extra>" }], look);
}

function figure(title, id) {
  return element("figure", {}, element("figcaption", {}, title), element("div", { class: "plot small", id }));
}

// What runs that differ in their seed only have in common. With a target L0 the coefficient is adjusted, and differs too.
function settingOf({ family, study, setting, changed }) {
  const { init_seed: _, coeff, ...others } = changed;
  return JSON.stringify([family, study, setting, others, "target_l0" in others ? null : coeff]);
}

function showOne(run) {
  const others = data.runs.filter((other) => other !== run && settingOf(other) === settingOf(run));
  const siblings = others.length ? element("p", {}, "Same setting: ", ...others.flatMap((other, i) => [i ? ", " : "", linkTo(other, `seed ${other.seed}`)]), ".") : null;
  const curves = data.curvesOfOne.filter(({ column }) => run.curve[column].some((value) => value !== null));
  $("run-title").textContent = run.id;
  $("run-content").replaceChildren(
    element("p", { class: "quiet" }, `${run.family}, ${run.study ? `${run.study}, ` : ""}${run.setting}, seed ${run.seed}`),
    ...(siblings ? [siblings] : []),
    element("h3", {}, "Scores"), scoresOf(run),
    element("h3", {}, "Load it"), ...howToLoad(run),
    element("h3", {}, "Settings that differ from the defaults"), ...settingsOf(run),
    element("h3", {}, "Training"),
    ...(curves.length ? [element("div", { class: "curves" }, ...curves.map((curve, i) => figure(curve.title, `run-curve-${i}`)))]
      : [element("p", { class: "quiet" }, run.progress !== null ? "It has no checkpoint with a line of its curve yet." : "It has no training curve: it was not trained here.")]),
    element("h3", {}, "Densities of its latents"),
    run.density ? figure("Latents by the fraction of tokens on which they are active", "run-density") : element("p", { class: "quiet" }, "Its results do not hold them."),
  );
  curves.forEach((curve, i) => drawCurve(`run-curve-${i}`, curve, [run]));
  if (run.density) drawDensities("run-density", run);
}

function showSeveral(runs) {
  const [first] = runs;
  const metric = first.degradation === null ? "fvu" : "degradation";
  const rows = runs.map((run) => element("tr", {}, element("th", { scope: "row" }, linkTo(run, `seed ${run.seed}`)),
    ...["l0", metric, "mse"].map((name) => element("td", { class: "n" }, number(run[name]))), element("td", {}, CONVERGED.get(run.converged).split(":")[0])));
  const heads = ["run", data.names.l0, data.names[metric], data.names.mse, "converged"];
  $("run-title").textContent = `${first.family}, ${first.setting}`;
  $("run-content").replaceChildren(
    element("p", { class: "quiet" }, `${first.study ? `${first.study}, ` : ""}the mean of ${runs.length} runs that differ in their seed`),
    element("div", { class: "scroll" }, element("table", { class: "seeds" }, element("thead", {}, element("tr", {}, ...heads.map((head, i) => element("th", { scope: "col", class: i && i < 4 ? "n" : "" }, head)))), element("tbody", {}, ...rows))),
  );
}

// Bring the panel to what the address says.
function showPanel() {
  const panel = $("run");
  if (!shown.runs.length) { if (panel.open) panel.close(); return; }
  const isNew = panel.dataset.runs !== shown.runs.join("\n") || !panel.open;
  panel.dataset.runs = shown.runs.join("\n");
  if (!panel.open) panel.showModal(); // before figures are drawn, which measure their place
  const runs = shown.runs.map((id) => runsById.get(id));
  if (runs.length === 1) showOne(runs[0]);
  else showSeveral(runs);
  if (!isNew) return;
  panel.scrollTop = 0;
  $("run-title").focus();
}

function listenInPanel() {
  const panel = $("run");
  panel.addEventListener("close", closeRuns); // by Escape, too
  panel.addEventListener("click", (event) => { if (event.target === panel) panel.close(); }); // beside the panel
  panel.querySelector(".close").addEventListener("click", () => panel.close());
}
