// ---- data: script files that call put(), so that the page works from the disk
const $ = (id) => document.getElementById(id);
const received = {}, requests = {};

function put(name, value) {
  received[name] = value;
}

function load(name) {
  requests[name] ??= new Promise((resolve, reject) => {
    const script = document.createElement("script");
    script.src = `data/${name}.js`;
    script.onload = () => resolve(received[name]);
    script.onerror = () => {
      delete requests[name];
      reject(new Error(`data/${name}.js cannot be read; is the folder whole?`));
    };
    document.head.append(script);
  });
  return requests[name];
}

// ---- elements; texts only ever become text nodes
function make(tag, attributes = {}, ...children) {
  const svg = ["svg", "g", "rect", "line", "text"].includes(tag);
  const element = svg ? document.createElementNS("http://www.w3.org/2000/svg", tag) : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children.filter((child) => child !== null));
  return element;
}

// White space shows as faint signs: all of it where a token stands alone, line ends, tabs and runs of it in a text.
// So do control characters, which have no sign of their own.
function spelled(text, alone) {
  const signs = alone ? /[\u0000- \u007f-\u00a0]/g : /[\u0000-\u001f\u007f-\u009f]|  +/g;
  const show = { "\n": "↵", "\r": "␍", "\t": "→" }, parts = [];
  let end = 0;
  for (const found of text.matchAll(signs)) {
    parts.push(text.slice(end, found.index));
    const code = found[0].charCodeAt(0), blank = code === 32 || code === 160;
    const sign = show[found[0]] ?? (blank ? "·".repeat(found[0].length) : `\\x${code.toString(16).padStart(2, "0")}`);
    parts.push(make("span", { class: "ws" }, sign));
    end = found.index + found[0].length;
  }
  return [...parts, text.slice(end)];
}

const token = (index) => make("span", { class: "t" }, ...(index < 0 ? ["–"] : spelled(tokens[index], true)));
const number = (value) => (value === 0 ? "0" : Math.abs(value) < 0.001 || Math.abs(value) >= 1e5
  ? value.toExponential(1) : Number(value.toPrecision(3)).toString());
const percent = (share) => (share === 0 ? "never" : share < 0.0001 ? "<0.01%" : `${Number((100 * share).toPrecision(2))}%`);
const whole = (value) => value.toLocaleString("en");

// ---- the list: only the rows in sight are in the page
const BANDS = [
  ["all latents", () => true], ["alive", (d) => d > 0], ["never on", (d) => d === 0],
  ["density under 0.1%", (d) => d > 0 && d < 0.001], ["0.1 to 1%", (d) => d >= 0.001 && d < 0.01],
  ["1 to 10%", (d) => d >= 0.01 && d < 0.1], ["over 10%", (d) => d >= 0.1],
];
let list, tokens, columns, order = [], sorting = { by: "max", up: false }, selected = -1, searchIndex = null;

