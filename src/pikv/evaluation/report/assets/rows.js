// Figures side by side, one row a method: bars, points and rings, with standard deviations.
const ROW_HEIGHT = 24;

function drawRows(chart, width) {
  const format = FORMATS[chart.x.unit];
  const named = (row) => (row === "none" ? "full cache" : row);
  const room = Math.min(Math.max(...chart.rows.map((row) => textWidth(named(row)))) + 20, Math.floor(0.42 * width));
  const points = chart.series.flatMap((series) =>
    series.values.flatMap((values, row) =>
      values
        .filter((value) => value !== null)
        .map((value) => ({ row: chart.rows[row], value, series, spread: series.spread?.[row] ?? null })),
    ),
  );
  const of = (shape) => points.filter((point) => point.series.shape === shape);
  const spread = points.filter((point) => point.spread);
  const color = (point) => (point.row === "none" ? "var(--muted)" : "var(--accent)");
  const legend = chart.series.length > 1;
  const plot = Plot.plot({
    width,
    height: chart.rows.length * ROW_HEIGHT + 60,
    marginLeft: room,
    marginRight: 24,
    marginTop: 10,
    marginBottom: 44,
    style: { background: "none", fontFamily: "inherit", fontSize: "12px", overflow: "visible" },
    y: { type: "band", domain: chart.rows, padding: 0.35, label: null },
    x: { label: null, nice: true, zero: true },
    marks: [
      Plot.gridX({ ticks: width < 500 ? 4 : 6, stroke: "var(--rule)", strokeOpacity: 1 }),
      Plot.axisX({ ticks: width < 500 ? 4 : 6, tickSize: 0, tickFormat: format.tick, fill: "var(--muted)" }),
      Plot.text([`${chart.x.label} →`], { frameAnchor: "bottom-right", dy: 36, text: (d) => d, fill: "var(--muted)" }),
      Plot.axisY({ tickSize: 0, tickFormat: (name) => cut(named(name), room - 18), fill: "var(--ink)" }),
      Plot.barX(of("bar"), { x: "value", y: "row", fill: color, fillOpacity: chart.series.length > 1 ? 0.35 : 0.85, rx: 1.5 }),
      Plot.ruleY(spread, { x1: (p) => p.value - p.spread, x2: (p) => p.value + p.spread, y: "row", stroke: color }),
      Plot.dot(of("ring"), { x: "value", y: "row", stroke: color, fill: "var(--paper)", strokeWidth: 1.5, r: 5 }),
      Plot.dot(of("dot"), { x: "value", y: "row", fill: color, r: 3.5 }),
      Plot.tip(points, Plot.pointerY({ x: "value", y: "row", title: tipOf, fontSize: 12, lineHeight: 1.35 })),
    ],
  });
  return legend ? element("div", {}, legendOf(chart), plot) : plot;

  function tipOf(point) {
    const about = point.spread ? ` ±${format.exact(point.spread)}` : "";
    return `${named(point.row)}\n${legend ? `${point.series.name}: ` : ""}${format.exact(point.value)}${about}`;
  }
}

function legendOf(chart) {
  const entries = chart.series.map((series) => element("span", { class: `key ${series.shape}` }, series.name));
  return element("p", { class: "legend" }, ...entries);
}
