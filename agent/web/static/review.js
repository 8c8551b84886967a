// The review list: one cell large, one key or click for its name, the others in a strip.

import { $, coloursOf, command, make, percent, say, swatch } from "./common.js";

const KEYS = ["1", "2", "3", "4", "5", "6", "7", "8", "9", "0", "q", "w", "e", "r", "t", "z", "u", "i", "o", "p"];
const REASONS = { unidentified: "the model trusted no name", "low-margin": "its first two names are near each other", answered: "answered unasked", gallery: "kept for the gallery" };

const NO_PICTURE = "No picture of this cell is kept here.";

let cells = [];
let names = [];
let current = null; // cell_id
const underway = new Set();

const isShown = () => !$("review").hidden;
const find = (cellId) => cells.find((cell) => cell.cell_id === cellId);
const listed = () => cells.filter((cell) => cell.is_open || $("show-answered").checked);
const cropOf = (cell) => `/api/crop/${cell.sample}/${cell.cell_id}`;

export function showReview(list, state) {
  // An answer that is under way is shown as given: the list may have been read before it.
  const given = list.cells.filter((cell) => cell.is_open && underway.has(cell.cell_id));
  cells = list.cells.map((cell) => (given.includes(cell) ? { ...cell, is_open: false } : cell));
  $("open-count").hidden = list.open === 0;
  $("open-count").textContent = list.open;
  $("review-title").textContent = `${list.open - given.length} waiting, ${list.answered} answered`;
  if (names.join() !== state.answers.join()) {
    names = state.answers;
    makeAnswers(state);
  }
  if (!find(current)) current = listed()[0]?.cell_id ?? null;
  showStrip();
  showCell();
}

function makeAnswers(state) {
  const colours = coloursOf(state);
  $("answers").replaceChildren(
    ...names.map((name, number) => {
      const button = make("button");
      button.type = "button";
      button.dataset.name = name;
      button.append(make("kbd", KEYS[number] ?? ""), swatch(colours, name), name);
      button.addEventListener("click", () => answer(name));
      return button;
    }),
  );
}

function showStrip() {
  const shown = listed();
  const old = new Map([...$("strip").children].map((button) => [button.dataset.cell, button]));
  const buttons = shown.map((cell) => {
    const button = old.get(cell.cell_id) ?? makeThumb(cell);
    button.setAttribute("aria-selected", String(cell.cell_id === current));
    button.classList.toggle("done", !cell.is_open);
    const said = cell.answers.at(-1)?.person;
    button.lastChild.textContent = said ?? cell.class;
    if (cell.has_picture && !button.firstChild.src) button.firstChild.src = cropOf(cell); // it comes after its cell
    return button;
  });
  const strip = $("strip");
  if (buttons.length !== strip.children.length || buttons.some((button, n) => strip.children[n] !== button)) {
    strip.replaceChildren(...buttons);
  }
}

function makeThumb(cell) {
  const button = make("button");
  button.type = "button";
  button.dataset.cell = cell.cell_id;
  button.setAttribute("role", "option");
  const picture = make("img");
  picture.loading = "lazy";
  picture.alt = cell.cell_id;
  button.append(picture, make("span"));
  button.addEventListener("click", () => select(cell.cell_id));
  return button;
}

function showCell() {
  const cell = find(current);
  $("answers").hidden = !cell;
  for (const id of ["cell-id", "model-says", "cell-why"]) $(id).textContent = "";
  $("persons-said").replaceChildren();
  if (!cell) {
    showNoCrop("No cell waits for a person.");
    return;
  }
  if (!cell.has_picture) showNoCrop(NO_PICTURE);
  else if ($("crop").getAttribute("src") !== cropOf(cell)) {
    showNoCrop("…"); // a browser would show the picture of the cell before until this one has come
    $("crop").src = cropOf(cell);
    $("crop").alt = `Cell ${cell.cell_id}`;
  }
  $("cell-id").textContent = cell.cell_id;
  const trusted = cell.class === cell.guess;
  const sure = cell.probability ? `, ${percent(cell.probability)} sure` : "";
  $("model-says").textContent = trusted ? `The model says ${cell.class}${sure}.` : `The model trusts no name; its best guess is ${cell.guess}${sure}.`;
  const margin = cell.margin === null ? "" : `; the second name is ${percent(cell.margin)} points behind`;
  $("cell-why").textContent = `In the list because ${REASONS[cell.reason] ?? cell.reason}${margin}.`;
  $("persons-said").replaceChildren(
    ...cell.answers.map((one) => make("li", `${one.person}, said ${one.by ?? "somebody"}${one.at ? `, ${new Date(one.at).toLocaleString()}` : ""}`)),
  );
  for (const button of $("answers").children) {
    button.classList.toggle("models", button.dataset.name === cell.guess);
    button.disabled = underway.has(cell.cell_id);
  }
}

