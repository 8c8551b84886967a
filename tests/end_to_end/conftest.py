"""Places of work for the agent, and folders of fields."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import cv2
import pytest
from agent_process import bench as bench  # a fixture

from agent.camera.simulated import open_simulated
from agent.config import CameraSection, Config, models_folder
from tests.slides import SMALL_FIELD


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Nothing here can run without the shipped models."""
    if (models_folder(Config().models) / "manifest.json").exists():
        return
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.skip(reason="the shipped models are not in models/"))


@pytest.fixture
def make_fields(tmp_path: Path) -> Callable[..., Path]:
    """Factory `make_fields(count, seed=1) -> Path` of a folder of rendered fields, 320 x 240, as PNG files."""

    def make(count: int, seed: int = 1) -> Path:
        folder = tmp_path / f"fields-{seed}"
        folder.mkdir()
        simulated = {"fields": count, "seed": seed, "interval_s": 0, **SMALL_FIELD}
        camera = open_simulated(CameraSection.model_validate({"kind": "simulated", "simulated": simulated}))
        number = 0
        while (frame := camera.read()) is not None:
            if hasattr(frame, "pixels_bgr"):
                number += 1
                cv2.imwrite(str(folder / f"field-{number}.png"), frame.pixels_bgr)
        camera.close()
        assert number == count
        return folder

    return make
