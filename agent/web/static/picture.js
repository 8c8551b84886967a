// An uploaded picture: sent, examined apart from the counting, drawn with what was found.

import { $, coloursOf, drawBoxes, make, percent, request, say, swatch } from "./common.js";

const EXAMINED_WITHIN_MS = 150000;
const VERDICTS = { accepted: "named", unidentified: "not trusted: unidentified", edge: "named, at the edge", artefact: "no cell" };

let limits = { max_upload_mb: 20, max_upload_megapixels: 12 };
let colours = new Map();
let isBusy = false;

export function showPicture(state) {
  limits = state.page;
  colours = coloursOf(state);
  $("limits").textContent = `JPEG, PNG, BMP, TIFF or WebP, up to ${limits.max_upload_mb} MB and ${limits.max_upload_megapixels} megapixels. You can drop it here.`;
}

async function examine(file) {
  if (isBusy || !file) return;
  const said = $("picture-said");
  $("found").hidden = true;
  if (file.size > limits.max_upload_mb * 2 ** 20) {
    say(said, `${file.name} has ${(file.size / 2 ** 20).toFixed(1)} MB; the limit is ${limits.max_upload_mb} MB.`, "bad");
    return;
  }
  isBusy = true;
  say(said, `${file.name} is being examined; the first one takes some seconds longer …`);
  try {
    const options = { method: "POST", body: file, headers: { "Content-Type": "application/octet-stream" } };
    show(await request("/api/picture", options, EXAMINED_WITHIN_MS), file.name);
  } catch (error) {
    say(said, `${file.name}: ${error.message}`, "bad");
  } finally {
    isBusy = false;
  }
}

function show(found, name) {
  say($("picture-said"), `${name}: ${found.size_px.join(" × ")} pixels, ${found.took_ms} ms`, "good");
  $("found").hidden = false;
  showOneCell(found.one_cell);
  $("found-frame").src = `/api/picture/${found.picture}.jpg`;
  drawBoxes($("found-boxes"), found.cells, found.size_px, colours);
  const named = found.cells.filter((cell) => !cell.is_small);
  const small = found.cells.length - named.length;
  $("found-words").textContent = `${named.length} cells looked at, ${small} red cells`;
  $("found-refused").textContent = found.refused.length ? `The gate would refuse it as a field: ${found.refused.join(", ")}.` : "";
  $("found-cells").tBodies[0].replaceChildren(
    ...named.map((cell) => {
      const row = make("tr");
      const title = make("td");
      title.append(swatch(colours, cell.class), cell.class);
      row.append(title, make("td", percent(cell.probability)), make("td", VERDICTS[cell.status] ?? cell.status), make("td", cell.looks));
      return row;
    }),
  );
}

function showOneCell(one) {
  $("one-cell-answer").hidden = one === null;
  if (one === null) return;
  const doubt = one.is_trusted ? "" : " - not trusted: it would be unidentified";
  $("one-cell-class").textContent = `${one.class} ${percent(one.probability, 1)}${doubt}`;
  $("one-cell-looks").textContent = one.looks;
  const ordered = Object.entries(one.probabilities).sort((first, second) => second[1] - first[1]);
  $("one-cell-bars").replaceChildren(
    ...ordered.flatMap(([name, share]) => {
      const bar = make("progress");
      bar.max = 1;
      bar.value = share;
      bar.setAttribute("aria-label", name);
      return [make("span", name), bar, make("span", percent(share, 1))];
    }),
  );
}

export function preparePicture() {
  $("file").addEventListener("change", (event) => {
    examine(event.target.files[0]);
    event.target.value = ""; // the same file may be chosen again
  });
  const drop = $("drop");
  drop.addEventListener("dragover", (event) => {
    event.preventDefault();
    drop.classList.add("over");
  });
  drop.addEventListener("dragleave", () => drop.classList.remove("over"));
  drop.addEventListener("drop", (event) => {
    event.preventDefault();
    drop.classList.remove("over");
    examine(event.dataTransfer.files[0]);
  });
}
