// One latent: its figures, its histogram, the tokens that it promotes, the latents like it, and its examples.

async function show(id) {
  const isNew = id !== selected;
  selected = id;
  document.body.classList.toggle("open", id >= 0);
  $("tip").hidden = true; // what it belongs to goes
  if (isNew) reveal(id);
  showRows();
  if (id < 0) return $("detail").replaceChildren(make("p", { class: "quiet" }, found?.asked.problem ? "Nothing was searched." : found && !order.length ? "No latent is found." : "Choose a latent."));
  try {
    const [shard] = await Promise.all([load(`details-${Math.floor(id / facts.shard)}`), loadText()]);
    const latent = shard[id % facts.shard];
    const asked = found;
    const marks = await marksOf([...latent.top, ...latent.bands.flat()].map(([, start]) => start));
    if (selected !== id || found !== asked) return; // another latent or search was chosen meanwhile
    $("detail").replaceChildren(...described(id, latent, marks));
  } catch (problem) {
    $("detail").replaceChildren(make("p", {}, problem.message));
  }
  if (!isNew) return;
  if (narrow.matches) scrollTo(0, 0);
  else $("detail").scrollTop = 0;
}

function described(id, latent, marks) {
  const n = latent.on; // the number of tokens on which it is active
  const figures = [
    ["density", n ? `${percent(list.density[id])} (${whole(n)} of ${whole(facts.n_tokens)} ${unit}s)` : `0: dead in this sample of ${whole(facts.n_tokens)} ${unit}s`],
    ["max", number(list.max[id])],
    ["mean where active", number(list.mean[id])],
    ...Object.entries(list.own).map(([name, values]) => [name, number(values[id])]),
    ...(list.cosine ? [["cos(encoder, decoder)", number(list.cosine[id])]] : []),
  ];
  const lists = facts.unembedding
    ? [pairs("Promoted tokens", effects(latent.promoted), "the tokens whose logits it raises most"),
       pairs("Suppressed tokens", effects(latent.suppressed), "the tokens whose logits it lowers most")]
    : [];
  const near = latent.near.map(([other, cosine]) => item(linkTo(other), cosine.toFixed(2)));
  return [
    make("div", { class: "heading" }, toList(), make("h2", {}, `Latent ${id}`),
      stepButton("‹", -1, "Previous latent in the list (k)"), stepButton("›", 1, "Next latent in the list (j)")),
    named(make("dl", { class: "figures" }), figures),
    make("div", { class: "panels" }, make("div", { class: "chart" }, histogram(latent, id), together(latent.together)), ...lists,
      pairs("Nearest latents", near, "the latents whose decoder rows have the largest cosine with its own", "near")),
    ...allExamples(id, latent, marks),
  ];
}

const item = (left, ...values) => make("li", {}, left, ...values.map((value) => make("span", { class: "value" }, value)));
const effects = (rows) => rows.map(([place, value]) => item(token(place), signed(value)));
const signed = (value) => (value > 0 ? "+" : "") + value.toFixed(2);

function pairs(title, items, about, kind = "") {
  return make("div", { class: kind }, make("h3", { title: about }, title), make("ul", { class: "pairs" }, ...items));
}

function linkTo(other) {
  const link = make("a", { href: addressOf({ latent: other }) }, `${other} `, token(list.token[other]));
  return stepping(link, other);
}

// A link that is a step on this page, unless it is to be opened elsewhere.
function stepping(link, latent) {
  link.addEventListener("click", (event) => {
    if (event.ctrlKey || event.metaKey || event.shiftKey) return;
    event.preventDefault();
    change({ latent });
  });
  return link;
}

const toList = () => stepping(make("a", { class: "tolist", href: "#" }, "← all latents"), -1);

// The latents that are active on the same tokens, with the Jaccard index and the share of this latent's firings.
function together(rows) {
  const about = `Both numbers count ${unit}s. The first is the Jaccard index: those on which both latents are active, of those on which either is. The second is the share of those on which this latent is active where the other is too.`;
  const items = rows.map(([other, jaccard, share]) => item(linkTo(other), jaccard.toFixed(2), percent(share)));
  return make("div", { class: "together" },
    make("h3", { title: about }, "Active together", make("span", { class: "quiet note" }, " Jaccard, share")),
    items.length ? make("ul", { class: "pairs" }, ...items) : make("p", { class: "quiet" }, `None on two ${unit}s or more.`));
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
  const panel = make("div", {}, make("h3", {}, "Activations where it is active"));
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
