"use strict";
const SCALES = { k: 1e3, M: 1e6, G: 1e9, T: 1e12 };
const NUMBER = /^[~(<>≤≥≈\s]*([-−]?\d[\d,]*(?:\.\d+)?(?:e[-+]?\d+)?)\s?([kMGT](?!\w))?/;
const MISSING = new Set(["", "-", "–"]);
const all = (selector, within = document) => [...within.querySelectorAll(selector)];

document.documentElement.classList.add("scripted");

// Rows. One of the table of runs is a <tbody> with its details.
const tables = all("table").map((table) => ({
  table,
  rows: table.classList.contains("runs") ? [...table.tBodies] : [...table.tBodies[0].rows],
}));
const cellsOf = (row) => (row.cells ? row : row.rows[0]).cells;
function textOf(cell) { // without the letters and daggers above its end
  const above = all("sup", cell).map((sup) => sup.textContent).join("");
  return cell.textContent.slice(0, cell.textContent.length - above.length).trim();
}

// Sorting: by number where most cells of a column are numbers; words follow the numbers, what is missing comes last.
function keyOf(text) {
  if (MISSING.has(text)) return { rank: 2, value: "" };
  const found = NUMBER.exec(text);
  if (!found) return { rank: 1, value: text };
  return { rank: 0, value: Number(found[1].replace(/,/g, "").replace("−", "-")) * (SCALES[found[2]] ?? 1) };
}
function keysOf(rows, column, words) {
  const texts = rows.map((row) => textOf(cellsOf(row)[column]));
  const keys = texts.map(keyOf);
  const numbers = keys.filter((key) => key.rank === 0).length;
  const known = keys.filter((key) => key.rank < 2).length;
  if (!words && 2 * numbers >= known) return keys;
  return texts.map((text) => ({ rank: MISSING.has(text) ? 2 : 1, value: text }));
}
function sort({ table, rows }, column, order) {
  const head = table.tHead.rows[0].cells;
  [...head].forEach((th, at) => th.setAttribute("aria-sort", at === column ? order : "none"));
  let sorted = rows;
  if (order !== "none") {
    const sign = order === "ascending" ? 1 : -1;
    const keys = keysOf(rows, column, head[column].classList.contains("wrap"));
    const compare = (a, b) => a.rank - b.rank || sign * (a.rank === 0 ? a.value - b.value
      : a.value.localeCompare(b.value, undefined, { numeric: true, sensitivity: "base" }));
    sorted = rows.map((row, at) => at).sort((a, b) => compare(keys[a], keys[b]) || a - b).map((at) => rows[at]);
  }
  rows[0]?.parentNode.append(...sorted);
}
const NEXT = { none: "ascending", ascending: "descending", descending: "none" };
for (const entry of tables) {
  [...entry.table.tHead.rows[0].cells].forEach((th, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...th.childNodes);
    button.addEventListener("click", () => sort(entry, column, NEXT[th.getAttribute("aria-sort")]));
    th.append(button);
    th.setAttribute("aria-sort", "none");
  });
}

// Filtering: every row of the page that can be told apart by what is asked.
const form = document.getElementById("filter");
const entries = tables.flatMap(({ table, rows }) => rows.map((row) => ({
  table, row, words: [...cellsOf(row)].map((cell) => cell.textContent).join(" ").toLowerCase(),
})));
for (const name of ["task", "model", "status"]) {
  const values = new Set(entries.flatMap(({ row }) => (row.dataset[name] ?? "").split(name === "status" ? " " : "\n")));
  values.delete("");
  form.elements[name].append(...[...values].sort().map((value) => new Option(value, value)));
}
function filter() {
  const words = form.elements.words.value.toLowerCase().split(/\s+/).filter(Boolean);
  const { task, model, status } = Object.fromEntries(new FormData(form));
  const shown = new Map(tables.map(({ table }) => [table, 0]));
  for (const entry of entries) {
    const { dataset } = entry.row;
    const fits = words.every((word) => entry.words.includes(word)) && (!task || dataset.task === task)
      && (!model || dataset.model === model) && (!status || (dataset.status ?? "").split(" ").includes(status));
    entry.row.hidden = !fits;
    shown.set(entry.table, shown.get(entry.table) + fits);
  }
  let count = 0;
  for (const [table, rows] of shown) {
    const own = table.closest(".sortable");
    if (own) own.hidden = rows === 0;
    count += rows;
  }
  form.querySelector("output").value = count === entries.length ? `${count} rows` : `${count} of ${entries.length} rows`;
}
form.hidden = false;
form.addEventListener("input", filter);
form.addEventListener("reset", () => setTimeout(filter));
form.addEventListener("submit", (event) => event.preventDefault());
filter();

// Runs: the row's link opens its details, and so does an address that ends in #run-id.
function show(details, open) {
  details.open = open;
  details.closest("tr").hidden = !open;
  details.closest("tbody").querySelector("a").setAttribute("aria-expanded", String(open));
}
for (const details of all("details.run")) {
  show(details, false);
  details.addEventListener("toggle", () => show(details, details.open));
}
all("table.runs").forEach((table) => table.addEventListener("click", (event) => {
  const link = event.target.closest("tbody th a");
  if (!link) return;
  const details = link.closest("tbody").querySelector("details.run");
  if (details.open) event.preventDefault();
  show(details, !details.open);
}));
function address() {
  const text = location.hash.slice(1);
  try {
    return decodeURIComponent(text);
  } catch { // a % that begins no character
    return text;
  }
}
function follow() {
  const target = document.getElementById(address());
  if (!target?.matches("details.run")) return;
  if (target.closest("tbody").hidden) form.reset();
  filter();
  show(target, true);
  target.closest("tbody").scrollIntoView();
}
addEventListener("hashchange", follow);
follow();

// Copying, or where the browser does not allow it, selecting.
document.addEventListener("click", async (event) => {
  const button = event.target.closest("button.copy");
  if (!button) return;
  const text = button.parentNode.querySelector("pre");
  try {
    await navigator.clipboard.writeText(text.textContent);
    button.textContent = "Copied";
  } catch {
    getSelection().selectAllChildren(text);
    button.textContent = "Selected";
  }
  setTimeout(() => { button.textContent = "Copy"; }, 2000);
});
