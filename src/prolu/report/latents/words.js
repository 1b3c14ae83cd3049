// The texts of the contexts in one string each, and how what was typed stands in them: as a whole word, at the start of a
// word or inside one.

const [WHOLE, START, INSIDE, NOWHERE] = [0, 1, 2, 3]; // kinds of matches, the best first

let exact; // the whole text: each context is a slice of it
let low; // the same in lower case
let lowTokens; // `tokens` in lower case
let contexts; // the first position of each context, ascending
let contextsOf; // for each latent, which of them are its own

// The text of a token in a context. Parts of a character are no text: the last of them is the character.
const textAt = (position) => (isPart(position) ? "" : tokens[text.tokens[position]]);

// Join the texts of all positions; a line end divides token blocks, so that no word goes from one into the next.
function join(textOf) {
  const n = text.tokens.length;
  const [starts, ends] = [new Uint32Array(n), new Uint32Array(n)];
  const parts = [];
  let length = 0;
  for (let at = 0; at < n; at++) {
    const part = (at % text.ctx ? "" : "\n") + textOf(at);
    starts[at] = length + (at % text.ctx ? 0 : 1);
    ends[at] = length += part.length;
    parts.push(part);
  }
  return { all: parts.join(""), starts, ends };
}

// Prepare the search in the contexts of these examples, which are positions for each latent.
function prepare(examples) {
  lowTokens = tokens.map((name) => name.toLowerCase());
  exact = join(textAt);
  low = join((at) => (isPart(at) ? "" : lowTokens[text.tokens[at]]));
  const place = new Int32Array(text.tokens.length).fill(-1);
  for (const positions of examples) for (const position of positions) place[startOf(position)] = 0;
  contexts = Uint32Array.from(place.keys()).filter((start) => place[start] === 0);
  contexts.forEach((start, c) => { place[start] = c; });
  contextsOf = examples.map((positions) => Uint32Array.from(new Set(positions.map((position) => place[startOf(position)]))));
}

// Where a context begins and ends in a joined text.
const boundsOf = (joined, start) => [joined.starts[start], joined.ends[start + facts.width - 1]];
const contextText = (start) => exact.all.slice(...boundsOf(exact, start));

// Letters, their marks, digits and _ make a word. A sign may be two code units.
const isOfWord = (sign) => /[\p{L}\p{M}\p{N}_]/u.test(sign);
const signAt = (text, at) => (at < text.length ? String.fromCodePoint(text.codePointAt(at)) : "");
const signBefore = (text, at) => (at > 1 && /[\udc00-\udfff]/.test(text[at - 1]) ? text.slice(at - 2, at) : text.slice(Math.max(0, at - 1), at));

// What of a word's ends can be inside a longer word: `def(` cannot go on behind its bracket.
function typed(word) {
  return { word, opens: isOfWord(signAt(word, 0)), closes: isOfWord(signBefore(word, word.length)) };
}

function kindAt(text, at, { word, opens, closes }) {
  if (opens && isOfWord(signBefore(text, at))) return INSIDE;
  return closes && isOfWord(signAt(text, at + word.length)) ? START : WHOLE;
}

// The best kind of match of a word in a short text.
function kindIn(text, asked) {
  let best = NOWHERE;
  for (let at = text.indexOf(asked.word); at >= 0 && best; at = text.indexOf(asked.word, at + 1)) best = Math.min(best, kindAt(text, at, asked));
  return best;
}

// The best kind of match in each context. The whole text is read once, and then the contexts beside what was found.
function kindsInContexts(joined, asked) {
  const places = [[], [], []];
  const { all } = joined;
  for (let at = all.indexOf(asked.word); at >= 0; at = all.indexOf(asked.word, at + 1)) places[asked.isPhrase ? WHOLE : kindAt(all, at, asked)].push(at);
  const kinds = new Uint8Array(contexts.length).fill(NOWHERE);
  places.forEach((found, kind) => {
    let next = 0;
    contexts.forEach((start, c) => {
      const [from, to] = boundsOf(joined, start);
      while (found[next] < from) next++;
      if (kinds[c] === NOWHERE && found[next] + asked.word.length <= to) kinds[c] = kind;
    });
  });
  return kinds;
}

// The matches in one context: its place in the joined text, [from, to, kind] each.
function matchesIn(joined, start, asked) {
  const [from, to] = boundsOf(joined, start);
  const slice = joined.all.slice(from, to);
  const all = [];
  for (let at = slice.indexOf(asked.word); at >= 0; at = slice.indexOf(asked.word, at + 1)) {
    all.push([from + at, from + at + asked.word.length, asked.isPhrase ? WHOLE : kindAt(joined.all, from + at, asked)]);
  }
  return all;
}

// The positions of a context on which one of these places [from, to] of the joined text lies.
function positionsOf(joined, start, places) {
  const positions = new Set();
  for (let at = start; at < start + facts.width; at++) {
    if (places.some(([from, to]) => from < joined.ends[at] && joined.starts[at] < to)) positions.add(at);
  }
  return positions;
}
