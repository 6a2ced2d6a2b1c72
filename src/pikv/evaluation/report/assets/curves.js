// Curves with their names at their ends. A marker and a colour belong to one method in all charts of the page.
const COLORS = 7;
const SYMBOLS = ["circle", "square", "triangle", "diamond", "star", "wye", "cross"];
const DASHES = ["none", "5 3", "2 3"];
const MOST_INTERVALS = 6; // more of them at once are too many to read; they then show where one points

function styleOf(number) {
  if (number < 0) return { color: "var(--ink)", symbol: "circle", dash: "none" };
  const round = Math.floor(number / COLORS);
  return {
    color: `var(--series-${number % COLORS})`,
    symbol: SYMBOLS[(number + round) % SYMBOLS.length],
    dash: DASHES[round % DASHES.length],
  };
}

function drawCurves(chart, width) {
  const [formatX, formatY] = [FORMATS[chart.x.unit], FORMATS[chart.y.unit]];
  const curves = chart.curves
    .map((curve) => ({ ...curve, ...styleOf(curve.style), points: curve.points.filter((p) => p.x !== null && p.y !== null) }))
    .filter((curve) => curve.points.length);
  const names = curves.map((curve) => ({ curve, text: curve.name, y: curve.points.at(-1).y, x: curve.points.at(-1).x }));
  if (chart.reference !== null) names.push({ text: "full cache", y: chart.reference, x: null });
  const room = Math.min(Math.max(...names.map((name) => textWidth(name.text))) + 44, Math.floor(0.42 * width));
  const points = curves.flatMap((curve) => curve.points.map((point) => ({ ...point, curve })));
  const height = Math.max(width < 500 ? 300 : chart.y.unit === "share" ? 400 : 320, names.length * LABEL_HEIGHT + 80);
  const margins = { marginLeft: 52, marginRight: room, marginTop: 30, marginBottom: 44 };
  const xs = d3.extent(points, (point) => point.x);
  const isSaved = chart.x.unit === "saved";
  const domain = isSaved ? [Math.min(...xs) / 1.06, Math.max(1, ...xs)] : [xs[0] / 1.1, xs[1] * 1.02];
  const ticks = isSaved ? (domain[0] > 0.5 ? FEW_SAVED_TICKS : SAVED_TICKS).filter((tick) => tick >= domain[0]) : [...new Set(points.map((point) => point.x))];
  const [tops, bottoms] = [points.map((point) => point.high ?? point.y), points.map((point) => point.low ?? point.y)];
  const lowest = d3.min([...bottoms, chart.reference ?? 1]);
  const plot = Plot.plot({
    width,
    height,
    ...margins,
    style: { background: "none", fontFamily: "inherit", fontSize: "12px", overflow: "visible" },
    x: { type: chart.x.is_log ? "log" : "linear", domain, reverse: isSaved, label: null },
    y: {
      domain: chart.y.unit === "share" ? [lowest < 0.5 ? 0 : Math.floor(10 * lowest - 0.2) / 10, 1] : [0, d3.max(tops) * 1.05],
      label: null,
    },
    marks: [
      Plot.gridY({ ticks: 5, stroke: "var(--rule)", strokeOpacity: 1 }),
      Plot.axisY({ ticks: 5, tickSize: 0, tickFormat: formatY.tick, fill: "var(--muted)" }),
      Plot.axisX({ ticks: thinned(ticks, width - room - 52), tickSize: 4, tickFormat: formatX.tick, fill: "var(--muted)", stroke: "var(--muted)" }),
      Plot.text([chart.y.label], { frameAnchor: "top-left", dx: -44, dy: -22, text: (d) => d, fill: "var(--muted)" }),
      Plot.text([`${chart.x.label} →`], { frameAnchor: "bottom-right", dy: 36, text: (d) => d, fill: "var(--muted)" }),
      chart.reference === null ? null : Plot.ruleY([chart.reference], { stroke: "var(--ink)", strokeWidth: 1.5, strokeDasharray: "1 4", strokeLinecap: "round" }),
      curves.flatMap((curve) => {
        const [line, interval] = [tagged(curve, "line"), tagged(curve, "interval")];
        const { color: stroke, color: fill, symbol, dash: strokeDasharray } = curve;
        const known = curve.points.filter((point) => point.low !== null);
        return [
          Plot.ruleX(known, { x: "x", y1: "low", y2: "high", stroke, strokeOpacity: 0.45, render: interval }),
          Plot.lineY(curve.points, { x: "x", y: "y", stroke, strokeWidth: 1.75, strokeDasharray, render: line }),
          Plot.dot(curve.points, { x: "x", y: "y", fill, stroke: "var(--paper)", strokeWidth: 1, symbol, r: 4.5, render: line }),
        ];
      }),
      Plot.tip(points, Plot.pointer({ x: "x", y: "y", title: (point) => tipOf(point), fontSize: 12, lineHeight: 1.35, maxRadius: 40 })),
    ],
  });
  const [scaleX, scaleY] = [plot.scale("x"), plot.scale("y")];
  const svg = plot.tagName === "svg" ? plot : plot.querySelector("svg");
  writeNames(svg, names, { width, height, room, margins, scaleX, scaleY });
  highlight(svg, plot);
  if (curves.length > MOST_INTERVALS) svg.classList.add("few-intervals");
  return plot;

  function tipOf(point) {
    const between = point.low === null ? "" : ` (${formatY.exact(point.low)} to ${formatY.exact(point.high)})`;
    const against = isSaved ? `${formatX.exact(point.x)} of the bytes saved` : `at ${formatX.exact(point.x)}`;
    return `${point.name}\n${formatY.exact(point.y)}${chart.y.unit === "share" ? ` ${chart.y.label}` : ""}${between}\n${against}`;
  }
}

