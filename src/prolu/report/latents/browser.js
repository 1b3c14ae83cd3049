// The page of one SAE's latents: a list to sort, filter and search, and beside it all about the chosen latent.
// `facts` stands before this script in the page; everything else is in the files of the folder data/.

const unit = facts.rows ? "row" : "token"; // what the latents are active on
const narrow = matchMedia("(max-width: 820px)"); // on a phone the list and the latent are seen one at a time

// ---- data: a page opened from the disk may not fetch files, but it may load scripts, so each data file calls put()
const received = {};
const requests = {};

function put(name, value) {
  received[name] = value;
}

function load(name) {
  requests[name] ??= new Promise((resolve, reject) => {
    const script = document.createElement("script");
    script.src = `data/${name}.js`;
    script.onload = () => resolve(received[name]);
    script.onerror = () => {
      delete requests[name]; // so that the next call tries again
      reject(new Error(`data/${name}.js cannot be read: is the folder complete?`));
    };
    document.head.append(script);
  });
  return requests[name];
}

const token = (index) => make("span", { class: "t" }, ...(index < 0 ? ["–"] : spelled(tokens[index], true)));

// ---- the list: only the rows in sight are elements of the page, since an SAE may have tens of thousands of latents
const BANDS = [
  ["all latents", () => true],
  ["alive", (density) => density > 0],
  ["dead in this sample", (density) => density === 0],
  ["density below 0.1%", (density) => density > 0 && density < 0.001],
  ["density 0.1 to 1%", (density) => density >= 0.001 && density < 0.01],
  ["density 1 to 10%", (density) => density >= 0.01 && density < 0.1],
  ["density over 10%", (density) => density >= 0.1],
];
let list; // data/list.js: an array per quantity, with an entry per latent
let tokens; // data/tokens.js: the texts of tokens
let searchIndex = null; // data/search.js, loaded at the first search: tokens (by number) per latent
let columns; // of the list
let sorting = { by: "max", up: false };
let order = []; // the latents that the filters leave, sorted
let selected = -1; // the latent that is shown; -1 for none

function defineColumns() {
  // `kind` is a class: columns that are `wide` are left out on a phone. `about` is said when one points at the head.
  const column = (key, title, values, show, width, kind = "", about = title) => ({ key, title, values, show, width, kind, about });
  const ids = Uint32Array.from(list.density, (_, i) => i);
  columns = [
    column("id", "latent", ids, (i) => String(i), "minmax(3.8rem, .7fr)"),
    column("token", facts.rows?.labels ? "label" : unit, null, (i) => token(list.token[i]), "minmax(4.4rem, 2fr)", "token", `the ${unit} on which it is most strongly active`),
    column("density", "density", list.density, (i) => percent(list.density[i]), "minmax(4.2rem, 1fr)", "", `fraction of ${unit}s on which it is active`),
    column("max", "max", list.max, (i) => number(list.max[i]), "minmax(3.4rem, .9fr)", "", "largest activation"),
    column("mean", "mean", list.mean, (i) => number(list.mean[i]), "minmax(3.4rem, .9fr)", "wide", `mean activation over the ${unit}s on which it is active`),
    ...Object.entries(list.own).map(([name, values]) =>
      column(name, name, values, (i) => number(values[i]), "minmax(4.5rem, 1fr)", "wide", `the parameter ${name} of its nonlinearity`)),
    ...(list.cosine
      ? [column("cosine", "cos", list.cosine, (i) => number(list.cosine[i]), "minmax(3.2rem, .8fr)", "wide", "cosine of its encoder column and its decoder row")]
      : []),
  ];
  // Each parameter of the nonlinearity is a column more, for which the list takes some width from the latent.
  document.documentElement.style.setProperty("--list", `max(38%, ${24.5 + 4.5 * Object.keys(list.own).length}rem)`);
}

