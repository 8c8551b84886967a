"""The models for a command: those with which the agent of this device counts, unless somebody names others."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from agent.config import Config
from agent.inference.models import Models, open_models
from agent.supervisor import model_slots


@dataclass(frozen=True, slots=True, eq=False)
class ModelsInUse:
    """The models, opened. slot_words: that they were activated in a slot. fault: why it is not known which were.

    Both are None where there is nothing to tell, and where somebody named the folder.
    """

    models: Models
    folder: Path
    slot_words: str | None
    fault: str | None

    @property
    def names(self) -> tuple[str, str]:
        """Name and version of the detector and of the classifier."""
        detector, classifier = self.models.detector.identity, self.models.classifier.identity
        return f"{detector.name} {detector.version}", f"{classifier.name} {classifier.version}"

    @property
    def words(self) -> str:
        """Which they are and what runs them, in one line."""
        models = self.models
        return f"models {self.folder}: {', '.join(self.names)}; {models.runtime}, delegate {models.delegate}"

    def tell(self, *, as_json: bool) -> None:
        """Say which they are; where standard output is JSON, which names them itself, only what may surprise."""
        if not as_json:
            print(self.words, flush=True)
        elif self.slot_words is not None:
            print(f"hematovision: {self.words}; {self.slot_words}", file=sys.stderr, flush=True)
        if self.fault is not None:
            print(f"hematovision: {self.fault}; the configured ones are used", file=sys.stderr, flush=True)


def open_models_in_use(
    config: Config, named: Path | None = None, *, classifier: str | None = None, state: Path | None = None
) -> ModelsInUse:
    """The configured models, or those of the slot that was activated.

    named, classifier: this folder of models and this classifier instead. state: the folder of the outbox beside which
    the slots are; None = as configured. Raises ModelError.
    """
    slots = model_slots(config, state)
    folder = named or slots.path_in_use
    classifier = classifier or config.models.classifier
    models = open_models(config.models.model_copy(update={"folder": folder, "classifier": classifier}))
    if named is not None:
        return ModelsInUse(models, folder, None, None)
    return ModelsInUse(models, folder, slots.staying_words, slots.fault)
