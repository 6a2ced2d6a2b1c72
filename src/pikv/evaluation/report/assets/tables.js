// The button in a header sorts its table by that column, pressed again the other way round; what is not known stays below.
document.querySelectorAll("section.table table").forEach((table) => {
  const body = table.tBodies[0];
  const headers = [...table.tHead.rows[0].cells];
  const text = (row, column) => row.cells[column].textContent.trim();
  const number = (row, column) => parseFloat(text(row, column).replace(/,/g, ""));
  headers.forEach((header, column) =>
    header.firstElementChild.addEventListener("click", () => {
      const ascending = header.getAttribute("aria-sort") !== "ascending";
      headers.forEach((each) => each.removeAttribute("aria-sort"));
      header.setAttribute("aria-sort", ascending ? "ascending" : "descending");
      const rows = [...body.rows];
      const isNumber = rows.some((row) => !Number.isNaN(number(row, column))) && rows.every((row) => /^[-+.\d]/.test(text(row, column)));
      const compare = isNumber
        ? (a, b) => number(a, column) - number(b, column)
        : (a, b) => text(a, column).localeCompare(text(b, column));
      const unknown = (row) => text(row, column) === "-";
      rows.sort((a, b) => unknown(a) - unknown(b) || (ascending ? 1 : -1) * compare(a, b) || 0);
      body.append(...rows);
    }),
  );
});