function showHead() {
  const widths = columns.filter((c) => c.kind !== "wide" || !narrow.matches).map((c) => c.width);
  $("rows").style.setProperty("--columns", widths.join(" "));
  $("head").replaceChildren(...columns.map((c) => {
    const cell = make("span", { class: c.kind, role: "columnheader" });
    const arrow = sorting.by === c.key ? (sorting.up ? " ↑" : " ↓") : "";
    if (arrow) cell.setAttribute("aria-sort", sorting.up ? "ascending" : "descending");
    const button = make("button", { type: "button", title: `sort by ${c.about}` }, c.title + arrow);
    button.addEventListener("click", () => {
      sorting = { by: c.key, up: sorting.by === c.key ? !sorting.up : c.key === "id" || c.key === "token" };
      showHead();
      arrange();
    });
    cell.append(button);
    return cell;
  }));
}

// Filter, search and sort.
function arrange() {
  const inBand = BANDS[$("band").value][1];
  const found = matches($("query").value, $("where").value);
  order = [];
  for (let i = 0; i < list.density.length; i++) if (inBand(list.density[i]) && (!found || found(i))) order.push(i);
  const way = sorting.up ? 1 : -1;
  const { key, values } = columns.find((c) => c.key === sorting.by);
  const text = (i) => (list.token[i] < 0 ? "" : tokens[list.token[i]].trim());
  const compareTexts = (a, b) => (text(a) < text(b) ? -1 : text(a) > text(b) ? 1 : 0);
  const compare = key === "token" ? compareTexts : (a, b) => values[a] - values[b];
  order.sort((a, b) => way * compare(a, b) || a - b); // equal ones by number
  $("count").textContent = order.length === list.density.length
    ? `${whole(order.length)} latents` : `${whole(order.length)} of ${whole(list.density.length)} latents`;
  $("rows").setAttribute("aria-rowcount", order.length);
  $("rows").scrollTop = 0;
  showRows();
}

