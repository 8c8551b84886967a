"""The self-test: do the models answer the golden fields as they are known to?

One run takes about as long as four small fields. On the thread that owns the models.
"""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from agent.domain import Pixels
from agent.errors import ModelError
from agent.inference.golden import (
    MEND,
    GoldenAnswers,
    GoldenField,
    Numbers,
    broken_bits,
    differences,
    golden_cell,
    pixels_sha256,
    read_answers,
    read_fields,
    write_answers,
)
from agent.inference.manifest import ClassifierEntry, DetectorEntry
from agent.inference.models import Models

MOST_FAULTS_TOLD = 3
"""In one line; the first tell where to look, a broken runtime gives hundreds."""

OTHER_RUNTIME = (
    "Restart the agent; then choose another models.runtime, install the package again, or go back to the models before"
    " (model.rollback)"
)


@dataclass(frozen=True, slots=True)
class FieldVerdict:
    """How one golden field was answered. is_exact: compared bit by bit."""

    name: str
    cells: int
    is_exact: bool
    faults: tuple[str, ...]

    @property
    def is_passed(self) -> bool:
        return not self.faults


@dataclass(frozen=True, slots=True)
class Verdict:
    """The self-test as a whole. detail: in words, with what to do where it failed."""

    is_passed: bool
    detail: str
    fields: tuple[FieldVerdict, ...] = ()


class GoldenTest:
    """The golden fields and the answers that lie beside the models of a folder. Owned by one thread.

    Read once, and again only while they do not fit: what is in use may be replaced on the disk under a running agent.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._fields: Mapping[str, Pixels] = {}
        self._answers: GoldenAnswers | None = None
        self._own: dict[str, GoldenField] = {}

    def run(self, models: Models) -> Verdict:
        """Ask the models every golden field. A first answer that passes is what later ones must be, bit by bit."""
        if self._answers is None:
            try:
                fields, answers = read_fields(), read_answers(self._folder, models.answers_name)
            except ModelError as error:
                return Verdict(False, f"self-test: {error}")
            misfit = _misfit(models, answers, fields)
            if misfit is not None:
                return Verdict(False, f"self-test: {self._folder / models.answers_name}: {misfit}; {MEND}")
            self._fields, self._answers = fields, answers
        answers = self._answers
        try:
            found = {name: answer(models, pixels) for name, pixels in self._fields.items()}
        except ModelError as error:
            return Verdict(False, f"self-test: {error} ({', '.join(_who(models))}); {OTHER_RUNTIME}")
        verdicts = tuple(self._judge(models, answers, name, field) for name, field in found.items())
        verdict = Verdict(all(one.is_passed for one in verdicts), _words(models, verdicts), verdicts)
        if verdict.is_passed and not self._own:
            self._own = found
        return verdict

    def _judge(self, models: Models, answers: GoldenAnswers, name: str, found: GoldenField) -> FieldVerdict:
        known = answers.fields[name]
        faults = differences(known, found, models.manifest.detector.thresholds.min_score)
        is_exact = (answers.machine, answers.runtime, answers.delegate) == _who(models)
        if is_exact:
            is_exact, broken = broken_bits(known, found)
            faults = broken + faults
        if not faults and name in self._own:
            _, faults = broken_bits(self._own[name], found)
        return FieldVerdict(name, len(found.cells), is_exact, faults)


def _who(models: Models) -> tuple[str, str, str]:
    """What an answer hangs on, to the last bit: kind of machine, runtime, delegate."""
    return platform.machine(), models.runtime, models.delegate


def _words(models: Models, verdicts: Sequence[FieldVerdict]) -> str:
    faults = [f"field {verdict.name}: {fault}" for verdict in verdicts for fault in verdict.faults]
    if not faults:
        exact = sum(verdict.is_exact for verdict in verdicts)
        how = {len(verdicts): "bit by bit", 0: "within the tolerance"}.get(exact, f"{exact} of them bit by bit")
        cells = sum(verdict.cells for verdict in verdicts)
        return f"{len(verdicts)} golden fields, {cells} cells: answered as known, {how}"
    more = f" and {len(faults) - MOST_FAULTS_TOLD} more" if len(faults) > MOST_FAULTS_TOLD else ""
    return (
        f"self-test: {'; '.join(faults[:MOST_FAULTS_TOLD])}{more}: not as these models are known to answer"
        f" ({', '.join(_who(models))}). {OTHER_RUNTIME}"
    )


def make_answers(models: Models, folder: Path) -> GoldenAnswers:
    """Take what the models say now for right, and write it beside them. Raises ModelError."""
    fields = {name: answer(models, pixels) for name, pixels in read_fields().items()}
    machine, runtime, delegate = _who(models)
    answers = GoldenAnswers(
        golden=1,
        detector_sha256=models.detector.identity.sha256,
        classifier_sha256=models.classifier.identity.sha256,
        machine=machine,
        runtime=runtime,
        delegate=delegate,
        fields=fields,
    )
    write_answers(folder, answers, models.answers_name)
    return answers


def answer(models: Models, pixels_bgr: Pixels) -> GoldenField:
    """What the models say to a field, with the manifest's thresholds and whatever the configuration says."""
    detections = models.detector.detect(pixels_bgr)
    detector = _digests(models.detector.last_input, models.detector.last_outputs)
    cutter = models.cutter(pixels_bgr, detections)
    inputs, outputs, cells = hashlib.sha256(), hashlib.sha256(), []
    for detection in detections:
        classification = None
        if detection.class_name in models.manifest.detector.classified:
            classification = models.classifier.classify(cutter.around(detection.box))
            inputs.update(models.classifier.last_input)
            outputs.update(models.classifier.last_outputs)
        cells.append(golden_cell(detection, classification))
    return GoldenField(
        pixels_sha256=pixels_sha256(pixels_bgr),
        detector=detector,
        classifier=Numbers(inputs_sha256=inputs.hexdigest(), outputs_sha256=outputs.hexdigest()),
        cells=tuple(cells),
    )


def _digests(given: bytes, made: bytes) -> Numbers:
    return Numbers(inputs_sha256=hashlib.sha256(given).hexdigest(), outputs_sha256=hashlib.sha256(made).hexdigest())


def _misfit(models: Models, answers: GoldenAnswers, fields: Mapping[str, Pixels]) -> str | None:
    """Why these answers say nothing of these models."""
    known = (answers.detector_sha256, answers.classifier_sha256)
    entries: tuple[DetectorEntry | ClassifierEntry, ...] = (models.manifest.detector, models.manifest.classifier)
    for entry, sha256 in zip(entries, known, strict=True):
        if entry.sha256 != sha256:
            return (
                f"the known answers are those of another {entry.role} (SHA-256 {sha256[:16]}...,"
                f" in use is {entry.sha256[:16]}...)"
            )
    for name, pixels in fields.items():
        if name not in answers.fields or answers.fields[name].pixels_sha256 != pixels_sha256(pixels):
            return f"there is no known answer to the golden field {name} of this version of the agent"
    return None
