// What all parts of the page use: elements, requests, commands, drawing boxes.

export const $ = (id) => document.getElementById(id);

/** A new element with its text and classes; nothing from outside ever becomes markup. */
export function make(name, text = "", classes = "") {
  const element = document.createElement(name);
  element.textContent = text;
  if (classes) element.className = classes;
  return element;
}

/** Fill a list of facts: pairs of a name and a text or an element. */
export function fillFacts(list, facts) {
  const children = [];
  for (const [name, fact] of facts) {
    const value = make("dd");
    value.append(fact);
    children.push(make("dt", name), value);
  }
  list.replaceChildren(...children);
}

export function say(element, text, kind = "") {
  element.textContent = text;
  element.className = `said ${kind}`;
}

export const percent = (share, digits = 0) => `${(100 * share).toFixed(digits)}\u00a0%`;

export function ageWords(seconds) {
  if (seconds < 2) return "now";
  if (seconds < 90) return `${Math.round(seconds)} s ago`;
  return seconds < 5400 ? `${Math.round(seconds / 60)} min ago` : `${Math.round(seconds / 3600)} h ago`;
}

/** JSON of a request; throws an Error whose `status` is that of the answer, 0 where there was none. */
export async function request(path, options = {}, withinMs = 5000) {
  let answer;
  try {
    answer = await fetch(path, { ...options, signal: AbortSignal.timeout(withinMs) });
  } catch {
    throw Object.assign(new Error("the agent does not answer"), { status: 0 });
  }
  if (answer.status === 401) location.reload(); // the question for the password
  const body = await answer.json().catch(() => ({ message: `answer ${answer.status}` }));
  if (!answer.ok) throw Object.assign(new Error(body.message), { status: answer.status });
  return body;
}

const COMMAND_WITHIN_MS = 35000;
const MOST_TRIES = 3;

/**
 * Send a command and give its reply. The same transaction is sent again when no answer came: the agent does it once.
 */
export async function command(name, words) {
  const random = crypto.getRandomValues(new Uint8Array(8));
  const transaction = "page-" + Array.from(random, (byte) => byte.toString(16).padStart(2, "0")).join("");
  const by = $("person").value.trim();
  const body = JSON.stringify({ transaction, ...(by ? { by } : {}), ...words });
  for (let tries = 1; ; tries += 1) {
    try {
      return await request(`/api/command/${name}`, { method: "POST", body }, COMMAND_WITHIN_MS);
    } catch (error) {
      if (tries === MOST_TRIES || ![0, 429, 503, 504].includes(error.status)) throw error;
      await new Promise((resolve) => setTimeout(resolve, 1000 * tries));
    }
  }
}

/** Ask in a dialog; true for yes. */
export function ask(words, yes) {
  $("ask-words").textContent = words;
  $("ask-yes").textContent = yes;
  const dialog = $("ask");
  dialog.returnValue = "no";
  dialog.showModal();
  return new Promise((resolve) => {
    dialog.addEventListener("close", () => resolve(dialog.returnValue === "yes"), { once: true });
  });
}

/** A drawing of the report's: the agent made it, with every text escaped. Its width is the page's matter. */
export function drawing(svg) {
  const text = svg.replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ').replace(/ style="[^"]*"/, "");
  return document.importNode(new DOMParser().parseFromString(text, "image/svg+xml").documentElement, true);
}

export const coloursOf = (state) => new Map(state.classes.map((one) => [one.class, one.colour]));

const NO_COLOUR = "#444"; // of what is no class, as `unidentified`

/** A mark in the colour of a class. */
export function swatch(colours, name) {
  const mark = make("i");
  mark.style.background = colours.get(name) ?? NO_COLOUR;
  return mark;
}

/** Boxes with names over a picture of `sizePx`; colours by class. */
export function drawBoxes(layer, cells, sizePx, colours) {
  const [width, height] = sizePx;
  layer.replaceChildren(
    ...cells.map((cell) => {
      const [left, top, right, bottom] = cell.box;
      const box = make("span", "", `${cell.status}${cell.is_small ? " small" : ""}`);
      box.style.left = `${(100 * left) / width}%`;
      box.style.top = `${(100 * top) / height}%`;
      box.style.width = `${(100 * (right - left)) / width}%`;
      box.style.height = `${(100 * (bottom - top)) / height}%`;
      box.style.borderColor = colours.get(cell.status === "unidentified" ? "" : cell.class) ?? NO_COLOUR;
      if (top < 0.06 * height) box.classList.add("at-top");
      if (left > 0.6 * width) box.classList.add("at-right");
      if (!cell.is_small) box.append(make("b", cellWords(cell)));
      return box;
    }),
  );
}

const STATUS_WORDS = { edge: " (edge)", duplicate: " (seen before)", artefact: " (no cell)" };

export function cellWords(cell) {
  const mark = cell.status === "unidentified" ? "?" : "";
  return `${cell.class}${mark} ${percent(cell.probability)}${STATUS_WORDS[cell.status] ?? ""}`;
}
