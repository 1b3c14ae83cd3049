// The page of the latents on a text: choose a latent to see where it is active, or a token to see what is active on it.
// `facts` stands before this script in the page. A latent is named by its place in `facts.latents`.

const values = facts.values.map((row) => {
  const byPlace = new Map();
  for (let p = 0; p < row.length; p += 2) byPlace.set(row[p], row[p + 1]);
  return byPlace;
});
const largest = facts.latents.map((_, place) => Math.max(...values.map((row) => row.get(place) ?? 0)));
const nTokens = facts.latents.map((_, place) => values.filter((row) => row.has(place)).length);
const peak = facts.latents.map((_, place) => values.findIndex((row) => row.get(place) === largest[place]));
const most = Math.max(...largest);
let chosen = -1; // the latent that shades the text; -1 for the strongest of each token
let pinned = -1; // the token whose latents are listed; -1 for all

const named = (i) => spelled(facts.tokens[i][2], true);

// What is said of a token when one points at it.
function tip(i) {
  const [, id, name] = facts.tokens[i];
  const active = chosen >= 0 ? [[chosen, values[i].get(chosen) ?? 0]] : [...values[i]].slice(0, facts.top);
  const rows = active.map(([place, value]) => `latent ${facts.latents[place]}: ${number(value)}`);
  return [`${quoted(name)}, id ${id}`, ...(rows.length ? rows : ["no active latent"])].join("\n");
}

function showTexts() {
  const texts = [];
  facts.tokens.forEach(([text, , , shown, begins], i) => {
    texts[text] ??= make("div", { class: "text" });
    // The model sees nothing of what stands before, which its latents here must be read with.
    if (begins && texts[text].childNodes.length) texts[text].append(make("span", { class: "cut", title: "a new token block: the model sees nothing of the text before" }, "¦"));
    const value = chosen >= 0 ? values[i].get(chosen) ?? 0 : [...values[i].values()][0] ?? 0;
    const scale = chosen >= 0 ? largest[chosen] : most;
    const kind = ["token", value > 0 && "active", chosen >= 0 && i === peak[chosen] && "peak", i === pinned && "pinned"].filter(Boolean).join(" ");
    const style = value > 0 ? `--strength: ${(0.12 + 0.88 * value / scale).toFixed(3)}` : "";
    texts[text].append(make("span", { class: kind, style, "data-i": i, "data-tip": tip(i) }, ...spelled(shown, false, true)));
  });
  $("texts").replaceChildren(...texts);
}

function showLatents() {
  const listed = pinned >= 0 ? [...values[pinned].keys()] : facts.latents.map((_, place) => place);
  $("latents").replaceChildren(...listed.map((place) => {
    const id = facts.latents[place];
    const button = make("button", { type: "button", "aria-pressed": place === chosen, title: `shade the text by latent ${id}` }, String(id));
    button.addEventListener("click", () => choose(place === chosen ? -1 : place));
    const link = facts.link ? make("a", { href: `${facts.link}#${id}`, title: `the page of latent ${id}` }, "page") : null;
    const value = pinned >= 0 ? values[pinned].get(place) : largest[place];
    const bar = make("span", { class: "bar", style: `--strength: ${(value / most).toFixed(3)}` });
    return make("tr", { "aria-selected": place === chosen }, make("td", {}, button, " ", link), make("td", { class: "n" }, number(value), bar),
      make("td", { class: "n" }, whole(nTokens[place])), make("td", { class: "on" }, ...named(peak[place])));
  }));
  $("said").replaceChildren(...(pinned >= 0
    ? ["Active on ", make("span", { class: "t" }, ...named(pinned)), `, token ${pinned}:`]
    : [chosen >= 0 ? `Shaded by latent ${facts.latents[chosen]}.` : "Shaded by the strongest latent of each token. Choose a latent or a token."]));
  $("measure").textContent = pinned >= 0 ? "activation" : "largest";
  $("clear").hidden = chosen < 0 && pinned < 0;
  $("more").textContent = (pinned < 0 && facts.n_left_out) ? `${whole(facts.n_left_out)} weaker latents are left out.` : "";
}

function show() {
  showTexts();
  showLatents();
}

// The address ends in #NUMBER of the latent, so that it can be copied.
function choose(place) {
  chosen = place;
  history.replaceState(null, "", place < 0 ? location.pathname + location.search : `#${facts.latents[place]}`);
  show();
}

function clear() {
  pinned = -1;
  choose(-1);
}

$("texts").addEventListener("click", (event) => {
  const at = event.target.closest("[data-i]");
  if (!at) return;
  pinned = pinned === Number(at.dataset.i) ? -1 : Number(at.dataset.i);
  show();
});
$("clear").addEventListener("click", clear);
addEventListener("keydown", (event) => { if (event.key === "Escape") clear(); });
addEventListener("pointerover", showTip);
addEventListener("pointerdown", showTip);
chosen = facts.latents.indexOf(/^#\d+$/.test(location.hash) ? Number(location.hash.slice(1)) : -1);
show();
document.body.dataset.ready = "yes"; // the tests wait for this
