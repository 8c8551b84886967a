"""The classifier: the crop of one cell to a probability for each class."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import cv2
import numpy as np
from numpy.typing import NDArray

from agent.domain import NO_MORPHOLOGY, Attribute, Classification, ModelIdentity, Pixels
from agent.inference.interpreter import Interpreter, Runtime
from agent.inference.manifest import ClassifierEntry, OutputTensor
from agent.inference.quantization import PixelTable, dequantize

Logits = Mapping[str, NDArray[np.float64]]
"""By kind of output."""


class Classifier:
    """Names cells one by one (a batch is no faster on these runtimes). Owned by one thread."""

    def __init__(self, runtime: Runtime, content: bytes, entry: ClassifierEntry, threads: int) -> None:
        self.entry = entry
        self._interpreter = Interpreter(runtime, content, entry, threads)
        self._to_input = PixelTable(entry.input)
        self._outputs: dict[str, OutputTensor] = {output.kind: output for output in entry.outputs}

    @property
    def identity(self) -> ModelIdentity:
        return self.entry.identity

    @property
    def last_input(self) -> bytes:
        """The stored numbers that went into the last run."""
        return self._interpreter.last_input.tobytes()

    @property
    def last_outputs(self) -> bytes:
        """The stored numbers that came out of it."""
        return self._interpreter.all_outputs()

    def classify(self, crop_bgr: Pixels) -> Classification:
        """What one square crop shows.

        crop_bgr: uint8, (side, side, 3), B G R, any side; resized to the input. Probabilities: softmax of the logits
        over the manifest's temperature, in the manifest's class order; attributes: softmax over their values. A cell
        has no up and no left: one that is named with less than the manifest's `sure_probability` is asked about
        mirrored and upside down too, one that is then named with less than its `doubtful_probability` also turned by a
        quarter, and the mean of the logits answers.
        """
        side_px = self.entry.input.shape[1]
        how = cv2.INTER_AREA if crop_bgr.shape[0] > side_px else cv2.INTER_LINEAR
        crop: Pixels = np.asarray(cv2.resize(crop_bgr, (side_px, side_px), interpolation=how), np.uint8)
        if self.entry.input.colour_order == "RGB":
            crop = crop[..., ::-1]
        looks = [self._ask(crop)]
        logits = looks[0]
        shares = self._shares(logits)
        thresholds, turned = self.entry.thresholds, crop.swapaxes(0, 1)
        further = (
            (thresholds.sure_probability, (crop[:, ::-1], crop[::-1], crop[::-1, ::-1])),
            (thresholds.doubtful_probability, (turned, turned[:, ::-1], turned[::-1], turned[::-1, ::-1])),
        )
        for enough, sides in further:
            if shares.max() >= enough:
                break
            looks += [self._ask(side) for side in sides]
            logits = {kind: np.mean([look[kind] for look in looks], axis=0) for kind in logits}
            shares = self._shares(logits)
        best = int(shares.argmax())
        probabilities = dict(zip(self.entry.classes, shares.tolist(), strict=True))
        return Classification(
            self.entry.classes[best],
            float(shares[best]),
            MappingProxyType(probabilities),
            _cell_probability(logits),
            self._morphology(logits),
        )

    def _ask(self, crop: Pixels) -> Logits:
        """The logits of each output for a crop of the input's size and colour order."""
        self._interpreter.run(self._to_input(crop)[None])
        return {
            kind: dequantize(self._interpreter.output(output.name)[0], output).astype(np.float64)
            for kind, output in self._outputs.items()
        }

    def _shares(self, logits: Logits) -> NDArray[np.float64]:
        return _softmax(logits["class_logits"] / self.entry.thresholds.temperature)

    def _morphology(self, said: Logits) -> Mapping[str, Attribute]:
        if self.entry.morphology is None:
            return NO_MORPHOLOGY
        logits, found, start = said["attribute_logits"], {}, 0
        for name, values in self.entry.morphology.attributes.items():
            shares = _softmax(logits[start : start + len(values)])
            best = int(shares.argmax())
            found[name] = Attribute(values[best], float(shares[best]))
            start += len(values)
        return MappingProxyType(found)


def _cell_probability(logits: Logits) -> float:
    if "cell_logit" not in logits:
        return 1.0
    return float(1 / (1 + np.exp(-logits["cell_logit"][0])))


def _softmax(logits: NDArray[np.float64]) -> NDArray[np.float64]:
    weights = np.exp(logits - logits.max())
    shares: NDArray[np.float64] = weights / weights.sum()
    return shares
