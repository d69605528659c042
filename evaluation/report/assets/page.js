"use strict";
// Sorts a table by the column whose header is pressed: by data-value, as numbers in columns of numbers. A second press
// turns the order round. What is not known stays last either way, and rows that are alike keep their order.
for (const table of document.querySelectorAll("table.sortable")) {
  const headers = [...table.tHead.rows[0].cells];
  headers.forEach((header, place) => {
    header.querySelector("button").addEventListener("click", () => {
      const upward = header.getAttribute("aria-sort") !== "ascending";
      headers.forEach((other) => other.removeAttribute("aria-sort"));
      header.setAttribute("aria-sort", upward ? "ascending" : "descending");
      const numeric = header.classList.contains("number");
      const value = (row) => row.cells[place].dataset.value;
      const compare = (a, b) => (numeric ? Number(a) - Number(b) : a.localeCompare(b, "en", { numeric: true }));
      const body = table.tBodies[0];
      const rows = [...body.rows].sort((a, b) => {
        const [first, second] = [value(a), value(b)];
        if (first === "" || second === "") return (first === "") - (second === "");
        return upward ? compare(first, second) : compare(second, first);
      });
      body.append(...rows);
    });
  });
}
