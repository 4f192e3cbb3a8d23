"use strict";
for (const table of document.querySelectorAll("table.sortable")) {
  const body = table.tBodies[0];
  const key = (row, column) => row.cells[column].dataset.key ?? row.cells[column].textContent;
  const compare = {
    number: (a, b) => Number(a) - Number(b),
    text: (a, b) => a.localeCompare(b, undefined, { numeric: true }),
  };
  for (const heading of table.querySelectorAll("th[data-sort]")) {
    const button = document.createElement("button");
    button.append(...heading.childNodes);
    heading.append(button);
    button.addEventListener("click", () => {
      const column = heading.cellIndex;
      const direction = heading.getAttribute("aria-sort") === "ascending" ? -1 : 1;
      const rows = [...body.rows].map((row) => [key(row, column), row]);
      // What is missing stays last, whichever way.
      rows.sort(([a], [b]) => (a === "") - (b === "") || direction * compare[heading.dataset.sort](a, b));
      body.append(...rows.map(([, row]) => row));
      for (const other of table.querySelectorAll("th")) other.removeAttribute("aria-sort");
      heading.setAttribute("aria-sort", direction === 1 ? "ascending" : "descending");
    });
  }
}