// Return a test for latents, or null if all are wanted. `#12` finds the numbers that begin so; anything else finds tokens
// that contain it, and a plain number also the latent of that number.
function matches(query, where) {
  if (query === "") return null;
  if (/^#\d*$/.test(query)) return (i) => String(i).startsWith(query.slice(1));
  if (!searchIndex) return () => false; // not loaded yet: search() calls again
  const wanted = query.toLowerCase();
  const hit = tokens.map((text) => text.toLowerCase().includes(wanted));
  const some = (indices) => indices.some((t) => hit[t]);
  const id = /^\d+$/.test(query) ? Number(query) : -1;
  return (i) => i === id || (where !== "promoted" && some(searchIndex.on[i])) || (where !== "examples" && some(searchIndex.promoted[i]));
}

const rowHeight = () => (narrow.matches ? 40 : 32); // as in the style sheet

// Make the rows in sight, and some above and below so that scrolling shows no gap.
function showRows() {
  const height = rowHeight();
  const rows = $("rows");
  $("window").style.height = `${Math.max(order.length, 2) * height}px`; // two rows have room for "No match."
  const first = Math.max(0, Math.floor(rows.scrollTop / height) - 8);
  const last = Math.min(order.length, first + Math.ceil(rows.clientHeight / height) + 16);
  $("visible").style.transform = `translateY(${first * height}px)`;
  const shown = [];
  for (let place = first; place < last; place++) {
    const i = order[place];
    const cells = columns.map((c) => make("span", { class: c.kind, role: "gridcell" }, c.show(i)));
    const kind = list.density[i] === 0 ? "row dead" : "row";
    shown.push(make("div", { class: kind, role: "row", "data-id": i, "aria-rowindex": place + 1, "aria-selected": i === selected }, ...cells));
  }
  if (!order.length) shown.push(make("p", { class: "none" }, "No match."));
  $("visible").replaceChildren(...shown);
}

// Scroll the list just so far that the row of a latent is in sight.
function reveal(id) {
  const place = order.indexOf(id);
  if (place < 0) return;
  const rows = $("rows");
  const height = rowHeight();
  const top = place * height;
  const bottom = top + height + $("head").offsetHeight; // the head covers the first row's height
  if (top < rows.scrollTop) rows.scrollTop = top - height;
  else if (bottom > rows.scrollTop + rows.clientHeight) rows.scrollTop = bottom - rows.clientHeight + height;
}

// ---- one latent
async function show(id) {
  selected = id;
  document.body.classList.toggle("open", id >= 0);
  reveal(id);
  showRows();
  if (id < 0) return $("detail").replaceChildren(make("p", { class: "quiet" }, "Choose a latent."));
  try {
    const [shard, text] = await Promise.all([load(`details-${Math.floor(id / facts.shard)}`), load("text")]);
    if (selected !== id) return; // another latent was chosen while the files were loading
    $("detail").replaceChildren(...described(id, shard[id % facts.shard], text));
  } catch (problem) {
    $("detail").replaceChildren(make("p", {}, problem.message));
  }
  if (narrow.matches) scrollTo(0, 0);
  else $("detail").scrollTop = 0;
}

function described(id, latent, text) {
  const n = latent.on; // the number of tokens on which it is active
  const figures = [
    ["density", n ? `${percent(list.density[id])} (${whole(n)} of ${whole(facts.n_tokens)} ${unit}s)` : `0: dead in this sample of ${whole(facts.n_tokens)} ${unit}s`],
    ["max", number(list.max[id])],
    ["mean where active", number(list.mean[id])],
    ...Object.entries(list.own).map(([name, values]) => [name, number(values[id])]),
    ...(list.cosine ? [["cos(encoder, decoder)", number(list.cosine[id])]] : []),
  ];
  const pairs = (title, items, about, kind = "") => make("div", { class: kind }, make("h3", { title: about }, title), make("ul", { class: "pairs" }, ...items));
  const item = (left, value) => make("li", {}, left, make("span", { class: "value" }, value));
  const effect = (rows) => rows.map(([t, value]) => item(token(t), (value > 0 ? "+" : "") + value.toFixed(2)));
  const near = latent.near.map(([other, cosine]) => {
    const link = make("a", { href: `#${other}` }, `${other} `, token(list.token[other]));
    return item(link, cosine.toFixed(2));
  });
  const lists = facts.unembedding
    ? [pairs("Promoted tokens", effect(latent.promoted), "the tokens whose logits it raises most"),
       pairs("Suppressed tokens", effect(latent.suppressed), "the tokens whose logits it lowers most")]
    : [];
  return [
    make("div", { class: "heading" }, make("a", { class: "tolist", href: "#" }, "← all latents"), make("h2", {}, `Latent ${id}`),
      stepButton("‹", -1, "Previous latent in the list (k)"), stepButton("›", 1, "Next latent in the list (j)")),
    named(make("dl", { class: "figures" }), figures),
    make("div", { class: "panels" }, histogram(latent, id), ...lists, pairs("Nearest latents", near, "the latents whose decoder rows have the largest cosine with its own", "near")),
    ...examples("Strongest", latent.top, id, text, n ? (facts.rows ? "" : "at most one per token block") : "none: the latent is dead in this sample"),
    // The bands are in the file with the weakest first; the page goes on downwards from the strongest.
    ...latent.bands.map((band, b) => [band, b]).reverse().flatMap(([band, b]) => band.length
      ? examples(`${100 * b / facts.n_bands}–${100 * (b + 1) / facts.n_bands}% of its activations`, band, id, text, "drawn at random") : []),
  ];
}

function named(dl, figures) {
  dl.append(...figures.map(([name, value]) => make("div", {}, make("dt", {}, name), make("dd", {}, value))));
  return dl;
}

function stepButton(sign, by, label) {
  const button = make("button", { type: "button", "aria-label": label, title: label }, sign);
  button.addEventListener("click", () => move(by));
  return button;
}

function histogram(latent, id) {
  const counts = latent.histogram;
  const last = counts.findLastIndex((n) => n > 0) + 1; // bins beyond the largest activation are not drawn
  const most = Math.max(...counts);
  const panel = make("div", { class: "chart" }, make("h3", {}, "Activations where it is active"));
  if (!last) {
    panel.append(make("p", { class: "quiet" }, "None."));
    return panel;
  }
  const width = 300; // in units of the drawing
  const height = 140;
  const step = width / last;
  const each = latent.reach / counts.length; // the width of a bin, as an activation
  const svg = make("svg", { class: "histogram", viewBox: `0 0 ${width} ${height + 18}`, preserveAspectRatio: "none", role: "img",
    "aria-label": `histogram of activations from 0 to ${number(list.max[id])}, at most ${most} in a bin` });
  counts.slice(0, last).forEach((n, i) => {
    const h = n ? Math.max(1.5, height * n / most) : 0; // a bin with few is still seen
    const at = { x: i * step + 0.3, width: Math.max(step - 0.6, 0.5) };
    const tip = `${number(i * each)} to ${number((i + 1) * each)}: ${whole(n)}`;
    // The cover fills the bin's whole height, so that one need not point at the bar itself.
    svg.append(make("g", { "data-tip": tip }, make("rect", { class: "cover", ...at, y: 0, height }),
      make("rect", { class: "bar", ...at, y: height - h, height: h })));
  });
  svg.append(make("line", { x1: 0, x2: width, y1: height, y2: height }));
  panel.append(svg, make("div", { class: "axis" }, make("span", {}, "0"), make("span", {}, `most in a bin: ${whole(most)}`), make("span", {}, number(last * each))));
  return panel;
}

function examples(title, rows, id, text, note) {
  const heading = make("h3", {}, title, make("span", { class: "quiet note" }, ` ${note}`));
  const shown = facts.rows
    ? [make("div", { class: "cards" }, ...rows.map((row) => card(row, text)))] : rows.map((row) => example(row, id, text));
  return [make("section", { class: "examples" }, heading, ...shown)];
}

// An example of a study of rows: the row's image or label, and the activation on it.
function card([position, , , pairs], text) {
  const row = text.rows[position];
  const each = facts.rows.per_image;
  const image = Math.floor(row / each);
  const place = row % each;
  const value = number(pairs[1]);
  return make("figure", { class: "card", "data-tip": `row ${row}: ${value}` },
    facts.rows.images ? make("div", { class: "image" }, make("img", { src: `data/images/${image}.png`, alt: `image ${image}`, loading: "lazy" }), patch(place, each)) : null,
    make("figcaption", {}, facts.rows.labels ? token(text.tokens[position]) : null,
      make("span", { class: "quiet" }, each > 1 ? `image ${image}, part ${place}` : `row ${row}`), make("b", {}, value)));
}

// The outline of a row's part of its image: the parts of an image are its patches, line by line, if they make a square.
function patch(place, each) {
  const side = Math.sqrt(each);
  if (each === 1 || !Number.isInteger(side)) return null;
  const percent = (n) => `${100 * n / side}%`;
  return make("span", { class: "patch", style: `left: ${percent(place % side)}; top: ${percent(Math.floor(place / side))}; width: ${percent(1)}; height: ${percent(1)}` });
}

// `pairs` lists the activations above 0 in the window: offset, value, offset, value ...
function example([position, start, width, pairs], id, text) {
  const values = new Map();
  for (let p = 0; p < pairs.length; p += 2) values.set(start + pairs[p], pairs[p + 1]);
  const shown = [];
  for (let at = start; at < start + width; at++) {
    const value = values.get(at) ?? 0;
    const written = spelled(tokens[text.tokens[at]], false);
    const kind = (value > 0 ? "active" : "") + (at === position ? " peak" : "");
    // From 0.12, because a weak activation must still be told from none.
    const style = value > 0 ? `--strength: ${(0.12 + 0.88 * value / list.max[id]).toFixed(3)}` : "";
    shown.push(make("span", { class: kind, style, "data-tip": number(value) }, ...written));
  }
  const block = Math.floor(position / text.ctx);
  const place = position % text.ctx;
  return make("div", { class: "example" },
    make("span", { class: "value", title: `token ${place} of token block ${block}` }, number(values.get(position) ?? 0)), make("div", { class: "text" }, ...shown));
}

// ---- moving about: the address ends in #NUMBER of the latent, so that it can be copied, and Back goes back
const idInAddress = () => {
  const id = /^#\d+$/.test(location.hash) ? Number(location.hash.slice(1)) : -1;
  if (id >= 0 && id < list.density.length) return id;
  return narrow.matches ? -1 : order[0] ?? 0; // a phone shows the list first
};

function move(by) {
  const place = order.indexOf(selected);
  const next = order[place < 0 ? 0 : place + by];
  if (next === undefined) return;
  // Replaced and not added, or Back would go through every latent that was passed.
  history.replaceState(null, "", `#${next}`);
  show(next);
}

function onKey(event) {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.target.matches("input, select")) {
    if (event.key === "Escape") event.target.blur();
    return;
  }
  const arrows = !$("detail").contains(document.activeElement); // there the arrow keys scroll
  const step = { j: 1, k: -1, ...(arrows && { ArrowDown: 1, ArrowUp: -1 }) }[event.key];
  if (step) move(step);
  else if (event.key === "/") $("query").focus();
  else return;
  event.preventDefault();
}

