// The page of one SAE's latents: a list to sort, filter and search, and beside it all about the chosen latent. This file
// begins the page and listens. `facts` stands before the scripts in the page; all else is in the files of the folder data/.
//
// The scripts share one scope: elements.js, data.js, address.js, words.js, regex.js, search.js, list.js, latent.js,
// examples.js and this one.

const unit = facts.rows ? "row" : "token"; // what the latents are active on

function showFacts() {
  named($("figures"), [
    ["latents alive", `${whole(facts.n_alive)} of ${whole(facts.n_latents)}`],
    [`${unit}s`, whole(facts.n_tokens)],
    ...Object.entries(facts.figures).map(([name, value]) => [name, typeof value === "number" ? number(value) : value]),
  ]);
  $("notes").append(...notes().map((note) => make("p", {}, note)));
  $("config").textContent = JSON.stringify(facts.config, null, 1);
}

// How to read this page.
function notes() {
  const withoutMean = facts.unembedding?.removes_mean
    ? ", less its mean over d_model (the final norm is a LayerNorm)," : "";
  const effect = facts.unembedding === null
    ? "The hook is not as wide as the residual stream, so no tokens are promoted or suppressed directly."
    : `Promoted and suppressed tokens are those with the largest and the smallest entries of W_dec[i] @ W_U: the latent's decoder row${withoutMean} times the unembedding, with the gain of the final norm. The norm's division and offset, and the model's blocks in between, are left out. The logit effect of a token that one points at is such an entry; it is known for these tokens only.`;
  const { reads, writes, skip } = facts.transcoder ?? {};
  const isTranscoder = `This is a ${skip ? "skip " : ""}transcoder. Its latents read the activations at ${reads}: the examples show on which tokens. Their decoder rows write at ${writes}: promoted and suppressed tokens and nearest latents are of what they write.${skip ? " What the skip connection writes belongs to no latent, and is not shown." : ""}`;
  const share = facts.together_share < 1 ? ` This is counted on a random ${percent(facts.together_share)} of the ${unit}s.` : "";
  return [
    ...(facts.transcoder ? [isTranscoder] : []),
    `A latent is active on a ${unit} if its activation there is above 0. Activations are those of the SAE's normalised space, on ${whole(facts.n_tokens)} held-out ${unit}s${facts.rows ? "" : "; the first position of every token block, BOS, is left out"}. A latent that is active on none of these is dead in this sample, and may be active on others.`,
    `Density is the fraction of those ${unit}s on which a latent is active. ${facts.rows ? "The strongest examples come first." : "The strongest examples are at most one per token block."} The others are drawn at random, a few from each fifth of at most ${facts.sample} activations of the latent, which are drawn at random too. ${facts.rows ? "The number of a row is its place in its file, from 0." : "The shade of a token is its activation as a fraction of the latent's largest; the number beside an example is the activation of the outlined token."}`,
    `The search finds first the latents whose top ${unit}, that of the strongest firing, is what was typed, then those whose top ${unit} begins with it, then those with all its words in their examples${facts.rows ? "" : " or that promote it"}: as whole words first, then at the start of words, then inside words. Of those found alike the strongest comes first. "Quotes" find an exact phrase, /slashes/ a regular expression (/ball/i ignores case), and a number that latent.`,
    `Latents that are active together are those of largest Jaccard index: the number of ${unit}s on which both are active, divided by the number on which either is. The second number is the share of the latent's own firings.${share}`,
    ...(facts.rows ? [] : [effect]),
  ];
}

// Go to the next latent of the list, or back. The address changes in place, or Back would go through every latent passed.
function move(by) {
  const place = order.indexOf(selected);
  const next = order[place < 0 ? 0 : place + by];
  if (next !== undefined) change({ latent: next }, { inPlace: true });
}

function onKey(event) {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.key === "Escape") $("tip").hidden = true;
  if (event.target.matches("input, select")) {
    if (event.key === "Escape") event.target.blur();
    return;
  }
  const arrows = !$("detail").contains(document.activeElement); // there the arrow keys scroll
  const step = { j: 1, k: -1, ...(arrows && { ArrowDown: 1, ArrowUp: -1 }) }[event.key];
  if (step) move(step);
  else if (event.key === "/") $("query").focus();
  else if (!onTokenKey(event)) return;
  event.preventDefault();
}

// The latent whose number is in the field of the search, or -1.
function numberTyped() {
  const id = /^#?\d+$/.test($("query").value.trim()) ? Number($("query").value.trim().replace("#", "")) : -1;
  return id < list.density.length ? id : -1;
}

function onQuery() {
  const query = $("query").value;
  // A plain number leads to its latent at once, where the list stays in sight.
  const id = query.includes("#") || narrow.matches ? -1 : numberTyped();
  change(id >= 0 ? { query, latent: id } : { query }, { typing: true }).catch(complain);
}

async function onSubmit(event) {
  event.preventDefault();
  $("query").blur();
  await follow({ query: shown.query }); // the list may still be that of fewer letters
  const id = numberTyped() >= 0 ? numberTyped() : order[0];
  if (id !== undefined) change({ latent: id });
}

function complain(problem) {
  $("rows").setAttribute("aria-busy", "false");
  $("count").textContent = problem.message;
}

function listen() {
  $("rows").addEventListener("scroll", showRows, { passive: true });
  $("visible").addEventListener("click", (event) => {
    const row = event.target.closest(".row");
    if (row) change({ latent: Number(row.dataset.id) });
  });
  addEventListener("popstate", () => {
    const before = { ...shown };
    readAddress();
    isTyping = false;
    follow(Object.fromEntries(Object.entries(shown).filter(([name, value]) => value !== before[name]))).catch(complain);
  });
  addEventListener("resize", () => { showHead(); showRows(); });
  addEventListener("keydown", onKey);
  addEventListener("pointerover", showTip);
  addEventListener("pointerdown", showTip); // a phone has no pointer that hovers
  $("detail").addEventListener("focusin", onTokenFocus);
  $("detail").addEventListener("focusout", () => { $("tip").hidden = true; });
  // Loaded while the first letters are typed; if that fails, the search tries again.
  $("query").addEventListener("focus", () => load("search").catch(() => {}));
  $("query").addEventListener("blur", () => { isTyping = false; });
  $("query").addEventListener("input", onQuery);
  for (const name of ["where", "band"]) $(name).addEventListener("input", () => change({ [name]: $(name).value }).catch(complain));
  $("filters").addEventListener("submit", onSubmit);
}

async function begin() {
  showFacts();
  $("band").append(...BANDS.map(([key, name]) => make("option", { value: key }, name)));
  [list, tokens] = await Promise.all([load("list"), load("tokens")]);
  defineColumns();
  readAddress();
  await follow(shown);
  listen();
  document.body.dataset.ready = "yes"; // the tests wait for this
}

begin().catch((problem) => $("detail").replaceChildren(make("p", {}, problem.message)));
