// The files of the folder data/. A page opened from the disk may not fetch files, but it may load scripts, so each data
// file is a script that calls put().

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

let list; // data/list.js: an array per quantity, with an entry per latent
let tokens; // data/tokens.js: the texts of tokens; all else names a token by its place in it
let text; // data/text.js: the token at each position of the held-out text
let partIds; // of the tokens that are parts of a character: their numbers in the vocabulary, by position
let tokenIds = []; // the number in the vocabulary of each entry of `tokens`; -1 for a character over several tokens

// Load the text, which the examples and the search need. Rows that come from no language model have no token ids.
async function loadText() {
  const [read, ids] = await Promise.all([load("text"), facts.rows ? { of: [], parts: [] } : load("ids")]);
  if (text) return;
  text = read;
  tokenIds = ids.of;
  partIds = new Map();
  for (let p = 0; p < ids.parts.length; p += 2) partIds.set(ids.parts[p], ids.parts[p + 1]);
}

// A token stands alone, with signs for its spaces; the label of a row is words.
const token = (place) => make("span", { class: "t" }, ...(place < 0 ? ["–"] : spelled(tokens[place], !facts.rows)));

// A token that shows the sign of a part: the character stands whole at the last of its tokens.
const isPart = (position) => tokenIds[text.tokens[position]] === -1 && tokens[text.tokens[position]] === "▫";

// What the token at a position is called by itself: each of a character's tokens is called by the whole character.
function nameAt(position) {
  while (isPart(position) && (position + 1) % text.ctx) position++;
  return tokens[text.tokens[position]];
}

// The first position of the example around a position: as firings.py chooses it, inside the position's token block.
function startOf(position) {
  const place = position % text.ctx;
  return position - place + Math.min(Math.max(place - facts.before, 0), text.ctx - facts.width);
}
