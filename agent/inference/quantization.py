"""From pixels to stored numbers and from stored numbers to real ones."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from agent.inference.manifest import Tensor


def dequantize(values: NDArray[Any], tensor: Tensor) -> NDArray[np.float32]:
    """Real values of an output: scale * (stored - zero_point).

    values: int8, uint8 or float32, any shape; not modified. Returns float32 of the same shape, a new array.
    Widened before subtracting: int8 - int8 can wrap. Source: TFLite 8-bit quantisation specification.
    """
    if tensor.dtype == "float32":
        return values.astype(np.float32)
    real: NDArray[np.float32] = (values.astype(np.float32) - np.float32(tensor.zero_point)) * np.float32(tensor.scale)
    return real


def quantize(value: float, tensor: Tensor) -> float:
    """The stored number for a real one, not rounded; for thresholds."""
    return value if tensor.dtype == "float32" else value / tensor.scale + tensor.zero_point


class PixelTable:
    """Stored input values for the 256 grey levels, where the model's real input is level / 255."""

    def __init__(self, tensor: Tensor) -> None:
        levels = np.arange(256, dtype=np.float64) / 255
        if tensor.dtype == "float32":
            self._table: NDArray[Any] = levels.astype(np.float32)
        else:
            limits = np.iinfo(tensor.dtype)
            stored = np.clip(np.round(levels / tensor.scale) + tensor.zero_point, limits.min, limits.max)
            self._table = stored.astype(tensor.dtype)
        # With an input range of exactly [0, 1] int8 is the level with its top bit flipped: no look-up, 20 x faster.
        flipped = (np.arange(256, dtype=np.uint8) ^ 0x80).view(np.int8)
        self._is_flip = tensor.dtype == "int8" and bool(np.array_equal(self._table, flipped))

    def __call__(self, pixels: NDArray[np.uint8]) -> NDArray[Any]:
        """pixels: uint8, any shape. Returns an array of the tensor's dtype and the same shape, new."""
        if self._is_flip:
            flipped: NDArray[Any] = np.bitwise_xor(pixels, np.uint8(0x80)).view(np.int8)
            return flipped
        stored: NDArray[Any] = self._table[pixels]
        return stored
