"""The one door to TFLite: LiteRT where it is installed, tflite-runtime where only that runs."""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from agent.errors import ModelError
from agent.inference.manifest import ModelEntry, Tensor

RUNTIMES = (("ai-edge-litert", "ai_edge_litert.interpreter"), ("tflite-runtime", "tflite_runtime.interpreter"))


@dataclass(frozen=True, slots=True)
class Runtime:
    """A TFLite interpreter package. name: distribution and version, as it stands in every result."""

    name: str
    module: ModuleType


def load_runtime(wanted: str = "auto") -> Runtime:
    """Import the wanted runtime, or with `auto` the first that is there. Errors: `ModelError`."""
    failures = []
    for distribution, module_name in RUNTIMES:
        if wanted in ("auto", distribution):
            if distribution == "tflite-runtime" and int(np.__version__.split(".")[0]) >= 2:
                failures.append(f"tflite-runtime: built against numpy 1, found numpy {np.__version__}")
                continue
            try:
                module = importlib.import_module(module_name)
                return Runtime(f"{distribution} {importlib.metadata.version(distribution)}", module)
            except (ImportError, importlib.metadata.PackageNotFoundError, AttributeError) as cause:
                failures.append(f"{distribution}: {cause}")
    raise ModelError(
        "no TFLite interpreter can be loaded (" + "; ".join(failures) + "): pip install ai-edge-litert,"
        " or on 32-bit Arm tflite-runtime with numpy below 2"
    )


class Interpreter:
    """One loaded model. Owned by one thread; tensors are checked against the manifest once, here.

    Errors: `ModelError` where the file is no model, its tensors differ from the manifest's, or a first run fails
    (tflite-runtime imports with numpy 2 and fails only then).
    """

    def __init__(self, runtime: Runtime, content: bytes, entry: ModelEntry, threads: int) -> None:
        self._outputs: dict[str, tuple[int, Tensor]] = {}
        self.last_input: NDArray[Any] = np.empty(0, np.uint8)
        try:
            with _without_native_notes():
                self._native: Any = runtime.module.Interpreter(model_content=content, num_threads=threads)
                self._native.allocate_tensors()
                self._input_index = self._bind(entry)
                self.run(np.zeros(entry.input.shape, entry.input.dtype))
        except ModelError:
            raise
        except Exception as cause:  # the runtimes raise whatever their C++ side gives
            raise ModelError(f"{entry.file}: {runtime.name} cannot run this model ({cause})") from cause
        self.delegate = self._delegate()

    def run(self, values: NDArray[Any]) -> None:
        """Invoke on one input of the manifest's shape and dtype."""
        self.last_input = values
        self._native.set_tensor(self._input_index, values)
        self._native.invoke()

    def output(self, name: str) -> NDArray[Any]:
        """A copy of an output of the last run, as stored (not yet dequantised)."""
        values: NDArray[Any] = self._native.get_tensor(self._outputs[name][0])
        return values

    def all_outputs(self) -> bytes:
        """Every stored number of the last run, in the manifest's order."""
        return b"".join(self.output(name).tobytes() for name in self._outputs)

    def _bind(self, entry: ModelEntry) -> int:
        (found_input,) = self._native.get_input_details()
        _check(entry, entry.input, found_input)
        found_outputs = {details["name"]: details for details in self._native.get_output_details()}
        for wanted in entry.outputs:
            if wanted.name not in found_outputs:
                raise ModelError(f"{entry.file}: has no output `{wanted.name}`; it has {sorted(found_outputs)}")
            _check(entry, wanted, found_outputs[wanted.name])
            self._outputs[wanted.name] = (int(found_outputs[wanted.name]["index"]), wanted)
        return int(found_input["index"])

    def _delegate(self) -> str:
        try:
            names = {details["op_name"] for details in self._native._get_ops_details()}
        except Exception:  # a private call: where it is gone the answer is unknown, not wrong
            return "unknown"
        return "xnnpack" if any("DELEGATE" in name.upper() for name in names) else "none"


@contextmanager
def _without_native_notes() -> Iterator[None]:
    """Keep the runtime's `INFO:` lines off standard error; it has no switch for them. All else is passed on.

    They wait in memory: a model needs no disk with room, and must not be refused for a full /tmp.
    """
    sys.stderr.flush()
    with os.fdopen(os.memfd_create("words-of-the-runtime"), "w+b") as written:
        kept = os.dup(2)
        os.dup2(written.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(kept, 2)
            os.close(kept)
            written.seek(0)
            for line in written:
                if not line.startswith(b"INFO:"):
                    os.write(2, line)


def _check(entry: ModelEntry, wanted: Tensor, found: dict[str, Any]) -> None:
    scale, zero_point = found["quantization"]
    differences = [
        f"{key} {have}, manifest {want}"
        for key, have, want in (
            ("shape", tuple(int(n) for n in found["shape"]), wanted.shape),
            ("dtype", np.dtype(found["dtype"]).name, wanted.dtype),
            ("scale", round(float(scale), 9), round(wanted.scale, 9)),
            ("zero point", int(zero_point), wanted.zero_point),
        )
        if have != want
    ]
    if differences:
        raise ModelError(f"{entry.file}: tensor `{found['name']}` differs from the manifest: {'; '.join(differences)}")
