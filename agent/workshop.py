"""The workshop: makes benches, and changes what they are made of while the agent runs: models and configuration.

Used on the pipeline's thread (it owns the models), through the desk; `describe` may be called from any.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np

import agent
from agent.config import Config, SampleSection, config_sha256
from agent.delivery.messages import model_words
from agent.desk import Done, Refused
from agent.errors import ModelError
from agent.health import Health, SelfTest
from agent.inference.models import Models, open_models
from agent.inference.slots import ModelSlots, NothingToSwitchTo
from agent.pipeline import Bench, make_bench

logger = logging.getLogger(__name__)

SELF_TEST_SIDE_PX = 256
"""px; side of the even grey frame on which both models must answer before the agent says that it is ready."""

LIVE_KEYS = frozenset(
    {"quality", "sample", "differential", "publish.cells", "publish.images", "models.min_score"}
    | {"models.min_probability", "log"}
)
"""What `reload` can change while the agent runs; anything else is held by a part that was built from it."""


def try_models(models: Models) -> SelfTest:
    """Both models must answer with numbers on an even grey frame. Raises ModelError where one does not."""
    grey = np.full((SELF_TEST_SIDE_PX, SELF_TEST_SIDE_PX, 3), 128, np.uint8)
    begun_s = time.monotonic()
    scores = [detection.score for detection in models.detector.detect(grey)]
    probabilities = models.classifier.classify(grey).probabilities
    took_ms = (time.monotonic() - begun_s) * 1000
    if not all(0 <= score <= 1 for score in scores) or not math.isclose(sum(probabilities.values()), 1, abs_tol=1e-3):
        raise ModelError(
            f"self-test: the models answer, but not with shares from 0 to 1 ({models.runtime}, {models.delegate}); "
            "install the package again, or choose another models.runtime"
        )
    return SelfTest(datetime.now(timezone.utc), is_passed=True, detail=f"both models answer, {took_ms:.0f} ms")


@dataclass(frozen=True, slots=True, eq=False)
class Work:
    """What the agent works with at one moment."""

    config: Config
    models: Models
    bench: Bench


class Workshop:
    """Holds what is in use. reread: the configuration as it stands in its file now, raises ConfigError.

    on_change: told of each change, after it; the pipeline takes the bench, the publisher tells who counts.
    """

    def __init__(
        self,
        config: Config,
        slots: ModelSlots,
        health: Health,
        reread: Callable[[], Config],
        on_change: Callable[[Work], None] = lambda _work: None,
    ) -> None:
        self.on_change = on_change
        self.went_back: str | None = None
        self._slots = slots
        self._health = health
        self._reread = reread
        models = self._open_first(config)
        self._is_on_trial = slots.active.trial_starts is not None
        self.work = Work(config, models, make_bench(config, models))

    @property
    def sample_section(self) -> SampleSection:
        """What a new sample takes from the configuration."""
        return self.work.config.sample

    # ---- what commands do

    def self_test(self) -> SelfTest:
        """Try the models now; tells health either way. Raises ModelError."""
        try:
            test = try_models(self.work.models)
        except ModelError as error:
            self._health.self_test(SelfTest(datetime.now(timezone.utc), is_passed=False, detail=str(error)))
            raise
        self._health.self_test(test)
        return test

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
        self._use(Work(fresh, self.work.models, make_bench(fresh, self.work.models)))
        logging.getLogger().setLevel(fresh.log.level.upper())
        return Done(f"changed: {', '.join(changed)}", {"changed": changed, "config_sha256": config_sha256(fresh)})

    def stage(self, name: str) -> Done:
        """Check models and copy them into the free slot. Raises ModelError."""
        manifest = self._slots.stage(name)
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
        """The models in use have counted a field."""
        if self._is_on_trial:
            self._is_on_trial = False
            self._slots.mark_proven()

    # ---- inside

    def _switch(self, *, is_rollback: bool) -> Done:
        opened: list[Models] = []

        def try_them(path: Path) -> None:
            models = self._open(self.work.config, path)
            try_models(models)
            opened.append(models)

        try:
            active = self._slots.switch(try_them, is_rollback=is_rollback)
        except NothingToSwitchTo as error:
            raise Refused("no-models", str(error)) from error
        self._use(Work(self.work.config, opened[-1], make_bench(self.work.config, opened[-1])))
        self._is_on_trial = True
        self.self_test()
        words = f"slot {active.slot} is in use, {active.before} was before"
        return Done(words, {"slot": active.slot, **self.describe()})

    def _use(self, work: Work) -> None:
        self.work = work
        self.on_change(work)

    def _open_first(self, config: Config) -> Models:
        """The models in use; those before where they cannot be used any more. Raises ModelError for the base ones."""
        active, self.went_back = self._slots.begin()
        while True:
            try:
                models = self._open(config, self._slots.path(active.slot))
                self._health.self_test(try_models(models))
            except ModelError as error:
                if active.slot == "base":
                    raise
                self.went_back = f"the models in slot {active.slot} cannot be used: {error}"
                logger.error("%s", self.went_back)  # noqa: TRY400 - its words say all
                active = self._slots.go_back()
            else:
                return models

    @staticmethod
    def _open(config: Config, path: Path) -> Models:
        return open_models(config.models.model_copy(update={"folder": path}))


def _changes(old: Mapping[str, Any], new: Mapping[str, Any], above: str = "") -> Iterator[str]:
    for key in old:
        if isinstance(old[key], dict) and isinstance(new[key], dict):
            yield from _changes(old[key], new[key], f"{above}{key}.")
        elif old[key] != new[key]:
            yield f"{above}{key}"
