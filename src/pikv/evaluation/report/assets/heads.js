// Shares kept by layer and head, a panel a method: one pixel a head, enlarged, the darker the more.
function drawHeads(chart, width) {
  const grid = element("div", { class: "panels" });
  for (const [method, shares] of Object.entries(chart.panels)) {
    const canvas = element("canvas", { width: shares[0].length, height: shares.length, role: "img" });
    const all = shares.flat();
    const told = `${method}: ${percent(d3.mean(all), 0)} kept, ${percent(d3.min(all), 0)} to ${percent(d3.max(all), 0)} by head`;
    canvas.setAttribute("aria-label", told);
    canvas.style.aspectRatio = `${Math.max(shares[0].length / shares.length, 0.5)}`;
    canvas.addEventListener("pointermove", (event) => {
      const column = Math.floor((event.offsetX / canvas.clientWidth) * shares[0].length);
      const row = Math.floor((event.offsetY / canvas.clientHeight) * shares.length);
      const share = shares[row]?.[column];
      if (share !== undefined) canvas.title = `layer ${row}, head ${column}: ${percent(share, 1)} kept`;
    });
    paint(canvas, shares);
    themeListeners.push(() => paint(canvas, shares));
    const name = element("span", { class: "panel-name", title: method }, method);
    grid.append(element("div", { class: "panel" }, name, element("span", { class: "panel-mean" }, percent(d3.mean(all), 0)), canvas));
  }
  const key = element("p", { class: "legend" }, "0%", element("span", { class: "ramp" }), "100% of the tokens kept");
  return element("div", {}, key, grid);
}

function paint(canvas, shares) {
  const context = canvas.getContext("2d");
  context.clearRect(0, 0, canvas.width, canvas.height);
  context.fillStyle = getComputedStyle(root).getPropertyValue("--accent");
  shares.forEach((row, y) =>
    row.forEach((share, x) => {
      context.globalAlpha = 0.04 + 0.96 * share;
      context.fillRect(x, y, 1, 1);
    }),
  );
}
