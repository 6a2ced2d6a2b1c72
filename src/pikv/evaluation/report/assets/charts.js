// Every chart of the page, drawn anew when its place gets wider or narrower.
const DATA = JSON.parse(document.getElementById("data").textContent);
const DRAW = { curves: drawCurves, rows: drawRows, heads: drawHeads };

document.querySelectorAll("figure[data-chart]").forEach((figure) => {
  const chart = DATA.charts[+figure.dataset.chart];
  const place = figure.querySelector(".plot");
  let drawn = 0;
  const draw = () => {
    const width = Math.floor(place.clientWidth);
    if (!width || width === drawn || (drawn && chart.kind === "heads")) return;
    drawn = width;
    place.replaceChildren(DRAW[chart.kind](chart, width));
  };
  draw();
  new ResizeObserver(() => requestAnimationFrame(draw)).observe(place);
});
