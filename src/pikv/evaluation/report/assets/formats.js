// How figures are written, by the unit of an axis; exact where a figure is pointed at.
const percent = (value, digits) => `${(100 * value).toFixed(digits)}%`;
const plain = (value) => (value >= 100 ? d3.format(",.0f")(value) : d3.format(".3~r")(value));
const FORMATS = {
  share: { tick: (v) => percent(v, 0), exact: (v) => percent(v, 1) },
  saved: { tick: (v) => `${+(100 * (1 - v)).toFixed(2)}%`, exact: (v) => percent(1 - v, 1) },
  ms: { tick: d3.format("~s"), exact: (v) => `${plain(v)} ms` },
  MiB: { tick: plain, exact: (v) => `${plain(v)} MiB` },
  tokens: { tick: d3.format(","), exact: (v) => `${d3.format(",")(v)} tokens` },
};
FORMATS.ms.tick = plain;

// Ticks that a reader would choose: on logarithmic axes the lengths that were measured, or ratios that methods are given.
const FEW_SAVED_TICKS = [0, 0.1, 0.2, 0.3, 0.4].map((saved) => 1 - saved);
const SAVED_TICKS = [0, 0.5, 0.75, 0.9, 0.95, 0.98, 0.99, 0.995, 0.999].map((saved) => 1 - saved);

function element(name, attributes = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...children);
  return made;
}
