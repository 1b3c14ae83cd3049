// What is shown stands in the address, behind the #, so that a link shows the same and Back goes back: #12 for a latent,
// and with a search, a filter or an order of the list #latent=12&query=ball&where=promoted&band=alive&sort=density&up=yes

const shown = { latent: -1, query: "", where: "both", band: "all", sort: "", up: false };
const USUAL = { ...shown }; // what the address does not mention; no `sort` is by match in a search, by strength else

function addressOf(changes) {
  const wanted = { ...shown, ...changes };
  const words = new URLSearchParams();
  for (const name of ["latent", "query", "where", "band", "sort"]) if (wanted[name] !== USUAL[name]) words.set(name, wanted[name]);
  if (wanted.up) words.set("up", "yes");
  if (!words.size) return location.pathname + location.search;
  return words.size === 1 && words.has("latent") ? `#${wanted.latent}` : `#${words}`;
}

// Take what the address says; what this page does not have is left out.
function readAddress() {
  const hash = location.hash.slice(1);
  const words = new URLSearchParams(/^\d+$/.test(hash) ? `latent=${hash}` : hash.includes("=") ? hash : "");
  const named = (name, known) => (known.includes(words.get(name)) ? words.get(name) : USUAL[name]);
  const latent = /^\d+$/.test(words.get("latent") ?? "") ? Number(words.get("latent")) : -1;
  Object.assign(shown, {
    latent: latent < list.density.length ? latent : -1,
    query: words.get("query") ?? "",
    where: named("where", ["both", "examples", "promoted"]),
    band: named("band", BANDS.map(([key]) => key)),
    sort: named("sort", columns.map((column) => column.key)),
    up: words.get("up") === "yes",
  });
}

let isTyping = false; // whether the last step was a letter of a search

// Change what is shown. Each change is a step that Back takes back, but all letters of a search are one step, and so
// `inPlace` asks for: or Back would go through every latent that was passed.
function change(changes, { inPlace = false, typing = false } = {}) {
  const address = addressOf(changes);
  if (inPlace || (typing && isTyping)) history.replaceState(null, "", address);
  else if (address !== addressOf({})) history.pushState(null, "", address);
  isTyping = typing;
  Object.assign(shown, changes);
  return follow(changes);
}

// Bring the page to what `shown` says. Only what a change of the list asks for arranges the list anew.
async function follow(changes) {
  const isOfList = Object.keys(changes).some((name) => name !== "latent");
  $("where").value = shown.where;
  $("band").value = shown.band;
  if ($("query").value !== shown.query) $("query").value = shown.query;
  if (isOfList && !(await arrange())) return;
  const wanted = shown.latent >= 0 || narrow.matches ? shown.latent : order[0] ?? -1; // a phone shows the list first
  if (wanted !== selected || isOfList) await show(wanted);
}
