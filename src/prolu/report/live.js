// A page that is served while its study trains: every few seconds it takes over what has changed, and leaves filters,
// the order of the table and the panel as they are.

const SECONDS_BETWEEN_LOOKS = 10;
const LONG_SILENCE = 600; // seconds without a written file, after which the reader is told what that may mean

let served = new Map(); // the HTML of the parts that change, as the server sent it
let tag = "";

const partsOf = (page) => new Map([...page.querySelectorAll("[data-live]")].map((part) => [part.id, part.innerHTML]));
// Sections, families and seeds: where these change, the page is loaded anew.
const shapeOf = (page, facts) => JSON.stringify([[...page.querySelectorAll("main > section")].map((section) => section.id),
  Object.keys(facts.families), [...new Set(facts.runs.map((run) => run.seed))].sort(), facts.planes.length]);

function inWords(seconds) {
  if (seconds < 90) return `${Math.round(seconds)} s`;
  return seconds < 5400 ? `${Math.round(seconds / 60)} minutes` : `${Math.round(seconds / 3600)} hours`;
}

function showAge() {
  const age = Math.max(0, Date.now() / 1000 - data.changed);
  const isSilent = age > LONG_SILENCE && data.runs.some((run) => run.progress !== null);
  $("age").textContent = `Progress and curves are those of the last checkpoint. The files last changed ${inWords(age)} ago.`
    + (isSilent ? " Training may have stopped: the command that began it resumes it." : "");
}

function takeOver(page) {
  const fresh = partsOf(page);
  for (const [id, html] of fresh) {
    const part = $(id);
    if (html === served.get(id) || part.contains(document.activeElement)) continue; // the reader is there: next time
    const open = [...part.querySelectorAll("details")].map((details) => details.open);
    part.innerHTML = html;
    part.querySelectorAll("details").forEach((details, i) => { details.open = open[i]; });
    served.set(id, html);
  }
}

async function look() {
  const response = await fetch(location.pathname, { cache: "no-store", headers: tag ? { "If-None-Match": tag } : {} });
  if (response.status === 200) {
    const page = new DOMParser().parseFromString(await response.text(), "text/html");
    const facts = JSON.parse(page.getElementById("data")?.textContent ?? "null");
    if (facts === null || shapeOf(page, facts) !== shapeOf(document, data)) {
      location.reload();
      return;
    }
    tag = response.headers.get("ETag") ?? "";
    learn(facts);
    takeOver(page);
    sortRows();
    apply();
    shown.runs = shown.runs.filter((id) => runsById.has(id)); // one that failed meanwhile is gone
    if (!$("run-content").contains(document.activeElement)) showPanel();
  } else if (response.status !== 304) {
    throw new Error(`status ${response.status}`);
  }
  showAge();
}

function followStudy() {
  if (data.changed === null) return; // a page on the disk stays as it is
  served = partsOf(document);
  showAge();
  const next = async () => {
    try {
      await look();
    } catch {
      $("age").textContent = "This page is not up to date: prolu watch no longer answers.";
    }
    setTimeout(next, 1000 * SECONDS_BETWEEN_LOOKS);
  };
  setTimeout(next, 1000 * SECONDS_BETWEEN_LOOKS);
}
