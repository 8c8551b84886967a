"""The simulated slide as tests use it: fields of 320 x 240 px, drawn in a quarter of the time of a full one."""

from __future__ import annotations

from typing import Any

SMALL_FIELD = {"frame_width_px": 320, "frame_height_px": 240}

AS_DENSE_AS_OTHERS = {"red_cells_per_field": 6, "nucleated_cells_per_field": 1, "platelets_per_field": 1}
"""The defaults are those of a field four times as large: in a small one the cells would lie upon each other."""


def small_slide(**keys: Any) -> dict[str, Any]:
    """The section `camera` of a configuration. keys: what else `camera.simulated` is to say."""
    return {"kind": "simulated", "simulated": {**SMALL_FIELD, **AS_DENSE_AS_OTHERS, **keys}}
