"use strict";
// Every table with column heads can be sorted by a press on a head; rows stay within their group.
function valueOf(row, column) {
  const cell = row.cells[column];
  const text = (cell?.firstChild?.textContent ?? "").trim();
  const match = /^[<>≤≥✓✗\s]*([-+−]?[\d,]*\.?\d+(?:e[-+]?\d+)?)\s*([kMG%×]?)/.exec(text);
  if (!match) return text;
  const units = { k: 1e3, M: 1e6, G: 1e9 };
  return Number(match[1].replace(/,/g, "").replace("−", "-")) * (units[match[2]] ?? 1);
}

function compare(a, b) {
  const missing = (value) => value === "" || value === "–";
  if (missing(a) || missing(b)) return missing(a) - missing(b);
  if (typeof a === "number" && typeof b === "number") return a - b;
  if (typeof a !== typeof b) return typeof a === "number" ? -1 : 1;
  return a.localeCompare(b, undefined, { numeric: true });
}

function runs(rows) {
  const found = [[]];
  for (const row of rows) {
    if (row.classList.contains("group") || row.classList.contains("apart")) found.push([row], []);
    else found.at(-1).push(row);
  }
  return found;
}

function sort(table, head, column) {
  const was = head.getAttribute("aria-sort");
  const now = was === "descending" ? "ascending" : was === "ascending" ? "none" : "descending";
  for (const other of table.tHead.rows[0].cells) if (other.hasAttribute("aria-sort")) other.setAttribute("aria-sort", "none");
  head.setAttribute("aria-sort", now);
  const body = table.tBodies[0];
  const sign = now === "descending" ? -1 : 1;
  for (const part of runs(first.get(table))) {
    const keyed = part.map((row, index) => ({ row, index, value: valueOf(row, column) }));
    if (now !== "none") {
      keyed.sort((a, b) => {
        const order = compare(a.value, b.value);
        const known = (value) => value !== "" && value !== "–";
        return (known(a.value) && known(b.value) ? sign * order : order) || a.index - b.index;
      });
    }
    for (const { row } of keyed) body.append(row);
  }
}

const first = new Map();
for (const table of document.querySelectorAll("table")) {
  const rows = table.tBodies[0] ? [...table.tBodies[0].rows] : [];
  if (!table.tHead || rows.filter((row) => !row.classList.contains("group")).length < 2) continue;
  first.set(table, rows);
  [...table.tHead.rows[0].cells].forEach((head, column) => {
    if (!head.textContent.trim() && column > 0) return;
    const button = document.createElement("button");
    button.type = "button";
    button.className = "sort";
    button.append(...head.childNodes);
    if (!button.textContent.trim()) button.setAttribute("aria-label", "Sort by name");
    head.append(button);
    head.setAttribute("aria-sort", "none");
    button.addEventListener("click", () => sort(table, head, column));
  });
}

// A link to something inside a folded part unfolds it.
function unfold() {
  const target = location.hash.length > 1 && document.getElementById(decodeURIComponent(location.hash.slice(1)));
  for (let at = target; at; at = at.parentElement) if (at.tagName === "DETAILS") at.open = true;
}
addEventListener("hashchange", unfold);
unfold();

// Paper cannot be unfolded: printing opens what is folded, and afterwards it is as it was. Samples stay as they are.
let unfolded = [];
addEventListener("beforeprint", () => {
  unfolded = [...document.querySelectorAll("details:not([open], .sample)")].filter((item) => !item.closest("#held-samples"));
  for (const item of unfolded) item.open = true;
});
addEventListener("afterprint", () => {
  for (const item of unfolded) item.open = false;
  unfolded = [];
});
