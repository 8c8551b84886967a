"""The workshop: makes benches, and changes what they are made of while the agent runs: models and configuration.

Used on the pipeline's thread (it owns the models), through the desk; `describe` may be called from any.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import agent
from agent.bench import Bench, make_bench
from agent.config import Config, SampleSection, config_sha256
from agent.delivery.messages import model_words
from agent.desk import Done, Refused
from agent.errors import ClassifierUnknown, ModelError
from agent.health import Health, SelfTest
from agent.inference.models import Models, open_models
from agent.inference.selftest import GoldenTest
from agent.inference.slots import ModelSlots, NothingToSwitchTo

logger = logging.getLogger(__name__)

SELF_TEST_EVERY_S = 24 * 3600.0
"""s; the models are tried at the start, after each change of models, at cmd/selftest, and so long after the last
time."""

SELF_TEST_AGAIN_S = 600.0
"""s; a failed test holds the counting up, so it is soon tried again: the cause may have been a passing one."""

LIVE_KEYS = frozenset(
    {"quality", "drift", "sample", "differential", "publish.cells", "publish.images", "models.min_score"}
    | {"models.min_probability", "log"}
)
"""What `reload` can change while the agent runs; anything else is held by a part that was built from it."""


@dataclass(frozen=True, slots=True, eq=False)
class Work:
    """What the agent works with at one moment."""

    config: Config
    models: Models
    bench: Bench
    golden: GoldenTest


class Workshop:
    """Holds what is in use. reread: the configuration as it stands in its file now, raises ConfigError.

    on_change: told of each change, after it; the pipeline takes the bench, the publisher tells who counts.
    fell_back: why other models are in use than were activated, until the next switch; may be read on any thread.
    went_back: the same where this start went back to them.
    """

    def __init__(
        self,
        config: Config,
        slots: ModelSlots,
        health: Health,
        reread: Callable[[], Config],
        on_change: Callable[[Work], None] = lambda _work: None,
        monotonic_s: Callable[[], float] = time.monotonic,
    ) -> None:
        self.on_change = on_change
        self.fell_back: str | None = None
        self.went_back: str | None = None
        self._slots = slots
        self._health = health
        self._reread = reread
        self._monotonic_s = monotonic_s
        self._next_test_s = 0.0
        models, golden = self._open_first(config)
        self._is_on_trial = slots.active.trial_starts is not None
        self.work = Work(config, models, make_bench(config, models), golden)

    @property
    def sample_section(self) -> SampleSection:
        """What a new sample takes from the configuration."""
        return self.work.config.sample

    # ---- what commands do

    def self_test(self) -> SelfTest:
        """Try the models now; tells health either way. Raises ModelError where they fail."""
        test = self._test(self.work.models, self.work.golden)
        _require(test)
        return test

    def due_self_test(self) -> SelfTest | None:
        """The outcome of the test that was due; None where none is. Tells health."""
        if self._monotonic_s() < self._next_test_s:
            return None
        return self._test(self.work.models, self.work.golden)

    def reload(self) -> Done:
        """Read the configuration again and work by it; where it has faults, the last good one stays.

        Raises ConfigError, and Refused where a changed key needs a restart.
        """
        fresh, old = self._reread(), self.work.config
        changed = sorted(_changes(old.model_dump(mode="json"), fresh.model_dump(mode="json")))
        if not changed:
            return Done("the configuration has not changed", {"changed": [], "config_sha256": config_sha256(old)})
        held = [key for key in changed if not any(key == live or key.startswith(f"{live}.") for live in LIVE_KEYS)]
        if held:
            raise Refused("needs-restart", f"{', '.join(held)}: restart the agent for these; nothing was changed")
        self._use(replace(self.work, config=fresh, bench=make_bench(fresh, self.work.models)))
        logging.getLogger().setLevel(fresh.log.level.upper())
        return Done(f"changed: {', '.join(changed)}", {"changed": changed, "config_sha256": config_sha256(fresh)})

    def relearn(self) -> Done:
        """From what it is learnt anew what is usual here. Raises Refused where that is not watched."""
        if self.work.bench.drift is None:
            why = "drift.enabled is false" if self.work.config.camera.is_one_device else "a folder is read once"
            raise Refused("not-watched", f"nothing is learnt here: {why}")
        slides = self.work.config.drift.slides
        return Done(f"what is usual is learnt anew, from the next {slides} slides", {"slides": slides})

    def stage(self, name: str) -> Done:
        """Check models and copy them into the free slot. Raises ModelError; also where the configured classifier is not
        among them.
        """
        manifest = self._slots.stage(name, self.work.config.models.classifier)
        facts: dict[str, Any] = {
            entry.role: model_words(entry.identity) for entry in (manifest.detector, manifest.classifier)
        }
        return Done(f"the models in {name} are what their manifest says, and may be activated", facts)

    def activate(self) -> Done:
        """Try the staged models and work with them. Raises ModelError; then the ones in use stay."""
        return self._switch(is_rollback=False)

    def roll_back(self) -> Done:
        """Work with the models before. Raises ModelError; then the ones in use stay."""
        return self._switch(is_rollback=True)

    def describe(self) -> Mapping[str, Any]:
        """Who counts here, for `ping`."""
        work = self.work
        identities = (work.models.detector.identity, work.models.classifier.identity)
        return {
            "agent": agent.__version__,
            "config_sha256": config_sha256(work.config),
            "models": [model_words(identity) for identity in identities],
        }

    def mark_proven(self) -> None:
        """The models in use have counted a field. Where that cannot be noted it is tried again at the next one."""
        if not self._is_on_trial:
            return
        try:
            self._slots.mark_proven()
        except ModelError as error:
            logger.error("%s", error)  # noqa: TRY400 - its words say all
        else:
            self._is_on_trial = False

    # ---- inside

    def _switch(self, *, is_rollback: bool) -> Done:
        opened: list[tuple[Models, GoldenTest, SelfTest]] = []

        def try_them(path: Path) -> None:
            models, golden = self._open(self.work.config, path)
            test = _run(models, golden)
            _require(test)
            opened.append((models, golden, test))

        try:
            active = self._slots.switch(try_them, is_rollback=is_rollback)
        except NothingToSwitchTo as error:
            raise Refused("no-models", str(error)) from error
        models, golden, test = opened[-1]
        self._use(Work(self.work.config, models, make_bench(self.work.config, models), golden))
        self._is_on_trial = not is_rollback
        self.fell_back = None
        self._note(test)
        words = f"slot {active.slot} is in use, {active.before} was before; {test.detail}"
        return Done(words, {"slot": active.slot, **self.describe()})

    def _test(self, models: Models, golden: GoldenTest) -> SelfTest:
        test = _run(models, golden)
        self._note(test)
        return test

    def _note(self, test: SelfTest) -> None:
        self._next_test_s = self._monotonic_s() + (SELF_TEST_EVERY_S if test.is_passed else SELF_TEST_AGAIN_S)
        self._health.self_test(test)

    def _use(self, work: Work) -> None:
        self.work = work
        self.on_change(work)

    def _open_first(self, config: Config) -> tuple[Models, GoldenTest]:
        """The models in use; those before where they cannot be used any more or fail the self-test.

        Raises ModelError where the base ones cannot be used. Where they fail the self-test they are opened all the
        same: health says so, nothing is counted, and an operator can change them.
        """
        active, self.went_back = self._slots.begin()
        while True:
            try:
                models, golden = self._open(config, self._slots.path(active.slot))
                test = self._test(models, golden)
                if active.slot != "base":
                    _require(test)
            except ClassifierUnknown:  # it is the configuration that must be mended: the models stay active
                raise
            except ModelError as error:
                if active.slot == "base":
                    raise
                active = self._slots.go_back(f"the models in slot {active.slot} cannot be used: {error}")
                self.went_back = active.fell_back
            else:
                self.fell_back = self.went_back or active.fell_back
                if self.fell_back is not None:
                    logger.error("%s", self.fell_back)
                (logger.info if test.is_passed else logger.error)("%s", test.detail)
                return models, golden

    @staticmethod
    def _open(config: Config, path: Path) -> tuple[Models, GoldenTest]:
        return open_models(config.models.model_copy(update={"folder": path})), GoldenTest(path)


def _run(models: Models, golden: GoldenTest) -> SelfTest:
    begun_s = time.monotonic()
    verdict = golden.run(models)
    took = f", {(time.monotonic() - begun_s) * 1000:.0f} ms" if verdict.is_passed else ""
    return SelfTest(datetime.now(timezone.utc), is_passed=verdict.is_passed, detail=f"{verdict.detail}{took}")


def _require(test: SelfTest) -> None:
    if not test.is_passed:
        raise ModelError(test.detail)


def _changes(old: Mapping[str, Any], new: Mapping[str, Any], above: str = "") -> Iterator[str]:
    for key in old:
        if isinstance(old[key], dict) and isinstance(new[key], dict):
            yield from _changes(old[key], new[key], f"{above}{key}.")
        elif old[key] != new[key]:
            yield f"{above}{key}"
