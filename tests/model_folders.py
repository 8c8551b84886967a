"""Folders of models as an operator brings them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from agent.config import ModelsSection, models_folder
from agent.inference.golden import answers_names
from agent.inference.manifest import MANIFEST_NAME, load_manifest

SHIPPED = models_folder(ModelsSection())


def put_models(folder: Path, version: str) -> Path:
    """A copy of the shipped models under another version."""
    manifest = load_manifest(SHIPPED)
    for name in (MANIFEST_NAME, *answers_names(manifest), *(entry.file for entry in manifest.entries)):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(SHIPPED / name, folder / name)
    text = json.loads((folder / MANIFEST_NAME).read_text())
    text["classifier"]["version"] = version
    (folder / MANIFEST_NAME).write_text(json.dumps(text))
    return folder