// Ticks far enough apart for their text.
function thinned(ticks, width) {
  const sorted = [...ticks].sort((a, b) => a - b);
  const [first, last] = [Math.log(sorted[0]), Math.log(sorted.at(-1))];
  const place = (tick) => ((Math.log(tick) - first) / (last - first || 1)) * width;
  const kept = [];
  for (const tick of sorted) if (!kept.length || place(tick) - place(kept.at(-1)) > 46) kept.push(tick);
  return kept;
}

function writeNames(svg, names, { width, height, room, margins, scaleX, scaleY }) {
  names.forEach((name) => (name.at = scaleY.apply(name.y)));
  names.sort((a, b) => a.at - b.at);
  const places = spread(names.map((name) => name.at), LABEL_HEIGHT, margins.marginTop - 6, height - margins.marginBottom);
  const left = width - room + 22;
  const group = d3.select(svg).append("g").attr("class", "names");
  names.forEach((name, index) => {
    const y = places[index];
    const start = name.curve ? scaleX.apply(name.x) + 6 : width - room;
    const label = group.append("g").attr("class", "name").attr("data-curve", name.curve ? name.curve.name : null);
    label.append("path").attr("class", "leader").attr("d", `M${start},${name.at}L${left - 8},${y}`);
    if (name.curve) {
      const symbol = d3.symbol(d3[`symbol${name.curve.symbol[0].toUpperCase()}${name.curve.symbol.slice(1)}`], 44);
      label.append("path").attr("d", symbol()).attr("transform", `translate(${left},${y})`).style("fill", name.curve.color);
    }
    const text = label.append("text").attr("x", left + (name.curve ? 9 : -4)).attr("y", y).attr("dy", "0.35em");
    text.text(cut(name.text, width - left - 10)).append("title").text(name.text);
  });
}

// Marks that say whose they are.
function tagged(curve, kind) {
  return (index, scales, values, dimensions, context, next) => {
    const group = next(index, scales, values, dimensions, context);
    group.dataset.curve = curve.name;
    group.classList.add(kind);
    return group;
  };
}

// The curve that is pointed at, or whose name is, stands out.
function highlight(svg, plot) {
  const marked = [...svg.querySelectorAll("[data-curve]")];
  const show = (name) => {
    svg.classList.toggle("choosing", name !== null);
    marked.forEach((part) => part.classList.toggle("chosen", part.dataset.curve === name));
  };
  plot.addEventListener("input", () => show(plot.value?.curve?.name ?? null));
  svg.querySelectorAll(".name[data-curve]").forEach((label) => {
    label.addEventListener("pointerenter", () => show(label.dataset.curve));
    label.addEventListener("pointerleave", () => show(null));
  });
}
