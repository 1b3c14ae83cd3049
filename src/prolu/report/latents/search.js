// The search: which latents a query finds, why, and which comes first.
//
// Words find, in this order, the latents whose top token they are (that of the strongest firing), those whose top token
// begins with them, and those with all of them in an example or in a token that they promote: as whole words, at the
// start of words, or inside words. "A phrase" and a /regular expression/ are looked for in the examples, over the bounds
// of tokens, and in promoted tokens.

const [NUMBER, TOP, BEGINS, CONTEXT, PROMOTED] = [1, 2, 3, 4, 5]; // the reasons, the best first; 0 for none
const PER_KIND = 2; // a worse kind of match is a worse reason: CONTEXT, PROMOTED, CONTEXT + 2, PROMOTED + 2 ...
let promoted; // for each latent, the tokens that it promotes
let found = null; // what was `asked`, the reason for each latent, and in how many examples it was found; null without a query

const lower = (text) => text.trim().toLowerCase();

// What a query asks for: a `number`, a `regex`, or `parts` that all must be in a text; or what `problem` it has.
function parse(query) {
  if (!query.trim()) return null;
  if (/^#\d*$/.test(query)) return { number: query.slice(1) };
  const regex = /^\/(.+)\/([imsu]*)$/s.exec(query);
  if (regex) {
    const [, source, flags] = regex;
    try {
      return { regex: { source: new RegExp(source, flags).source, flags } };
    } catch (problem) {
      const why = problem.message.split(": ").at(-1);
      return { problem: `This is no regular expression: ${why[0].toLowerCase()}${why.slice(1)}.` };
    }
  }
  const phrase = /^"(.+)"$/s.exec(query)?.[1];
  if (phrase) return { parts: [{ word: phrase, isPhrase: true }] };
  const words = lower(query);
  return { words, id: /^\d+$/.test(query.trim()) ? Number(query) : -1, parts: words.split(/\s+/).map(typed) };
}

// How well a query matches each context and each token, or what problem it has; null if another query came meanwhile.
async function kindsOf(asked) {
  if (asked.regex) return searchFor(asked.regex);
  const joined = asked.words ? low : exact;
  const [kinds, ...others] = asked.parts.map((part) => kindsInContexts(joined, part));
  for (const more of others) kinds.forEach((kind, c) => { kinds[c] = Math.max(kind, more[c]); }); // all words must be there
  const wholeQuery = typed(asked.words ?? "");
  const ofTokens = asked.words ? lowTokens.map((name) => kindIn(name, wholeQuery))
    : tokens.map((name) => (name.includes(asked.parts[0].word) ? WHOLE : NOWHERE));
  return { done: { contexts: kinds, tokens: ofTokens } };
}

// Return, for each latent, why it is found and in how many examples.
function lookUp(asked, kinds, where) {
  const n = list.density.length;
  const reasons = new Uint8Array(n);
  const counts = new Uint16Array(n);
  if (asked.number !== undefined) {
    for (let i = 0; i < n; i++) if (String(i).startsWith(asked.number)) reasons[i] = String(i) === asked.number ? NUMBER : BEGINS;
    return { reasons, counts };
  }
  const topOf = (i) => (asked.words && list.token[i] >= 0 ? lower(tokens[list.token[i]]) : "");
  for (let i = 0; i < n; i++) {
    const top = topOf(i);
    if (i === asked.id) reasons[i] = NUMBER;
    else if (asked.words && where !== "promoted" && top.startsWith(asked.words)) reasons[i] = top === asked.words ? TOP : BEGINS;
    else {
      const inExamples = [0, 0, 0, 0]; // how many of each kind
      if (where !== "promoted") for (const c of contextsOf[i]) inExamples[kinds.contexts[c]]++;
      const ofExamples = inExamples.findIndex((n, kind) => n > 0 || kind === NOWHERE);
      const ofTokens = where === "examples" ? NOWHERE : promoted[i].reduce((best, place) => Math.min(best, kinds.tokens[place]), NOWHERE);
      const kind = Math.min(ofExamples, ofTokens);
      if (kind === NOWHERE) continue;
      reasons[i] = (ofExamples === kind ? CONTEXT : PROMOTED) + PER_KIND * kind;
      counts[i] = ofExamples === kind ? inExamples[kind] : 0;
    }
  }
  return { reasons, counts };
}

function why(i) {
  const reason = found.reasons[i];
  if (reason < CONTEXT) return ["", "its number", `top ${facts.rows?.labels ? "label" : unit}`, "begins with"][reason];
  const n = found.counts[i];
  const examples = `${n} ${facts.rows ? "example" : "context"}${n === 1 ? "" : "s"}`;
  return [`in ${examples}`, "promotes it", `starts words, ${examples}`, "starts a promoted token", `inside words, ${examples}`, "inside a promoted token"][reason - CONTEXT];
}

// Look a query up. Returns what is `found` and what is `said` of it beside the number of latents; null if another query
// came meanwhile.
async function search(query) {
  const asked = parse(query);
  if (!asked) return { found: null, said: "" };
  const n = list.density.length;
  const nothing = (problem) => ({ found: { asked: { problem }, reasons: new Uint8Array(n), counts: new Uint16Array(n) }, said: problem });
  if (asked.problem) return nothing(asked.problem);
  let kinds = {};
  if (asked.number === undefined) {
    await loadSearch();
    kinds = await kindsOf(asked);
    if (!kinds) return null;
    if (kinds.problem) return nothing(kinds.problem);
  }
  return { found: { asked, ...lookUp(asked, kinds.done, shown.where) }, said: asked.id >= n ? `There is no latent ${whole(asked.id)}: the last is ${whole(n - 1)}. ` : "" };
}

async function loadSearch() {
  if (contexts) return;
  $("count").textContent = "loading the text…";
  const [index] = await Promise.all([load("search"), loadText()]);
  if (contexts) return;
  promoted = index.promoted;
  prepare(index.examples);
}

// The positions that are marked in the contexts of a latent, by the first position of each: those of the kind of match for
// which the latent stands in the list, or a better one. Null if other marks were asked for meanwhile.
async function marksOf(starts) {
  const { regex, parts, words } = found?.asked ?? {};
  if (regex) {
    const answered = await placesOf({ ...regex, texts: starts.map(contextText) });
    return answered && new Map(starts.map((start, c) => {
      const [begin] = boundsOf(exact, start);
      return [start, positionsOf(exact, start, (answered.done?.[c] ?? []).map(([from, to]) => [begin + from, begin + to]))];
    }));
  }
  if (!parts) return new Map();
  const joined = words ? low : exact;
  const matches = starts.map((start) => parts.map((part) => matchesIn(joined, start, part)));
  const kinds = matches.map((ofParts) => Math.max(...ofParts.map((places) => Math.min(NOWHERE, ...places.map(([, , kind]) => kind)))));
  const best = Math.min(INSIDE, ...kinds);
  return new Map(starts.map((start, c) => [start, positionsOf(joined, start, kinds[c] > best ? [] : matches[c].flat().filter(([, , kind]) => kind <= best))]));
}
