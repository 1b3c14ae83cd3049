// Regular expressions run beside the page, in a worker: one that backtracks without end can be stopped there only.

const LIMIT = 3000; // milliseconds that a regular expression may take
const TOO_LONG = "This regular expression takes too long and was stopped.";
const TOO_RICH = "This browser cannot stop a regular expression that takes too long, so only simple ones are searched here: at most three of * + ? { |, and no repeated group.";

// What is asked of a regular expression: where in some texts it matches, or else which slices and which tokens it matches.
// This function runs in the worker too, where nothing else of the page is.
function answer({ source, flags, texts }, kept, isLate) {
  if (texts) {
    const all = new RegExp(source, `${flags}g`);
    return texts.map((text) => Array.from(text.matchAll(all), (match) => [match.index, match.index + match[0].length]));
  }
  const wanted = new RegExp(source, flags);
  const isIn = (text) => { if (isLate()) throw new Error("too long"); return wanted.test(text) ? 0 : 3; }; // WHOLE, NOWHERE
  return {
    contexts: Uint8Array.from(kept.from, (from, c) => isIn(kept.all.slice(from, kept.to[c]))),
    tokens: Uint8Array.from(kept.tokens, isIn),
  };
}

const WORK = `${answer}
let kept;
onmessage = ({ data }) => { kept ??= data.kept; postMessage({ done: answer(data, kept, () => false) }); };
postMessage({ isReady: true });`;

let hasWorkers = true; // a page in a frame, or one that is served with strict rules, may have none

// Returns a function that asks a worker of its own. It resolves to `done`, to a `problem`, or, if it is called again before
// the answer is there, to null. `keep` returns what the worker keeps for its next calls.
function asking(keep = () => null) {
  let worker = null;
  let replace = () => {};
  return (asked) => new Promise((resolve) => {
    replace();
    let timer;
    const end = (outcome, isOver) => {
      clearTimeout(timer);
      replace = () => {};
      if (isOver) {
        worker?.terminate();
        worker = null;
      }
      resolve(outcome);
    };
    if (!hasWorkers) return resolve(inThePage(asked, keep));
    const isNew = !worker;
    const send = () => {
      timer = setTimeout(() => end({ problem: TOO_LONG }, true), LIMIT);
      worker.postMessage(isNew ? { ...asked, kept: keep() } : asked);
    };
    try {
      worker ??= new Worker(URL.createObjectURL(new Blob([WORK], { type: "text/javascript" })));
    } catch {
      hasWorkers = false;
      return resolve(inThePage(asked, keep));
    }
    let isReady = !isNew;
    replace = () => end(null, true);
    worker.onmessage = ({ data }) => {
      if (!data.isReady) return end(data);
      isReady = true;
      send();
    };
    worker.onerror = (event) => {
      event.preventDefault();
      if (isReady) return end({ problem: TOO_LONG }, true); // it asked for more memory than there is
      hasWorkers = false;
      end(inThePage(asked, keep), true);
    };
    if (isReady) send();
  });
}

// Without a worker only what cannot backtrack for long is run: every repetition and every choice may multiply the steps.
function inThePage(asked, keep) {
  const bare = asked.source.replace(/\\./gs, "a").replace(/\[[^\]]*\]/g, "a").replace(/\(\?/g, "(");
  if (/\)[*+?{]/.test(bare) || (bare.match(/[*+?{|]/g) ?? []).length > 3) return { problem: TOO_RICH };
  const begun = performance.now();
  try {
    return { done: answer(asked, keep(), () => performance.now() - begun > LIMIT) };
  } catch {
    return { problem: TOO_LONG };
  }
}

const searchFor = asking(() => {
  const bounds = Array.from(contexts, (start) => boundsOf(exact, start));
  return { all: exact.all, from: Uint32Array.from(bounds, ([from]) => from), to: Uint32Array.from(bounds, ([, to]) => to), tokens };
});
const placesOf = asking();