async function search() {
  if ($("query").value && !searchIndex) {
    $("count").textContent = "loading the index of tokens…";
    searchIndex = await load("search");
  }
  arrange();
}

function showFacts() {
  named($("figures"), [
    ["latents alive", `${whole(facts.n_alive)} of ${whole(facts.n_latents)}`],
    [`${unit}s`, whole(facts.n_tokens)],
    ...Object.entries(facts.figures).map(([name, value]) => [name, typeof value === "number" ? number(value) : value]),
  ]);
  const withoutMean = facts.unembedding?.removes_mean
    ? ", less its mean over d_model (the final norm is a LayerNorm)," : "";
  const effect = facts.unembedding === null
    ? "The hook is not as wide as the residual stream, so no tokens are promoted or suppressed directly."
    : `Promoted and suppressed tokens are those with the largest and the smallest entries of W_dec[i] @ W_U: the latent's decoder row${withoutMean} times the unembedding, with the gain of the final norm. The norm's division and offset, and the model's blocks in between, are left out.`;
  const transcoder = facts.transcoder;
  const notes = [
    ...(transcoder
      ? [`This is a ${transcoder.skip ? "skip " : ""}transcoder. Its latents read the activations at ${transcoder.reads}: the examples show on which tokens. Their decoder rows write at ${transcoder.writes}: promoted and suppressed tokens and nearest latents are of what they write.${transcoder.skip ? " What the skip connection writes belongs to no latent, and is not shown." : ""}`]
      : []),
    `A latent is active on a ${unit} if its activation there is above 0. Activations are those of the SAE's normalised space, on ${whole(facts.n_tokens)} held-out ${unit}s${facts.rows ? "" : "; the first position of every token block, BOS, is left out"}. A latent that is active on none of these is dead in this sample, and may be active on others.`,
    `Density is the fraction of those ${unit}s on which a latent is active. ${facts.rows ? "The strongest examples come first." : "The strongest examples are at most one per token block."} The others are drawn at random, a few from each fifth of at most ${facts.sample} activations of the latent, which are drawn at random too. ${facts.rows ? "The number of a row is its place in its file, from 0." : "The shade of a token is its activation as a fraction of the latent's largest; the number beside an example is the activation of the outlined token."}`,
    ...(facts.rows ? [] : [effect]),
  ];
  $("notes").append(...notes.map((note) => make("p", {}, note)));
  $("config").textContent = JSON.stringify(facts.config, null, 1);
}

