// The examples of a latent: text around tokens on which it is active, short at first, or rows that stand for themselves.

const SHORT_BEFORE = 16; // so many tokens before the one that an example is about are seen, until all is asked for,
const SHORT_AFTER = 8; // and so many after it

function allExamples(id, latent, marks) {
  const known = new Map([...latent.promoted, ...latent.suppressed].map(([place, value]) => [tokenIds[place], value]));
  const about = { id, known, marks, n: 0 };
  const note = latent.on ? (facts.rows ? "" : "at most one per token block") : "none: the latent is dead in this sample";
  const bands = latent.bands.map((rows, b) => [`${100 * b / facts.n_bands}–${100 * (b + 1) / facts.n_bands}% of its activations`, rows]);
  // The bands are in the file with the weakest first; the page goes on downwards from the strongest.
  return [examples("Strongest", latent.top, about, note),
    ...bands.reverse().filter(([, rows]) => rows.length).map(([title, rows]) => examples(title, rows, about, "drawn at random"))];
}

function examples(title, rows, about, note) {
  const heading = make("h3", {}, title, make("span", { class: "quiet note" }, ` ${note}`));
  const all = facts.rows ? [make("div", { class: "cards" }, ...rows.map((row) => card(row, about)))] : rows.map((row) => example(row, about));
  return make("section", { class: "examples" }, heading, ...all);
}

// An example of text. `pairs` lists the activations above 0 in the window: offset, value, offset, value ...
function example([position, start, width, pairs], about) {
  const values = new Map();
  for (let p = 0; p < pairs.length; p += 2) values.set(start + pairs[p], pairs[p + 1]);
  const end = start + width;
  let from = Math.max(start, position - SHORT_BEFORE);
  let to = Math.min(end, position + SHORT_AFTER + 1);
  while (from > start && isPart(from - 1)) from--; // no character is cut
  while (to < end && isPart(to - 1)) to++;
  const hits = about.marks.get(start) ?? new Set(); // the positions that the search found
  const words = make("div", { class: "text", role: "group", id: `example-${about.n}`, "aria-label": `Context ${++about.n}: the arrow keys go from token to token` });
  let most = position; // the token that the keyboard reaches first
  function fill(isWhole) {
    const [first, last] = isWhole ? [start, end] : [from, to];
    const shownTokens = Array.from({ length: last - first }, (_, i) => tokenIn(first + i, values, about, { isPeak: first + i === position, isHit: hits.has(first + i), isWhole }));
    for (const one of shownTokens) one.tabIndex = Number(one.dataset.at) === most ? 0 : -1;
    words.replaceChildren(first > start ? cut() : "", ...shownTokens, last < end ? cut() : "");
  }
  const isLong = from > start || to < end || Array.from({ length: width }, (_, i) => textAt(start + i)).some((part) => part.includes("\n"));
  const opens = hits.size > 0 && ![...hits].some((at) => at >= from && at < to); // or what is searched for is out of sight
  fill(opens);
  const place = position % text.ctx;
  return make("div", { class: hits.size ? "example found" : "example" },
    make("span", { class: "value", title: `token ${place} of token block ${Math.floor(position / text.ctx)}` }, number(values.get(position) ?? 0)),
    words, isLong ? moreButton(words.id, opens, fill) : null);
}

const cut = () => make("span", { class: "ws", "aria-hidden": "true" }, "…");

function moreButton(id, isOpen, fill) {
  const button = make("button", { type: "button", class: "more", "aria-expanded": isOpen, "aria-controls": id, title: "all of this context, with its line ends" }, isOpen ? "less" : "more");
  button.addEventListener("click", () => {
    isOpen = !isOpen;
    button.setAttribute("aria-expanded", isOpen);
    button.textContent = isOpen ? "less" : "more";
    fill(isOpen);
  });
  return button;
}

function tokenIn(position, values, about, { isPeak, isHit, isWhole }) {
  const value = values.get(position) ?? 0;
  const kind = [value > 0 && "active", isPeak && "peak", isHit && "hit"].filter(Boolean).join(" ");
  // From 0.12, because a weak activation must still be told from none.
  const style = value > 0 ? `--strength: ${(0.12 + 0.88 * value / list.max[about.id]).toFixed(3)}` : "";
  return make("span", { class: kind, style, "data-at": position, "data-tip": tipOf(position, value, about) },
    ...spelled(tokens[text.tokens[position]], false, isWhole));
}

// What is said of a token: its name and number, its place, the latent's value there, and what the latent adds to its
// logit, if that is among the largest effects.
function tipOf(position, value, { known }) {
  const id = partIds.get(position) ?? tokenIds[text.tokens[position]];
  const place = position % text.ctx;
  const effect = known.get(id);
  return [
    `${partIds.has(position) ? "a part of " : ""}${quoted(nameAt(position))}, id ${id}`,
    `position ${place} of token block ${Math.floor(position / text.ctx)}`,
    place ? `activation ${number(value)}` : "the first position, which is left out",
    ...(effect === undefined ? [] : [`logit effect ${signed(effect)}`]),
  ].join("\n");
}

// The arrow keys go from token to token in an example; Tab goes to the next example.
function onTokenKey(event) {
  const at = event.target.closest?.(".text [data-at]");
  if (!at) return false;
  const all = [...at.parentNode.querySelectorAll("[data-at]")];
  const i = all.indexOf(at);
  const to = { ArrowLeft: all[i - 1], ArrowRight: all[i + 1], Home: all[0], End: all.at(-1) }[event.key];
  to?.focus();
  return Boolean(to);
}

function onTokenFocus(event) {
  showTip(event);
  const at = event.target.closest?.(".text [data-at]");
  if (!at) return;
  for (const other of at.parentNode.querySelectorAll("[tabindex='0']")) other.tabIndex = -1;
  at.tabIndex = 0;
  at.setAttribute("aria-describedby", "tip");
}

// An example of a study of rows: the row's image or label, and the activation on it.
function card([position, start, , pairs], { marks }) {
  const row = text.rows[position];
  const each = facts.rows.per_image;
  const image = Math.floor(row / each);
  const place = row % each;
  const value = number(pairs[1]);
  return make("figure", { class: marks.get(start)?.size ? "card found" : "card", "data-tip": `row ${row}: ${value}` },
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

