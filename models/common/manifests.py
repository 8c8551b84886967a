"""Entries of a folder's manifest as programs that measure and train change them: raw, whole or not at all."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from agent.inference.manifest import MANIFEST_NAME

Changes = Mapping[str, Mapping[str, Any]]
"""By key of a manifest's entry the values in it that become others."""

OTHERS = "other_classifiers"


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest as JSON."""
    found: dict[str, Any] = json.loads((folder / MANIFEST_NAME).read_text())
    return found


def write_manifest(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Replace the manifest of a folder."""
    path = folder / MANIFEST_NAME
    part = path.with_suffix(".part")
    part.write_text(json.dumps(manifest, indent=2) + "\n")
    part.replace(path)


def find_entry(manifest: Mapping[str, Any], role: str, name: str | None = None) -> dict[str, Any]:
    """The entry of a role. name: of one of several classifiers; None = the first. Raises SystemExit: there is none."""
    entries = [manifest[role], *(manifest.get(OTHERS, ()) if role == "classifier" else ())]
    found = {entry["name"]: entry for entry in entries}
    if name is not None and name not in found:
        raise SystemExit(f"the manifest has no {role} {name}, but {', '.join(found)}")
    return entries[0] if name is None else found[name]


def put_entry(manifest: dict[str, Any], entry: Mapping[str, Any]) -> None:
    """Instead of the entry of its role and name; a classifier of a new name goes beside the first."""
    first = manifest.get(entry["role"])
    if entry["role"] != "classifier" or first is None or first["name"] == entry["name"]:
        manifest[entry["role"]] = entry
        return
    others = {other["name"]: other for other in manifest.get(OTHERS, ())}
    manifest[OTHERS] = list({**others, entry["name"]: entry}.values())


def change_entry(folder: Path, role: str, changes: Changes, name: str | None = None) -> None:
    """Write values into an entry of a folder's manifest. name: as in `find_entry`."""
    manifest = read_manifest(folder)
    entry = find_entry(manifest, role, name)
    for key, values in changes.items():
        entry[key] = {**entry.get(key, {}), **values}
    write_manifest(folder, manifest)
