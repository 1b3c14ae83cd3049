// The list of latents: columns, filter, search and order. Only the rows in sight are elements of the page, since an SAE
// may have tens of thousands of latents.

const narrow = matchMedia("(max-width: 820px)"); // on a phone the list and the latent are seen one at a time
const BANDS = [
  ["all", "all latents", () => true],
  ["alive", "alive", (density) => density > 0],
  ["dead", "dead in this sample", (density) => density === 0],
  ["under-0.1", "density below 0.1%", (density) => density > 0 && density < 0.001],
  ["0.1-1", "density 0.1 to 1%", (density) => density >= 0.001 && density < 0.01],
  ["1-10", "density 1 to 10%", (density) => density >= 0.01 && density < 0.1],
  ["over-10", "density over 10%", (density) => density >= 0.1],
];
let columns; // of the list
let order = []; // the latents that the filters leave, sorted
let selected = -1; // the latent that is seen; -1 for none
const crowded = matchMedia("(max-width: 1240px)"); // the list has no room for a density beside what a search found

function defineColumns() {
  // `kind` is a class: columns that are `wide` are left out on a phone and in a search, which has a column of its own, and
  // those that are `spare` where there is no room in a search. `about` is said when one points at the head.
  const column = (key, title, values, show, width, kind = "", about = title) => ({ key, title, values, show, width, kind, about });
  const ids = Uint32Array.from(list.density, (_, i) => i);
  columns = [
    column("id", "latent", ids, (i) => String(i), "minmax(3.8rem, .7fr)"),
    column("token", facts.rows?.labels ? "label" : unit, null, (i) => token(list.token[i]), "minmax(3.6rem, 2fr)", "token", `the ${unit} on which it is most strongly active`),
    column("match", "found", null, why, "minmax(10.8rem, 1.2fr)", "match", "how well it matches the search"),
    column("density", "density", list.density, (i) => percent(list.density[i]), "minmax(4.2rem, 1fr)", "spare", `fraction of ${unit}s on which it is active`),
    column("max", "max", list.max, (i) => number(list.max[i]), "minmax(3.7rem, .9fr)", "", "largest activation"),
    column("mean", "mean", list.mean, (i) => number(list.mean[i]), "minmax(3.4rem, .9fr)", "wide", `mean activation over the ${unit}s on which it is active`),
    ...Object.entries(list.own).map(([name, values]) =>
      column(name, name, values, (i) => number(values[i]), "minmax(4.5rem, 1fr)", "wide", `the parameter ${name} of its nonlinearity`)),
    ...(list.cosine
      ? [column("cosine", "cos", list.cosine, (i) => number(list.cosine[i]), "minmax(3.2rem, .8fr)", "wide", "cosine of its encoder column and its decoder row")]
      : []),
  ];
  // Each parameter of the nonlinearity is a column more, for which the list takes some width from the latent.
  document.documentElement.style.setProperty("--list", `max(38%, ${24.5 + 4.5 * Object.keys(list.own).length}rem)`);
}

function columnsInSight() {
  const isLeftOut = { match: !found, wide: narrow.matches || found, spare: crowded.matches && found };
  return columns.filter((column) => !isLeftOut[column.kind]);
}

// The column by which the list is sorted: by match in a search and by strength else, until the reader asks for another.
const sortKey = () => (shown.sort && (shown.sort !== "match" || found) ? shown.sort : found ? "match" : "max");

function showHead() {
  $("rows").style.setProperty("--columns", columnsInSight().map((c) => c.width).join(" "));
  const by = sortKey();
  const isUp = shown.sort === by && shown.up;
  $("head").replaceChildren(...columnsInSight().map((c) => {
    const cell = make("span", { class: c.kind, role: "columnheader" });
    const arrow = by === c.key ? (isUp ? " ↑" : " ↓") : "";
    if (arrow) cell.setAttribute("aria-sort", isUp ? "ascending" : "descending");
    const button = make("button", { type: "button", title: `sort by ${c.about}` }, c.title + arrow);
    button.addEventListener("click", async () => {
      const up = by === c.key ? !isUp : c.key === "id" || c.key === "token";
      await change({ sort: c.key, up });
      [...$("head").querySelectorAll("button")].find((b) => b.textContent.startsWith(c.title))?.focus(); // it was made anew
    });
    cell.append(button);
    return cell;
  }));
  return { by, way: isUp ? 1 : -1 };
}

