"use strict";
const data = JSON.parse(document.getElementById("figures").textContent);
const tip = document.getElementById("tip");
const map = document.getElementById("map");
const said = document.getElementById("said");
const number = (value) => (value === null || value === undefined ? "not known" : String(value));

function describe(row, column) {
  const line = data.rows[row];
  const [example, text, role] = data.columns[column];
  const head = line.step ? `${line.case}, ${line.step}` : line.case;
  let first = column;
  while (first > 0 && data.columns[first - 1][0] === example) first -= 1;
  const order = [...new Set(data.columns.map((c) => c[0]))].indexOf(example);
  const block = line.cells[order];
  const token = block && block.tokens[column - first];
  const facts = [["example", String(example)], ["token", text], ["role", role]];
  if (!token) return { head, facts: [...facts, ["", "not in this step"]] };
  const [ratio, weight, ideal] = token;
  facts.push([ideal === 0 ? "weight, of a response token's" : "weight over ideal", number(ratio) + (line.known ? "" : " (scaled: the optimizer hides the size)")]);
  facts.push(["weight", number(weight)], ["ideal weight", number(ideal)], ["where", block.at]);
  if (block.copies > 1) facts.push(["copies", `${block.copies} in this step; their mean is shown`]);
  return { head, facts };
}

function show(cell, aloud) {
  const row = Number(cell.closest("[data-row]").dataset.row);
  const column = cells[row].indexOf(cell);
  const told = describe(row, column);
  tip.replaceChildren();
  const head = document.createElement("b");
  head.textContent = told.head;
  tip.append(head);
  const list = document.createElement("dl");
  for (const [name, value] of told.facts) {
    const term = document.createElement("dt");
    const figure = document.createElement("dd");
    term.textContent = name;
    figure.textContent = value;
    list.append(term, figure);
  }
  tip.append(list);
  tip.hidden = false;
  const box = cell.getBoundingClientRect();
  const own = tip.getBoundingClientRect();
  const left = Math.min(Math.max(8, box.left + box.width / 2 - own.width / 2), innerWidth - own.width - 8);
  const below = box.bottom + 8 + own.height < innerHeight;
  tip.style.left = `${left}px`;
  tip.style.top = `${below ? box.bottom + 8 : Math.max(8, box.top - own.height - 8)}px`;
  document.querySelector(".cell-on")?.classList.remove("cell-on");
  cell.classList.add("cell-on");
  if (aloud) said.textContent = `${told.head}: ${told.facts.map((f) => f.join(" ")).join(", ")}`;
}

function hide() {
  tip.hidden = true;
  document.querySelector(".cell-on")?.classList.remove("cell-on");
}

const cells = map ? [...map.querySelectorAll("[data-row]")].map((row) => [...row.querySelectorAll("i")]) : [];
let at = [0, 0];

if (map && cells.length) {
  map.addEventListener("pointerover", (event) => (event.target.matches("i") ? show(event.target, false) : hide()));
  map.addEventListener("pointerleave", hide);
  map.addEventListener("scroll", hide);
  map.addEventListener("focus", () => map.matches(":focus-visible") && show(cells[at[0]][at[1]], true));
  map.addEventListener("blur", hide);
  map.addEventListener("keydown", (event) => {
    const moves = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] };
    if (event.key === "Escape") return hide();
    if (!moves[event.key]) return undefined;
    event.preventDefault();
    const row = Math.min(Math.max(at[0] + moves[event.key][0], 0), cells.length - 1);
    at = [row, Math.min(Math.max(at[1] + moves[event.key][1], 0), cells[row].length - 1)];
    const cell = cells[at[0]][at[1]];
    cell.scrollIntoView({ block: "nearest", inline: "nearest" });
    requestAnimationFrame(() => requestAnimationFrame(() => show(cell, true)));
    return undefined;
  });
}

document.getElementById("copy").addEventListener("click", async (event) => {
  const command = document.getElementById("command");
  let done = true;
  try {
    await navigator.clipboard.writeText(command.textContent);
  } catch {
    getSelection().selectAllChildren(command);
    done = document.execCommand("copy");
  }
  event.target.textContent = done ? "Copied" : "Selected: press Ctrl+C";
});
