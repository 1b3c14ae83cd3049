// Figures by keyboard: the arrow keys go from point to point, Enter opens the runs of a point.

const places = new Map(); // where the reader is in each figure: [trace, point]

function listenToKeys(plot, title) {
  plot.tabIndex = 0;
  plot.setAttribute("role", "application"); // a screen reader leaves the arrow keys to it
  plot.setAttribute("aria-label", `${title}. The arrow keys go from point to point, and Enter opens the runs of a point.`);
  plot.addEventListener("keydown", (event) => {
    const traces = plot.data.map((trace, i) => ({ trace, i })).filter(({ trace }) => trace.customdata && trace.mode === "lines+markers");
    if (!traces.length) return;
    const now = places.get(plot.id);
    let at = traces.findIndex(({ i }) => i === now?.[0]);
    let point = at < 0 ? -1 : now[1];
    at = Math.max(at, 0);
    const last = traces[at].trace.x.length - 1;
    if (event.key === "ArrowRight") point = Math.min(point + 1, last);
    else if (event.key === "ArrowLeft") point = Math.max(point - 1, 0);
    else if (event.key === "ArrowDown" || event.key === "ArrowUp") {
      at = (at + (event.key === "ArrowDown" ? 1 : traces.length - 1)) % traces.length;
      point = Math.min(Math.max(point, 0), traces[at].trace.x.length - 1);
    } else if (event.key === "Enter" && point >= 0) {
      openRuns(runsAt(traces[at].trace, point));
      return;
    } else return;
    event.preventDefault();
    places.set(plot.id, [traces[at].i, point]);
    Plotly.Fx.hover(plot, [{ curveNumber: traces[at].i, pointNumber: point }]);
    $("spoken").textContent = new DOMParser().parseFromString(traces[at].trace.text[point].replaceAll("<br>", ", "), "text/html").body.textContent;
  });
  plot.addEventListener("blur", () => Plotly.Fx.unhover(plot));
}