// Search, filter and sort. What was found before stays until then. Returns whether it was done: if another search began
// meanwhile, that one does it.
async function arrange() {
  const asked = shown.query;
  $("rows").setAttribute("aria-busy", "true");
  const slow = setTimeout(() => { $("count").textContent = "searching…"; }, 300);
  const outcome = await search(asked).finally(() => clearTimeout(slow));
  if (!outcome || asked !== shown.query) return false;
  found = outcome.found;
  const { by, way } = showHead();
  const inBand = BANDS.find(([key]) => key === shown.band)[2];
  order = [];
  for (let i = 0; i < list.density.length; i++) if (inBand(list.density[i]) && (!found || found.reasons[i])) order.push(i);
  const named = (i) => (list.token[i] < 0 ? "" : tokens[list.token[i]].trim());
  const compareNames = (a, b) => (named(a) < named(b) ? -1 : named(a) > named(b) ? 1 : 0);
  const { values } = columns.find((c) => c.key === by);
  const compare = { token: compareNames, match: (a, b) => found.reasons[b] - found.reasons[a] }[by] ?? ((a, b) => values[a] - values[b]);
  // Equal ones by strength in a search, and then by number.
  order.sort((a, b) => way * compare(a, b) || (found ? list.max[b] - list.max[a] : 0) || a - b);
  const all = list.density.length;
  $("count").textContent = outcome.said + (found?.asked.problem ? "" : order.length === all ? `${whole(all)} latents` : `${whole(order.length)} of ${whole(all)} latents`);
  $("rows").setAttribute("aria-rowcount", order.length);
  $("rows").scrollTop = 0;
  showRows();
  $("rows").setAttribute("aria-busy", "false");
  return true;
}

const rowHeight = () => (narrow.matches ? 40 : 32); // as in the style sheet

// Make the rows in sight, and some above and below so that scrolling shows no gap.
function showRows() {
  const height = rowHeight();
  const rows = $("rows");
  const cells = columnsInSight();
  $("window").style.height = `${Math.max(order.length, 2) * height}px`; // two rows have room for "No match."
  const first = Math.max(0, Math.floor(rows.scrollTop / height) - 8);
  const last = Math.min(order.length, first + Math.ceil(rows.clientHeight / height) + 16);
  $("visible").style.transform = `translateY(${first * height}px)`;
  const made = [];
  for (let place = first; place < last; place++) {
    const i = order[place];
    const kind = list.density[i] === 0 ? "row dead" : "row";
    made.push(make("div", { class: kind, role: "row", "data-id": i, "aria-rowindex": place + 1, "aria-selected": i === selected },
      ...cells.map((c) => make("span", { class: c.kind, role: "gridcell" }, c.show(i)))));
  }
  if (!order.length) made.push(make("p", { class: "none" }, found?.asked.problem ? "Nothing was searched." : "No match."));
  $("visible").replaceChildren(...made);
}

// Scroll the list just so far that the row of a latent is in sight.
function reveal(id) {
  const place = order.indexOf(id);
  if (place < 0) return;
  const rows = $("rows");
  const height = rowHeight();
  const top = place * height;
  const bottom = top + height + $("head").offsetHeight; // the head covers the first row's height
  if (top < rows.scrollTop) rows.scrollTop = top - height;
  else if (bottom > rows.scrollTop + rows.clientHeight) rows.scrollTop = bottom - rows.clientHeight + height;
}