function defineColumns() {
  const column = (key, title, values, show, width, kind = "", about = title) => ({ key, title, values, show, width, kind, about });
  const ids = Uint32Array.from(list.density, (_, i) => i);
  columns = [
    column("id", "latent", ids, (i) => String(i), "minmax(3.8rem, .7fr)"),
    column("token", "token", null, (i) => token(list.token[i]), "minmax(4.4rem, 2fr)", "token", "token where it is strongest"),
    column("density", "density", list.density, (i) => percent(list.density[i]), "minmax(4.2rem, 1fr)", "", "share of tokens on which it is on"),
    column("max", "max", list.max, (i) => number(list.max[i]), "minmax(3.4rem, .9fr)", "", "largest activation"),
    column("mean", "mean", list.mean, (i) => number(list.mean[i]), "minmax(3.4rem, .9fr)", "wide", "mean activation where it is on"),
    ...Object.entries(list.own).map(([name, values]) =>
      column(name, name, values, (i) => number(values[i]), "minmax(4.5rem, 1fr)", "wide", `its own parameter ${name}`)),
    column("cosine", "cos", list.cosine, (i) => number(list.cosine[i]), "minmax(3.2rem, .8fr)", "wide", "cosine of its encoder column and decoder row"),
  ];
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

function arrange() {
  const wanted = BANDS[$("band").value][1], found = matches($("query").value, $("where").value);
  const ids = [];
  for (let i = 0; i < list.density.length; i++) if (wanted(list.density[i]) && (!found || found(i))) ids.push(i);
  const way = sorting.up ? 1 : -1, { key, values } = columns.find((c) => c.key === sorting.by);
  const text = (i) => (list.token[i] < 0 ? "" : tokens[list.token[i]].trim());
  ids.sort(key === "token" ? (a, b) => way * (text(a) < text(b) ? -1 : text(a) > text(b) ? 1 : 0) || a - b
    : (a, b) => way * (values[a] - values[b]) || a - b);
  order = ids;
  $("count").textContent = order.length === list.density.length
    ? `${whole(order.length)} latents` : `${whole(order.length)} of ${whole(list.density.length)} latents`;
  $("rows").setAttribute("aria-rowcount", order.length);
  $("rows").scrollTop = 0;
  showRows();
}

function matches(query, where) {
  if (query === "") return null;
  if (/^#\d*$/.test(query)) return (i) => String(i).startsWith(query.slice(1));
  if (!searchIndex) return () => false;
  const wanted = query.toLowerCase();
  const hit = tokens.map((text) => text.toLowerCase().includes(wanted));
  const some = (indices) => indices.some((t) => hit[t]);
  const id = /^\d+$/.test(query) ? Number(query) : -1;
  return (i) => i === id || (where !== "promoted" && some(searchIndex.on[i])) || (where !== "on" && some(searchIndex.promoted[i]));
}

const rowHeight = () => (narrow.matches ? 40 : 32);

function showRows() {
  const height = rowHeight(), rows = $("rows");
  $("window").style.height = `${Math.max(order.length, 2) * height}px`;
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
  if (!order.length) shown.push(make("p", { class: "none" }, "No latent is like that."));
  $("visible").replaceChildren(...shown);
}

function reveal(id) {
  const place = order.indexOf(id), rows = $("rows"), height = rowHeight(), head = $("head").offsetHeight;
  if (place < 0) return;
  const top = place * height, bottom = top + height + head;
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
    if (selected !== id) return;
    $("detail").replaceChildren(...described(id, shard[id % facts.shard], text));
  } catch (problem) {
    $("detail").replaceChildren(make("p", {}, problem.message));
  }
  if (narrow.matches) scrollTo(0, 0);
  else $("detail").scrollTop = 0;
}

function described(id, latent, text) {
  const n = latent.on;
  const figures = [
    ["density", n ? `${percent(list.density[id])} (${whole(n)} of ${whole(facts.n_tokens)} tokens)` : `never on in ${whole(facts.n_tokens)} tokens`],
    ["max", number(list.max[id])], ["mean where on", number(list.mean[id])],
    ...Object.entries(list.own).map(([name, values]) => [name, number(values[id])]),
    ["cos(encoder, decoder)", number(list.cosine[id])],
  ];
  const pairs = (title, items, about, kind = "") => make("div", { class: kind }, make("h3", { title: about }, title), make("ul", { class: "pairs" }, ...items));
  const item = (left, value) => make("li", {}, left, make("span", { class: "value" }, value));
  const effect = (rows) => rows.map(([t, value]) => item(token(t), (value > 0 ? "+" : "") + value.toFixed(2)));
  const near = latent.near.map(([other, cosine]) => {
    const link = make("a", { href: `#${other}` }, `${other} `, token(list.token[other]));
    return item(link, cosine.toFixed(2));
  });
  const lists = facts.unembedding
    ? [pairs("Promoted tokens", effect(latent.promoted), "most positive effect on logits"),
       pairs("Suppressed tokens", effect(latent.suppressed), "most negative effect on logits")]
    : [];
  return [
    make("div", { class: "heading" }, make("a", { class: "tolist", href: "#" }, "← all latents"), make("h2", {}, `Latent ${id}`),
      stepButton("‹", -1, "Previous latent in the list (k)"), stepButton("›", 1, "Next latent in the list (j)")),
    named(make("dl", { class: "figures" }), figures),
    make("div", { class: "panels" }, histogram(latent, id), ...lists, pairs("Nearest latents", near, "cosine of decoder rows", "near")),
    ...examples("Strongest", latent.top, id, text, n ? "at most one a block of text" : "never on in this text"),
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
  const counts = latent.histogram, last = counts.findLastIndex((n) => n > 0) + 1, most = Math.max(...counts);
  const panel = make("div", { class: "chart" }, make("h3", {}, "Activations where it is on"));
  if (!last) {
    panel.append(make("p", { class: "quiet" }, "None."));
    return panel;
  }
  const width = 300, height = 140, step = width / last, each = latent.reach / counts.length;
  const svg = make("svg", { class: "histogram", viewBox: `0 0 ${width} ${height + 18}`, preserveAspectRatio: "none", role: "img",
    "aria-label": `histogram of activations from 0 to ${number(list.max[id])}, at most ${most} in a bin` });
  counts.slice(0, last).forEach((n, i) => {
    const h = n ? Math.max(1.5, height * n / most) : 0;
    const at = { x: i * step + 0.3, width: Math.max(step - 0.6, 0.5) };
    const tip = `${number(i * each)} to ${number((i + 1) * each)}: ${whole(n)}`;
    svg.append(make("g", { "data-tip": tip }, make("rect", { class: "cover", ...at, y: 0, height }),
      make("rect", { class: "bar", ...at, y: height - h, height: h })));
  });
  svg.append(make("line", { x1: 0, x2: width, y1: height, y2: height }));
  panel.append(svg, make("div", { class: "axis" }, make("span", {}, "0"), make("span", {}, `most in a bin: ${whole(most)}`), make("span", {}, number(last * each))));
  return panel;
}

function examples(title, rows, id, text, note) {
  const heading = make("h3", {}, title, make("span", { class: "quiet note" }, ` ${note}`));
  return [make("section", { class: "examples" }, heading, ...rows.map((row) => example(row, id, text)))];
}

function example([position, start, width, pairs], id, text) {
  const values = new Map();
  for (let p = 0; p < pairs.length; p += 2) values.set(start + pairs[p], pairs[p + 1]);
  const shown = [];
  for (let at = start; at < start + width; at++) {
    const value = values.get(at) ?? 0, written = spelled(tokens[text.tokens[at]], false);
    const kind = (value > 0 ? "on" : "") + (at === position ? " peak" : "");
    const style = value > 0 ? `--strength: ${(0.12 + 0.88 * value / list.max[id]).toFixed(3)}` : "";
    shown.push(make("span", { class: kind, style, "data-tip": number(value) }, ...written));
  }
  const block = Math.floor(position / text.ctx), place = position % text.ctx;
  return make("div", { class: "example" },
    make("span", { class: "value", title: `block ${block}, token ${place}` }, number(values.get(position) ?? 0)), make("div", { class: "text" }, ...shown));
}

// ---- moving about: the address names the latent
const idInAddress = () => {
  const id = /^#\d+$/.test(location.hash) ? Number(location.hash.slice(1)) : -1;
  return id >= 0 && id < list.density.length ? id : narrow.matches ? -1 : order[0] ?? 0;
};

function move(by) {
  const place = order.indexOf(selected), next = order[place < 0 ? 0 : place + by];
  if (next === undefined) return;
  history.replaceState(null, "", `#${next}`);
  show(next);
}

function onKey(event) {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.target.matches("input, select")) {
    if (event.key === "Escape") event.target.blur();
    return;
  }
  const arrows = !$("detail").contains(document.activeElement);
  const step = { j: 1, k: -1, ...(arrows && { ArrowDown: 1, ArrowUp: -1 }) }[event.key];
  if (step) move(step);
  else if (event.key === "/") $("query").focus();
  else return;
  event.preventDefault();
}

function showTip(event) {
  const at = event.target.closest?.("[data-tip]"), tip = $("tip");
  tip.hidden = !at;
  if (!at) return;
  tip.textContent = at.dataset.tip;
  const box = at.getBoundingClientRect();
  tip.style.left = `${Math.max(4, Math.min(event.clientX - tip.offsetWidth / 2, innerWidth - tip.offsetWidth - 4))}px`;
  tip.style.top = `${Math.max(4, (box.height < 60 ? Math.min(box.top, event.clientY) : event.clientY) - tip.offsetHeight - 6)}px`;
}

async function search() {
  if ($("query").value && !searchIndex) {
    $("count").textContent = "reading the index…";
    searchIndex = await load("search");
  }
  arrange();
}

function showFacts() {
  named($("figures"), [
    ["latents", whole(facts.n_latents)], ["on somewhere", whole(facts.n_alive)], ["tokens looked at", whole(facts.n_tokens)],
    ...Object.entries(facts.figures).map(([name, value]) => [name, typeof value === "number" ? number(value) : value]),
  ]);
  const effect = facts.unembedding === null
    ? "The hook is not as wide as the residual stream, so there are no promoted tokens."
    : `Promoted and suppressed tokens are the ends of W_dec[i] @ W_U: the latent's decoder row${
      facts.unembedding.removes_mean ? ", its mean over d_model removed (the final norm is a LayerNorm)," : ""
    } through the unembedding with the final norm's gain folded in. The norm's division, its offset and what lies between are left out.`;
  const notes = [
    `Activations are the SAE's own, in its normalised space, on ${whole(facts.n_tokens)} held-out tokens. The first position of every block, BOS, is left out: it counts nowhere.`,
    `Density is the share of those tokens on which a latent is above 0. The strongest examples are at most one a block; the others are drawn at random, a few from each fifth of (at most ${facts.sample}) activations of the latent drawn at random. Shades go with the activation, as a share of the latent's largest; the outlined token is the one whose activation stands beside it.`,
    effect,
  ];
  $("notes").append(...notes.map((note) => make("p", {}, note)));
  $("config").textContent = JSON.stringify(facts.config, null, 1);
}

const narrow = matchMedia("(max-width: 820px)");

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
  addEventListener("pointerdown", showTip);
  $("query").addEventListener("focus", () => load("search").catch(() => {}));
  for (const name of ["query", "where", "band"]) $(name).addEventListener("input", search);
  $("filters").addEventListener("submit", (event) => {
    event.preventDefault();
    const id = Number($("query").value.replace("#", ""));
    const exact = $("query").value !== "" && id in list.density ? id : order[0];
    if (exact !== undefined) location.hash = exact;
    $("query").blur();
  });
  document.body.dataset.ready = "yes";
}

begin().catch((problem) => $("detail").replaceChildren(make("p", {}, problem.message)));
