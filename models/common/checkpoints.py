"""Weights of another net, as far as they fit: of a run of ours, of a part of it, or of somebody else's training.

A checkpoint of ours holds `average`; a foreign one is a bare state dict, or holds one as `state_dict` or `model`. Names
are compared first. Where most of them are strange, tensors are matched by their order and shape: two nets made from one
paper list the same layers, whatever they call them. What was taken and what was not is told, never passed over.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from difflib import SequenceMatcher
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor, nn

from models.common.programs import Unfit

HOLDERS = ("average", "state_dict", "model")
PREFIXES = ("", "backbone.", "module.")


@dataclass(frozen=True, slots=True)
class Fit:
    """What a net took from a checkpoint. by: `name` or `order`. missing: its own tensors that kept their values."""

    taken: int
    of: int
    by: str
    missing: tuple[str, ...]

    def __str__(self) -> str:
        shown = ", ".join(self.missing[:6]) + (", ..." if len(self.missing) > 6 else "")
        return f"{self.taken} of {self.of} tensors taken by {self.by}; kept as they were: {shown or 'none'}"


def require_files(*files: Path | None) -> None:
    """Raises Unfit where one of those that a recipe names is not there. None = it names none."""
    for file in files:
        if file is not None and not file.exists():
            raise Unfit(f"{file}: not there; the comment beside it in the recipe says how to make it")


def read_run_checkpoint(file: Path, facts: Collection[str] = ()) -> dict[str, Any]:
    """What `best.pt` of a run of ours holds, on the CPU. Raises SystemExit where the file is none.

    facts: what such a run writes beside its weights.
    """
    found = read_checkpoint(file)
    wanted = ("average", "command", *facts)
    if not isinstance(found, dict) or (missing := [name for name in wanted if name not in found]):
        told = "" if not isinstance(found, dict) else f", it has no {', '.join(missing)}"
        raise SystemExit(f"{file}: is not the best.pt of a run that this goes on with{told}")
    return found


def read_checkpoint(file: Path) -> Any:
    """What a `.pt` file holds, on the CPU. Raises SystemExit where it is not there, or no checkpoint."""
    try:
        return torch.load(file, weights_only=True, map_location="cpu")
    except FileNotFoundError as error:
        raise SystemExit(f"{file}: not there; a training run writes best.pt into its folder") from error
    except (OSError, RuntimeError, EOFError, ValueError, UnpicklingError) as error:
        reason = str(error).partition(". ")[0].partition("\n")[0] or type(error).__name__
        raise SystemExit(f"{file}: cannot be read as a PyTorch checkpoint of plain tensors: {reason}") from error


def load_fitting(net: nn.Module, file: Path) -> Fit:
    """Give a net what fits it from a `.pt` file. Raises SystemExit where nothing does, or the file is none."""
    found = read_checkpoint(file)
    stored = next((found[name] for name in HOLDERS if isinstance(found.get(name), Mapping)), found)
    own = {name: value for name, value in net.state_dict().items() if not name.endswith("num_batches_tracked")}
    tensors = {name: value for name, value in stored.items() if isinstance(value, Tensor)}
    by_name = max((match_names(own, tensors, prefix) for prefix in PREFIXES), key=len)
    by_order = match_order(own, tensors) if len(by_name) < len(own) / 2 else {}
    chosen = max(by_name, by_order, key=len)
    if not chosen:
        raise SystemExit(f"{file}: none of its {len(tensors)} tensors fits {type(net).__name__}, by name or by order")
    net.load_state_dict(chosen, strict=False)
    missing = tuple(name for name in own if name not in chosen)
    return Fit(len(chosen), len(own), "order" if chosen is by_order else "name", missing)


def match_names(own: Mapping[str, Tensor], stored: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Tensors of the same name, but for a prefix of the stored ones, and of the same shape."""
    stripped = {name.removeprefix(prefix): value for name, value in stored.items() if name.startswith(prefix)}
    shared = own.keys() & stripped.keys()
    return {name: stripped[name] for name in own if name in shared and stripped[name].shape == own[name].shape}


def match_order(own: Mapping[str, Tensor], stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors in the same order with the same shapes; what one net has and the other has not is passed over."""
    counted = {name: value for name, value in stored.items() if not name.endswith("num_batches_tracked")}
    mine, other = ([tuple(value.shape) for value in tensors.values()] for tensors in (own, counted))
    names, values = list(own), list(counted.values())
    blocks = SequenceMatcher(None, mine, other, autojunk=False).get_matching_blocks()
    return {names[a + k]: values[b + k] for a, b, size in blocks for k in range(size)}
