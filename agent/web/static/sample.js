// Driving a sample: what it is, and the commands that its state allows.

import { $, ask, command, fillFacts, say } from "./common.js";

let may = [];
let sid = null;
let isOld = true;
let isSending = false;

const PHASES = { running: "good", paused: "warn", finishing: "warn", finished: "good", aborted: "bad" };

export function showSample(state) {
  const sample = state.sample;
  may = state.may;
  sid = sample?.sample ?? null;
  $("sample-id").textContent = sid ?? "";
  $("phase").textContent = sample?.phase ?? "none yet";
  $("phase").className = `pill ${PHASES[sample?.phase] ?? ""}`;
  const facts = [];
  if (sample) {
    facts.push(["fields", `${sample.fields} counted${refusedWords(sample.refused)}`]);
    facts.push(["cells", countWords(sample)]);
    if (sample.accession) facts.push(["accession", sample.accession]);
    if (sample.age_band) facts.push(["age band", sample.age_band]);
    if (sample.amendments) facts.push(["amended", `${sample.amendments} × the name of a cell, by a person`]);
    if (sample.end_reason) facts.push(["ended by", sample.end_reason]);
  }
  fillFacts($("sample-facts"), facts);
  showTarget(state);
  $("start-form").hidden = !may.includes("start");
  fillAgeBands(state.age_bands);
  setButtons();
}

function refusedWords(refused) {
  const parts = Object.entries(refused).map(([reason, count]) => `${reason} ${count}`);
  return parts.length ? `; not counted: ${parts.join(", ")}` : "";
}

function countWords(sample) {
  const counts = Object.entries(sample.counts).map(([name, count]) => `${name} ${count}`);
  const duplicates = sample.duplicates ? `; ${sample.duplicates} views of cells that were counted before` : "";
  return `${counts.join(", ") || "none yet"}${duplicates}`;
}

function showTarget(state) {
  const sample = state.sample;
  const cells = sample?.stop_at.cells ?? null;
  const width = sample?.stop_at.half_width_pct ?? null;
  const words = [];
  if (cells !== null) {
    const left = Math.max(0, cells - sample.nucleated);
    words.push(`${sample.nucleated} of ${cells} nucleated cells; ${left} still needed`);
    $("progress").max = cells;
    $("progress").value = Math.min(cells, sample.nucleated);
  }
  if (width !== null) {
    const needed = state.differential?.still_needed ?? null;
    words.push(needed === null ? `intervals of ± ${width} % points are out of reach` : `${needed} leukocytes more until every interval is ± ${width} % points`);
  }
  $("target").hidden = words.length === 0;
  $("progress").hidden = cells === null;
  $("progress-words").textContent = words.join(" · ");
}

function fillAgeBands(bands) {
  const select = $("start-form").elements.age_band;
  if (select.options.length > 1) return;
  for (const band of bands) select.add(new Option(band, band));
}

/** What cannot work now is disabled: not allowed by the state, a command under way, or what is shown is old. */
function setButtons() {
  for (const button of $("sample-buttons").querySelectorAll("button")) {
    button.disabled = isOld || isSending || !may.includes(button.dataset.may);
  }
}

export function setOld(old) {
  isOld = old;
  setButtons();
}

async function send(name, words) {
  isSending = true;
  setButtons();
  say($("sample-said"), "…");
  try {
    const reply = await command(name, words);
    say($("sample-said"), reply.message, reply.status === "ok" ? "good" : "bad");
    return reply.status === "ok";
  } catch (error) {
    say($("sample-said"), error.message, "bad");
    return false;
  } finally {
    isSending = false;
    setButtons();
  }
}

const QUESTIONS = {
  stop: (sample) => `Finish sample ${sample}? It ends with its final differential and cannot be resumed.`,
  abort: (sample) => `Abort sample ${sample}? It gets no differential.`,
};

export function prepareSample(onChange) {
  $("start-form").addEventListener("submit", async (event) => {
    event.preventDefault();
    const form = event.target.elements;
    const words = {};
    for (const name of ["accession", "age_band"]) if (form[name].value.trim()) words[name] = form[name].value.trim();
    for (const name of ["stop_at_cells", "stop_at_half_width_pct"]) if (form[name].value) words[name] = Number(form[name].value);
    if (await send("start", words)) form.accession.value = "";
    onChange();
  });
  for (const button of $("sample-buttons").querySelectorAll("button[type=button]")) {
    button.addEventListener("click", async () => {
      const trigger = button.dataset.may;
      const sample = sid;
      if (QUESTIONS[trigger] && !(await ask(QUESTIONS[trigger](sample), button.textContent))) return;
      if (trigger === "abort") await send("stop", { sample, abort: true });
      else await send(trigger, { sample });
      onChange();
    });
  }
}
