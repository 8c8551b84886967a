"""A trained net to a full-int8 TFLite file, with the facts about it that the manifest needs.

Static quantisation, per-channel weights, calibrated by plain minimum and maximum: the quantiser's own default is a
moving average, which clips a detector's rare strong logits.
"""

from __future__ import annotations

import contextlib
import hashlib
import shutil
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from ai_edge_litert.interpreter import Interpreter
from numpy.typing import NDArray
from torch import Tensor, nn

from models.common.manifests import put_entry, read_manifest, write_manifest

Tensors = list[dict[str, Any]]
NO_FLOORS: Mapping[str, float] = MappingProxyType({})


class ConversionFailed(Exception):
    """A converted file does not answer as its net does."""


def export_float(net: nn.Module, side_px: int, path: Path) -> None:
    """Write the float TFLite file of a net that takes (1, side, side, 3) in [0, 1].

    Raises ConversionFailed where the file answers otherwise than the net.
    """
    import litert_torch

    path.parent.mkdir(parents=True, exist_ok=True)
    # Of a 3 x 3 kernel that lies in memory channels last the converter (0.10.0) loses a part, without a word.
    net = net.eval().to(memory_format=torch.contiguous_format)
    picture = torch.rand(1, side_px, side_px, 3)
    with contextlib.redirect_stdout(sys.stderr):  # its words are no figures
        litert_torch.convert(net, (picture,)).export(str(path))
    shorten_names(path)
    require_same_answers(net, picture, path)


@torch.no_grad()
def require_same_answers(net: nn.Module, picture: Tensor, path: Path) -> None:
    """Raises ConversionFailed where a file's numbers are not the net's, to a thousandth of the largest.

    picture: (1, side, side, 3) in [0, 1]. Outputs of a file have no order: all numbers are compared by size.
    """
    answer = net(picture)
    wanted = sorted_numbers(part.numpy() for part in (answer if isinstance(answer, tuple) else (answer,)))
    interpreter = Interpreter(str(path))
    interpreter.allocate_tensors()
    (given,) = interpreter.get_input_details()
    interpreter.set_tensor(given["index"], picture.numpy())
    interpreter.invoke()
    told = sorted_numbers(interpreter.get_tensor(found["index"]) for found in interpreter.get_output_details())
    if told.shape != wanted.shape or np.abs(told - wanted).max() > 1e-3 * np.abs(wanted).max():
        raise ConversionFailed(
            f"{path}: does not answer as its net does; convert it with another version of litert-torch"
        )


def sorted_numbers(parts: Iterable[NDArray[np.float32]]) -> NDArray[np.float32]:
    return np.sort(np.concatenate([part.ravel() for part in parts]))


def shorten_names(path: Path) -> None:
    """Give the inner tensors of a float file numbers for names: the modules' full paths are 7 % of a small file."""
    import flatbuffers
    from ai_edge_litert import schema_py_generated as schema

    stored = path.read_bytes()
    model = schema.ModelT.InitFromObj(schema.Model.GetRootAs(stored))
    for buffer in model.buffers:
        if buffer.offset > 1:  # kept behind the flatbuffer: bring it in, the offsets are about to change
            buffer.data = np.frombuffer(stored, np.uint8, buffer.size, buffer.offset)
            buffer.offset = buffer.size = 0
    for graph in model.subgraphs:
        ends = {*graph.inputs, *graph.outputs}
        for index, tensor in enumerate(graph.tensors):
            if index not in ends:
                tensor.name = str(index).encode()
    builder = flatbuffers.Builder(len(stored))
    builder.Finish(model.Pack(builder), b"TFL3")
    path.write_bytes(builder.Output())


def quantize_file(
    source: Path, target: Path, pictures: Iterable[NDArray[np.float32]], floors: Mapping[str, float] = NO_FLOORS
) -> None:
    """Quantise a float file to int8.

    pictures: calibration inputs (1, side, side, 3) in [0, 1], from `train` only. floors: by output name the value below
    which all is one: where nobody looks, steps are better spent elsewhere.
    """
    from ai_edge_quantizer import calibrator, quantizer, recipe
    from ai_edge_quantizer.utils import qsv_utils

    interpreter = calibrator.CalibrationInterpreter(
        str(source), calibrator.CalibrationMode.CALIBRATION_PRESERVE_ALL_TENSORS, qsv_utils.min_max_update
    )
    runner = interpreter.get_signature_runner("serving_default")
    (argument,) = runner.get_input_details()
    for picture in list(pictures):
        runner(**{argument: picture})
    ranges = interpreter.get_calibration_results()
    # Exactly [0, 1]: then a stored pixel is its grey level with the top bit flipped, and no look-up is needed.
    input_name = Interpreter(str(source)).get_input_details()[0]["name"]
    ranges[input_name]["min"] = np.zeros_like(ranges[input_name]["min"])
    ranges[input_name]["max"] = np.ones_like(ranges[input_name]["max"])
    for name, floor in floors.items():
        ranges[name]["min"] = np.full_like(ranges[name]["min"], floor)
    target.parent.mkdir(parents=True, exist_ok=True)
    target.unlink(missing_ok=True)
    with contextlib.redirect_stdout(sys.stderr):  # its words are no figures
        quantizer.Quantizer(str(source), recipe.static_wi8_ai8()).quantize(ranges).export_model(str(target))


def describe_tensors(path: Path) -> tuple[dict[str, Any], Tensors]:
    """Input and outputs of a file as the manifest writes them: name, shape, dtype, scale, zero_point."""
    interpreter = Interpreter(str(path))
    (found_input,) = interpreter.get_input_details()
    return _describe(found_input), [_describe(details) for details in interpreter.get_output_details()]


def _describe(details: dict[str, Any]) -> dict[str, Any]:
    scale, zero_point = details["quantization"]
    return {
        "name": details["name"],
        "shape": [int(n) for n in details["shape"]],
        "dtype": np.dtype(details["dtype"]).name,
        "scale": float(scale),
        "zero_point": int(zero_point),
    }


def begin_folder(shipped: Path, folder: Path) -> None:
    """Make a folder a copy of the shipped models where it is none yet, so that one model can be compared alone."""
    if not (folder / "manifest.json").exists():
        left_out = shutil.ignore_patterns("*.py", "*.md", "recipes", "__pycache__")
        shutil.copytree(shipped, folder, ignore=left_out, dirs_exist_ok=True)


def renew_entry(
    folder: Path, role: str, describe_output: Callable[[dict[str, Any]], Mapping[str, Any]], **changes: Any
) -> None:
    """One entry of a manifest tells the tensors of its file as it is now. describe_output: what is said of each."""
    entry = read_manifest(folder)[role]
    found_input, outputs = describe_tensors(folder / entry["file"])
    kept = {key: value for key, value in entry.items() if key not in ("role", "sha256")}
    told = [{**describe_output(output), **output} for output in outputs]
    update_manifest(folder, role, **{**kept, "input": {**entry["input"], **found_input}, "outputs": told, **changes})


def update_manifest(folder: Path, role: str, **facts: Any) -> None:
    """Write one model's entry into the manifest of a models folder; the digest is taken from the file itself."""
    manifest = read_manifest(folder) if (folder / "manifest.json").exists() else {"manifest": 1}
    digest = hashlib.sha256((folder / facts["file"]).read_bytes()).hexdigest()
    put_entry(manifest, {"role": role, **facts, "sha256": digest})
    write_manifest(folder, manifest)
