// The search: which latents a query finds, why, and which comes first.
//
// Words find, in this order, the latents whose top token they are (that of the strongest firing), those whose top token
// begins with them, those with all of them in an example, and those that promote a token with them. "A phrase" and a
// /regular expression/ are looked for in the examples, over the bounds of tokens, and in promoted tokens.

const [NUMBER, TOP, BEGINS, CONTEXT, PROMOTED] = [1, 2, 3, 4, 5]; // the reasons, the best first; 0 for none
let searchIndex = null; // data/search.js: the positions of each latent's examples, and the tokens that it promotes
let found = null; // the reason for each latent, and in how many examples it was found; null without a query

const lower = (text) => text.trim().toLowerCase();

// What a query asks for: `hits` returns the places [from, to] in a text, and `isToken` compares words with a token.
function parse(query) {
  if (!query.trim()) return null;
  if (/^#\d*$/.test(query)) return { number: query.slice(1) };
  const regex = /^\/(.+)\/([imsu]*)$/s.exec(query);
  if (regex) {
    try {
      const wanted = new RegExp(regex[1], `${regex[2]}g`);
      return { hits: (text) => [...text.matchAll(wanted)].map((m) => [m.index, m.index + m[0].length]), test: (text) => text.search(wanted) >= 0 };
    } catch (problem) {
      const why = problem.message.split(": ").at(-1);
      return { problem: `This is no regular expression: ${why[0].toLowerCase()}${why.slice(1)}.` };
    }
  }
  const phrase = /^"(.+)"$/s.exec(query)?.[1];
  if (phrase) return { hits: (text) => occurrences(text, phrase), test: (text) => text.includes(phrase) };
  const words = lower(query).split(/\s+/);
  return {
    words: lower(query),
    id: /^\d+$/.test(query.trim()) ? Number(query) : -1,
    hits: (text) => words.flatMap((word) => occurrences(text.toLowerCase(), word)),
    test: (text) => { const low = text.toLowerCase(); return words.every((word) => low.includes(word)); },
  };
}

function occurrences(text, part) {
  const all = [];
  for (let at = text.indexOf(part); at >= 0; at = text.indexOf(part, at + part.length)) all.push([at, at + part.length]);
  return all;
}

// The text of an example by its first position. Parts of a character are no text: the last of them is the character.
const textAt = (position) => (isPart(position) ? "" : tokens[text.tokens[position]]);

function exampleText(start) {
  let joined = "";
  for (let at = start; at < start + facts.width; at++) joined += textAt(at);
  return joined;
}

// The positions in an example that a query finds.
function hitsIn(asked, start) {
  const positions = new Set();
  if (!asked?.hits) return positions;
  const hits = asked.test(exampleText(start)) ? asked.hits(exampleText(start)) : [];
  let from = 0;
  for (let at = start; at < start + facts.width; at++) {
    const to = from + textAt(at).length;
    if (hits.some((hit) => hit[0] < to && from < hit[1])) positions.add(at);
    from = to;
  }
  return positions;
}

// Look a query up. Returns, for each latent, why it is found and in how many examples.
function lookUp(asked, where) {
  const n = list.density.length;
  const reasons = new Uint8Array(n);
  const counts = new Uint16Array(n);
  if (asked.problem) return { reasons, counts };
  if (asked.number !== undefined) {
    for (let i = 0; i < n; i++) if (String(i).startsWith(asked.number)) reasons[i] = String(i) === asked.number ? NUMBER : BEGINS;
    return { reasons, counts };
  }
  const memory = new Int8Array(text.tokens.length); // of each first position: 1 found, -1 not found, 0 not looked at
  const inExample = (start) => (memory[start] ||= asked.test(exampleText(start)) ? 1 : -1) > 0;
  const inToken = tokens.map((name) => (asked.words ? lower(name).includes(asked.words) : asked.test(name)));
  const topOf = (i) => (asked.words && list.token[i] >= 0 ? lower(tokens[list.token[i]]) : "");
  for (let i = 0; i < n; i++) {
    if (i === asked.id) reasons[i] = NUMBER;
    else if (where !== "promoted") {
      if (asked.words && topOf(i) === asked.words) reasons[i] = TOP;
      else if (asked.words && topOf(i).startsWith(asked.words)) reasons[i] = BEGINS;
      else {
        for (const start of new Set(searchIndex.examples[i].map(startOf))) if (inExample(start)) counts[i]++;
        if (counts[i]) reasons[i] = CONTEXT;
      }
    }
    if (!reasons[i] && where !== "examples" && searchIndex.promoted[i].some((place) => inToken[place])) reasons[i] = PROMOTED;
  }
  return { reasons, counts };
}

function why(i) {
  const n = found.counts[i];
  const examples = facts.rows ? (n === 1 ? "example" : "examples") : n === 1 ? "context" : "contexts";
  const top = facts.rows?.labels ? "label" : unit;
  return ["", "its number", `top ${top}`, "begins with", `in ${n} ${examples}`, "promotes it"][found.reasons[i]];
}

// Bring `found` to what is shown, and return what is said of the search beside the number of latents.
async function search() {
  const asked = parse(shown.query);
  found = null;
  if (!asked) return "";
  if (asked.hits && !searchIndex) {
    $("count").textContent = "loading the text…";
    const [index] = await Promise.all([load("search"), loadText()]);
    searchIndex = index;
  }
  found = lookUp(asked, shown.where);
  if (asked.id >= list.density.length) return `There is no latent ${whole(asked.id)}: the last is ${whole(list.density.length - 1)}. `;
  return asked.problem ? `${asked.problem} ` : "";
}
