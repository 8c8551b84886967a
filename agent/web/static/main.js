// The page as a whole: tabs, who sits there, and the state that is asked for again and again.

import { $, request } from "./common.js";
import { preparePicture, showPicture } from "./picture.js";
import { prepareReview, showReview } from "./review.js";
import { prepareSample, setOld, showSample } from "./sample.js";
import { forgetFrame, prepareWatch, showState } from "./watch.js";

const EVERY_MS = 1000;
const HIDDEN_EVERY_MS = 5000;
const REVIEW_EVERY_MS = 5000;
const OLD_AFTER_MS = 4000;

let state = null;
let answeredAt = null; // performance.now() of the last answer
let answeredClock = null;
let reviewedAt = -Infinity;
let timer = 0;
let isAsking = false;

/** Ask for the state; one request at a time, the next one when this has been answered or has failed. */
async function turn() {
  clearTimeout(timer);
  if (isAsking) return;
  isAsking = true;
  try {
    const fresh = await request("/api/state");
    if (isOldNow()) forgetFrame();
    answeredAt = performance.now();
    answeredClock = new Date();
    state = fresh;
    markAge();
    showState(state);
    showSample(state);
    showPicture(state);
    $("logout").hidden = !state.page.needs_password;
    if (performance.now() - reviewedAt > REVIEW_EVERY_MS) await reviewTurn();
  } catch (error) {
    if (!("status" in error)) throw error;
    markAge();
  } finally {
    isAsking = false;
    timer = setTimeout(turn, document.hidden ? HIDDEN_EVERY_MS : EVERY_MS);
  }
}

async function reviewTurn() {
  reviewedAt = performance.now();
  showReview(await request("/api/review"), state);
}

/** After a command: everything anew, now. */
function refresh() {
  reviewedAt = -Infinity;
  turn();
}

const isOldNow = () => answeredAt === null || performance.now() - answeredAt > OLD_AFTER_MS;

/** Say so when what is shown is old; on a timer of its own, which no broken connection holds up. */
function markAge() {
  const old = isOldNow();
  document.body.classList.toggle("is-old", old);
  $("old").hidden = !old;
  $("old").textContent = answeredClock === null
    ? "The agent does not answer yet."
    : `No answer from the agent since ${answeredClock.toLocaleTimeString()}: what you see is old. Trying again …`;
  setOld(old);
}

const TABS = ["watch", "review", "picture"];

function openTab(name) {
  for (const one of TABS) {
    const isIt = one === name;
    $(one).hidden = !isIt;
    $(`tab-${one}`).setAttribute("aria-selected", String(isIt));
    $(`tab-${one}`).tabIndex = isIt ? 0 : -1;
  }
  history.replaceState(null, "", `#${name}`);
  if (name === "review" && state) refresh();
}

function prepareTabs() {
  for (const [number, name] of TABS.entries()) {
    $(`tab-${name}`).addEventListener("click", () => openTab(name));
    $(`tab-${name}`).addEventListener("keydown", (event) => {
      const by = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
      if (!by) return;
      const next = TABS[(number + by + TABS.length) % TABS.length];
      openTab(next);
      $(`tab-${next}`).focus();
    });
  }
  const asked = location.hash.slice(1);
  if (TABS.includes(asked)) openTab(asked);
}

function preparePerson() {
  const person = $("person");
  person.value = localStorage.getItem("person") ?? "";
  const check = () => {
    const isToken = /^([A-Za-z0-9][A-Za-z0-9._-]{0,63})?$/.test(person.value.trim());
    person.setCustomValidity(isToken ? "" : "Letters, digits, . _ and - only, beginning with a letter or digit");
  };
  person.addEventListener("input", check);
  person.addEventListener("change", () => {
    if (person.validity.valid) localStorage.setItem("person", person.value.trim());
  });
  // Typed to its end: the next key is no part of it, but on the review list an answer.
  person.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && person.reportValidity()) person.blur();
  });
  check();
  $("logout").addEventListener("click", async () => {
    await request("/logout", { method: "POST" }).catch(() => {});
    location.reload();
  });
}

prepareTabs();
preparePerson();
prepareWatch();
prepareSample(refresh);
prepareReview(refresh);
preparePicture();
setInterval(markAge, 1000);
document.addEventListener("visibilitychange", () => !document.hidden && turn());
turn();