function showNoCrop(words) {
  $("crop").removeAttribute("src"); // so that the picture is asked for again should it come, or its cell come back
  $("crop").hidden = true;
  $("no-crop").hidden = false;
  $("no-crop").textContent = words;
}

/** Show this cell. The focus leaves the button that was pressed: Enter would press it again, for another cell. */
function select(cellId) {
  current = cellId;
  showStrip();
  showCell();
  $("cell-id").focus({ preventScroll: true });
  $("strip").querySelector('[aria-selected="true"]')?.scrollIntoView({ block: "nearest" });
}

function step(by) {
  const shown = listed();
  const at = shown.findIndex((cell) => cell.cell_id === current);
  const next = shown[Math.min(shown.length - 1, Math.max(0, at + by))];
  if (next) select(next.cell_id);
}

/** Give an answer and go on to the next cell; one that was refused comes back, with the reason. */
async function answer(name) {
  const cell = find(current);
  if (!cell || underway.has(cell.cell_id)) return;
  if (!$("person").reportValidity() || !$("person").value.trim()) {
    say($("review-said"), "First give your token, at the top: an answer says who gives it.", "bad");
    $("person").focus();
    return;
  }
  const next = listed().filter((one) => one.cell_id !== cell.cell_id && one.is_open);
  const after = next.find((one) => cells.indexOf(one) > cells.indexOf(cell)) ?? next[0];
  underway.add(cell.cell_id);
  cell.is_open = false;
  select(after?.cell_id ?? ($("show-answered").checked ? cell.cell_id : null));
  say($("review-said"), `${cell.cell_id}: ${name} …`);
  try {
    const reply = await command("amend", { sample: cell.sample, cell_id: cell.cell_id, class: name });
    if (reply.status !== "ok") throw new Error(reply.message);
    say($("review-said"), reply.message, "good");
  } catch (error) {
    say($("review-said"), `${cell.cell_id} has no answer: ${error.message}`, "bad");
  } finally {
    underway.delete(cell.cell_id);
    onAnswered();
  }
}

let onAnswered = () => {};

export function prepareReview(onChange) {
  onAnswered = onChange;
  $("crop").addEventListener("load", () => {
    $("crop").hidden = false;
    $("no-crop").hidden = true;
  });
  $("crop").addEventListener("error", () => showNoCrop(NO_PICTURE));
  $("show-answered").addEventListener("change", () => {
    if (!listed().includes(find(current))) current = listed()[0]?.cell_id ?? null;
    showStrip();
    showCell();
  });
  document.addEventListener("keydown", (event) => {
    const isTyping = ["INPUT", "SELECT", "TEXTAREA"].includes(event.target.tagName) && event.target.type !== "checkbox";
    if (!isShown() || isTyping || event.ctrlKey || event.metaKey || event.altKey || event.repeat || $("ask").open) return;
    const onButton = event.target.tagName === "BUTTON";
    const number = KEYS.indexOf(event.key.toLowerCase());
    if (event.key === "ArrowRight" && event.target.role !== "tab") step(1);
    else if (event.key === "ArrowLeft" && event.target.role !== "tab") step(-1);
    else if (event.key === "Enter" && !onButton && find(current)) answer(find(current).guess);
    else if (number >= 0 && number < names.length) answer(names[number]);
    else return;
    event.preventDefault();
  });
}
