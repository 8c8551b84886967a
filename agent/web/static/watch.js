// What is seen: the field, the decision about it, the differential, health. Everything comes from one state.

import { $, ageWords, coloursOf, drawBoxes, drawing, fillFacts, make, request, swatch } from "./common.js";

let shownFrame = null;

export function showState(state) {
  $("device").textContent = `${state.site} / ${state.device}`;
  $("notice").textContent = state.notice;
  document.title = `${state.sample ? `${state.sample.sample} ${state.sample.phase}` : "no sample"} - HematoVision`;
  showAlerts(state);
  showFrame(state);
  showDifferential(state);
  showHealth(state);
}

function showAlerts(state) {
  $("alerts").replaceChildren(
    ...state.alerts.map((alert) => {
      const kind = { error: "bad", warning: "warn" }[alert.severity] ?? "info";
      return make("li", `${alert.severity}: ${alert.message}`, kind);
    }),
  );
  const still = $("still");
  still.hidden = state.still_s < 15;
  still.textContent = `The counting has not moved for ${Math.round(state.still_s)} s.`;
}

function showFrame(state) {
  const frame = state.frame;
  const decision = $("decision");
  if (frame === null) {
    decision.textContent = "";
    return;
  }
  if (frame.is_counted) {
    decision.className = "decision good";
    decision.textContent = `Counted: ${nucleatedWords(frame.cells)}`;
  } else {
    const isQuiet = ["unchanged", "frozen", "no-sample"].includes(frame.reason);
    decision.className = `decision ${isQuiet ? "info" : "warn"}`;
    decision.textContent = `${isQuiet ? "Not counted" : "Refused"} (${frame.reason}): ${frame.words}`;
  }
  const facts = [`last frame ${ageWords(frame.age_s)}`];
  if (frame.took_ms !== null) facts.push(`${frame.took_ms} ms from picture to result`);
  if (frame.focus !== null) facts.push(`focus ${frame.focus}`);
  if (frame.place !== null) facts.push(frame.place === "unknown" ? "place on the slide unknown" : "place on the slide known");
  $("frame-facts").textContent = facts.join(" · ");
  showLegend(state, frame.cells);
  if (frame.number === shownFrame) return;
  // Picture and boxes change together, when the picture is there.
  const picture = new Image();
  picture.addEventListener("load", () => {
    $("frame").src = picture.src;
    $("frame").alt = `The latest field: ${frame.is_counted ? nucleatedWords(frame.cells) : frame.words}`;
    $("frame").hidden = false;
    $("no-frame").hidden = true;
    drawBoxes($("boxes"), frame.cells, frame.size_px, coloursOf(state));
    shownFrame = frame.number;
  });
  picture.src = `/api/frame/${frame.number}.jpg`;
}

/** The page was away, perhaps the agent too, whose numbers then begin anew. */
export function forgetFrame() {
  shownFrame = null;
}

function nucleatedWords(cells) {
  const named = cells.filter((cell) => !cell.is_small);
  const small = cells.length - named.length;
  const words = `${named.length} ${named.length === 1 ? "cell" : "cells"} looked at`;
  return small ? `${words}, ${small} red cells` : words;
}

function showLegend(state, cells) {
  const counts = new Map();
  for (const cell of cells) {
    const name = cell.status === "unidentified" ? "unidentified" : cell.class;
    counts.set(name, (counts.get(name) ?? 0) + 1);
  }
  const colours = coloursOf(state);
  $("legend").replaceChildren(
    ...[...counts].map(([name, count]) => {
      const entry = make("span");
      entry.append(swatch(colours, name), `${name} ${count}`);
      return entry;
    }),
  );
}

const STATUS = { preliminary: ["running, not final", ""], final: ["final", "good"], amended: ["final, amended by a person", "good"] };

