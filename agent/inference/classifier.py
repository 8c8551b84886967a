"""The classifier: the crop of one cell to a probability for each class."""

from __future__ import annotations

from types import MappingProxyType

import cv2
import numpy as np

from agent.domain import Classification, ModelIdentity, Pixels
from agent.inference.interpreter import Interpreter, Runtime
from agent.inference.manifest import ClassifierEntry
from agent.inference.quantization import PixelTable, dequantize


class Classifier:
    """Names cells one by one (a batch is no faster on these runtimes). Owned by one thread."""

    def __init__(self, runtime: Runtime, content: bytes, entry: ClassifierEntry, threads: int) -> None:
        self.entry = entry
        self._interpreter = Interpreter(runtime, content, entry, threads)
        self._to_input = PixelTable(entry.input)
        (self._logits,) = entry.outputs

    @property
    def identity(self) -> ModelIdentity:
        return self.entry.identity

    def classify(self, crop_bgr: Pixels) -> Classification:
        """Probabilities of one square crop.

        crop_bgr: uint8, (side, side, 3), B G R, any side; resized to the input. Probabilities: softmax of the logits
        over the manifest's temperature, in the manifest's class order.
        """
        side_px = self.entry.input.shape[1]
        how = cv2.INTER_AREA if crop_bgr.shape[0] > side_px else cv2.INTER_LINEAR
        crop: Pixels = np.asarray(cv2.resize(crop_bgr, (side_px, side_px), interpolation=how), np.uint8)
        if self.entry.input.colour_order == "RGB":
            crop = crop[..., ::-1]
        self._interpreter.run(self._to_input(crop)[None])
        logits = dequantize(self._interpreter.output(self._logits.name)[0], self._logits).astype(np.float64)
        weights = np.exp((logits - logits.max()) / self.entry.thresholds.temperature)
        shares = weights / weights.sum()
        best = int(shares.argmax())
        probabilities = dict(zip(self.entry.classes, shares.tolist(), strict=True))
        return Classification(self.entry.classes[best], float(shares[best]), MappingProxyType(probabilities))
