// What the pages of latents are made of: elements, texts of tokens, numbers, and the box that follows the pointer.

const $ = (id) => document.getElementById(id);

// Text only ever becomes a text node, never HTML, so tokens that look like markup do no harm.
function make(tag, attributes = {}, ...children) {
  const svg = ["svg", "g", "rect", "line", "text"].includes(tag);
  const element = svg ? document.createElementNS("http://www.w3.org/2000/svg", tag) : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children.filter((child) => child !== null));
  return element;
}

// White space is shown as faint signs: all of it where a token stands alone (`alone`), but in a text only line ends, tabs
// and runs of spaces, so that the text can still be read. Control characters, which show nothing, become \x and a number,
// and so do the marks that turn the direction of text: they would turn the markup and all that follows with it. With
// `broken`, a line end also ends the line.
const SIGNS = { "\n": "↵", "\r": "␍", "\t": "→" };

function spelled(text, alone, broken = false) {
  const invisible = alone
    ? /[\u0000- \u007f-\u00a0\u200b-\u200f\u2028-\u202e\u2066-\u2069\ufeff]/g
    : /[\u0000-\u001f\u007f-\u009f\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff]|  +/g;
  const parts = [];
  let end = 0;
  for (const found of text.matchAll(invisible)) {
    parts.push(text.slice(end, found.index));
    const code = found[0].charCodeAt(0);
    const blank = code === 32 || code === 160;
    const escape = code < 256 ? `\\x${code.toString(16).padStart(2, "0")}` : `\\u${code.toString(16)}`;
    const sign = SIGNS[found[0]] ?? (blank ? "·".repeat(found[0].length) : escape);
    parts.push(make("span", { class: "ws" }, sign));
    if (broken && found[0] === "\n") parts.push("\n");
    end = found.index + found[0].length;
  }
  return [...parts, text.slice(end)];
}

const number = (value) => (value === 0 ? "0" : Math.abs(value) < 0.001 || Math.abs(value) >= 1e5
  ? value.toExponential(1) : Number(value.toPrecision(3)).toString());
const percent = (fraction) => (fraction > 0 && fraction < 0.0001 ? "<0.01%" : `${Number((100 * fraction).toPrecision(2))}%`);
const whole = (value) => value.toLocaleString("en");

// A text in quotation marks, for a box that shows plain text: what is invisible or turns the direction of text is escaped.
function quoted(text) {
  return JSON.stringify(text).replace(/[\u007f-\u009f\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff]/g,
    (sign) => `\\u${sign.charCodeAt(0).toString(16).padStart(4, "0")}`);
}

// Show what is said of the element under the pointer, or of the one that has the focus.
function showTip(event) {
  const at = event.target.closest?.("[data-tip]");
  const tip = $("tip");
  tip.hidden = !at;
  if (!at) return;
  tip.textContent = at.dataset.tip;
  const box = at.getClientRects()[0] ?? at.getBoundingClientRect(); // the first line, where an element has several
  const x = event.clientX ?? box.left + box.width / 2;
  const y = event.clientY ?? box.top;
  // Inside the window, and above the token; above the pointer where the element is as tall as a bin of the histogram.
  tip.style.left = `${Math.max(4, Math.min(x - tip.offsetWidth / 2, innerWidth - tip.offsetWidth - 4))}px`;
  const top = (box.height < 60 ? Math.min(box.top, y) : y) - tip.offsetHeight - 6;
  tip.style.top = `${top < 4 ? Math.max(box.bottom, y) + 6 : top}px`; // below, where there is no room above
}