function showDifferential(state) {
  const made = state.differential;
  $("shares").hidden = !made?.shares.length;
  const status = $("differential-status");
  status.hidden = !made;
  if (!made) {
    $("differential-n").textContent = state.sample ? "None: the sample was thrown over." : "No sample yet.";
    $("chart").replaceChildren();
    $("beside").replaceChildren();
    return;
  }
  const [words, kind] = STATUS[made.status];
  status.textContent = words;
  status.className = `pill ${kind}`;
  const basis = made.basis === "unique" ? "each cell once" : "cells of fields at unknown places may be counted twice";
  $("differential-n").textContent = `n = ${made.leukocytes} classified leukocytes, ${made.fields} ${made.fields === 1 ? "field" : "fields"}; ${basis}.`;
  showChart(state.chart);
  const colours = coloursOf(state);
  $("shares").tBodies[0].replaceChildren(
    ...made.shares.map((share) => {
      const row = make("tr");
      const name = make("td");
      name.append(swatch(colours, share.class), share.class);
      const usual = share.reference ? `${share.reference.low_pct} to ${share.reference.high_pct}: ${state.flag_words[share.flag]}` : "–";
      const interval = `${share.low_pct.toFixed(1)} to ${share.high_pct.toFixed(1)}`;
      row.append(name, make("td", share.count), make("td", share.pct.toFixed(1)), make("td", interval), make("td", usual));
      return row;
    }),
  );
  const ratio = (one) => `${one.ratio.toFixed(2)} (${one.low.toFixed(2)} to ${one.high === null ? "?" : one.high.toFixed(2)}), ${one.count} cells`;
  fillFacts($("beside"), [
    ...made.per_100_leukocytes.map((one) => [`${one.name} per 100 leukocytes`, ratio(one)]),
    ...made.per_field.map((one) => [`${one.name} per field`, ratio(one)]),
    ...made.per_ul.map((one) => [`${one.name} per µl`, `${one.per_ul} (${one.low_per_ul} to ${one.high_per_ul})`]),
    ["unidentified", String(made.unidentified)],
    ["not classed", String(made.not_classed)],
  ]);
}

let shownChart = "";

function showChart(svg) {
  if (svg === shownChart) return;
  shownChart = svg;
  $("chart").replaceChildren(...(svg ? [drawing(svg)] : []));
}

const MAP_EVERY_MS = 3000;
let mapTimer = 0;

/** The map is asked for while it is open, and only then. */
async function mapTurn() {
  clearTimeout(mapTimer);
  if ($("map").open && !document.hidden && !$("watch").hidden) {
    try {
      showMap(await request("/api/map"));
    } catch (error) {
      $("map-words").textContent = error.message;
    }
  }
  mapTimer = setTimeout(mapTurn, MAP_EVERY_MS);
}

function showMap(map) {
  const words = [`${map.fields} fields`];
  if (map.is_full) words.push("later ones are not taken in");
  if (map.parts_left_out) words.push(`${map.parts_left_out} smaller parts are not drawn`);
  if (map.unknown_places) words.push(`${map.unknown_places} at an unknown place`);
  if (map.cells_left_out) words.push(`${map.cells_left_out} more cells are not drawn`);
  $("map-words").textContent = map.fields ? words.join(", ") : "No field of this sample is kept here yet.";
  $("map-parts").replaceChildren(...map.parts.map((part) => drawing(part.svg)));
}

const KINDS = {
  ready: "good", degraded: "bad", sleeping: "warn",
  open: "good", idle: "warn", frozen: "bad", lost: "bad", ended: "warn",
  connected: "good", refused: "bad", ok: "good", stopped: "bad",
};

function stateWords(part, more = "", kind = KINDS[part.state] ?? "") {
  const line = make("span");
  line.append(make("span", part.state, `pill ${kind}`), ` ${more || part.detail}`);
  return line;
}

function showHealth(state) {
  const health = state.health;
  const agent = $("agent-state");
  agent.textContent = health.state;
  agent.className = `pill ${KINDS[health.state] ?? ""}`;
  const outbox = health.outbox;
  const oldest = outbox.oldest_age_s === null ? "" : `, the oldest ${Math.round(outbox.oldest_age_s)} s`;
  const facts = [
    ["camera", stateWords(health.camera)],
    // A broker that is merely away is no fault: results wait on disk.
    ["broker", health.broker.state === "lost" ? stateWords(health.broker, "", "warn") : stateWords(health.broker)],
    ["outbox", stateWords(outbox, outbox.detail || `${outbox.depth} messages wait${oldest}`)],
    ["speed", `${health.fields_per_min.toFixed(1)} fields/min, ${health.fields} since the start`],
    ["disk free", health.disk_free_bytes === null ? "not known" : `${(health.disk_free_bytes / 1e9).toFixed(1)} GB`],
  ];
  if (health.temperature_c !== null) facts.push(["temperature", `${health.temperature_c} °C`]);
  if (health.throttling?.under_voltage) facts.push(["power", make("span", "under-voltage now", "pill bad")]);
  facts.push(["clock", health.clock.synchronised ? "synchronised" : "follows no reference"]);
  const test = health.last_self_test;
  if (test !== null) facts.push(["self-test", stateWords({ state: test.passed ? "ok" : "stopped", detail: test.detail })]);
  facts.push(["agent", state.agent]);
  fillFacts($("health"), facts);
}

export function prepareWatch() {
  $("map").addEventListener("toggle", mapTurn);
  mapTurn();
  $("show-names").addEventListener("change", (event) => $("boxes").classList.toggle("no-names", !event.target.checked));
  $("show-small").addEventListener("change", (event) => $("boxes").classList.toggle("no-small", !event.target.checked));
}