async function begin() {
  showFacts();
  $("band").append(...BANDS.map(([name], i) => make("option", { value: i }, name)));
  [list, tokens] = await Promise.all([load("list"), load("tokens")]);
  defineColumns();
  showHead();
  arrange();
  show(idInAddress());
  $("rows").addEventListener("scroll", showRows, { passive: true });
  $("visible").addEventListener("click", (event) => {
    const row = event.target.closest(".row");
    if (row) location.hash = row.dataset.id;
  });
  addEventListener("hashchange", () => show(idInAddress()));
  addEventListener("resize", () => { showHead(); showRows(); });
  addEventListener("keydown", onKey);
  addEventListener("pointerover", showTip);
  addEventListener("pointerdown", showTip); // a phone has no pointer that hovers
  // Loaded while the first letters are typed; if that fails, search() tries again.
  $("query").addEventListener("focus", () => load("search").catch(() => {}));
  for (const name of ["query", "where", "band"]) $(name).addEventListener("input", search);
  $("filters").addEventListener("submit", (event) => {
    event.preventDefault();
    const id = Number($("query").value.replace("#", ""));
    const exact = $("query").value !== "" && id in list.density ? id : order[0];
    if (exact !== undefined) location.hash = exact;
    $("query").blur();
  });
  document.body.dataset.ready = "yes"; // the tests wait for this
}

begin().catch((problem) => $("detail").replaceChildren(make("p", {}, problem.message)));
