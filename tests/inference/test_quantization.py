"""Stored numbers and real ones."""

from __future__ import annotations

import numpy as np
import pytest

from agent.inference.manifest import Tensor
from agent.inference.quantization import PixelTable, dequantize, quantize


def tensor(dtype: str = "int8", scale: float = 1 / 255, zero_point: int = -128) -> Tensor:
    return Tensor(name="t", shape=(1,), dtype=dtype, scale=scale, zero_point=zero_point, meaning="")  # type: ignore[arg-type]


def test_dequantize_does_not_wrap_at_the_ends() -> None:
    stored = np.array([-128, 127], np.int8)
    assert dequantize(stored, tensor(scale=0.5, zero_point=127)).tolist() == [-127.5, 0.0]


def test_dequantize_inverts_quantize() -> None:
    t = tensor(scale=0.07, zero_point=12)
    assert dequantize(np.array([round(quantize(-2.1, t))], np.int8), t)[0] == pytest.approx(-2.1, abs=0.035)


def test_pixels_of_a_unit_input_are_stored_as_flipped_levels() -> None:
    levels = np.arange(256, dtype=np.uint8)
    stored = PixelTable(tensor())(levels)
    assert stored.dtype == np.int8
    assert stored.tolist() == list(range(-128, 128))


@pytest.mark.parametrize(("dtype", "scale", "zero_point"), [("int8", 0.02, 3), ("uint8", 0.01, 0), ("float32", 0, 0)])
def test_pixels_of_any_other_input_follow_its_scale(dtype: str, scale: float, zero_point: int) -> None:
    t = tensor(dtype, scale, zero_point)
    levels = np.array([0, 100, 255], np.uint8)
    stored = PixelTable(t)(levels)
    assert stored.dtype == np.dtype(dtype)
    assert dequantize(stored, t) == pytest.approx(levels / 255, abs=scale / 2 + 1e-6)
