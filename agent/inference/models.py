"""Both models, opened and checked together."""

from __future__ import annotations

from dataclasses import dataclass

from agent.config import ModelsSection, models_folder
from agent.inference.classifier import Classifier
from agent.inference.detector import Detector
from agent.inference.interpreter import load_runtime
from agent.inference.manifest import Manifest, load_manifest, read_model_file


@dataclass(frozen=True, slots=True, eq=False)
class Models:
    """The detector, the classifier, and what runs them. Owned by one thread."""

    manifest: Manifest
    detector: Detector
    classifier: Classifier
    runtime: str
    delegate: str


def open_models(section: ModelsSection) -> Models:
    """Load and try both models of the configured folder. Errors: `ModelError` with the file and what to do."""
    folder = models_folder(section)
    manifest = load_manifest(folder)
    runtime = load_runtime(section.runtime)
    detector = Detector(runtime, read_model_file(folder, manifest.detector), manifest.detector, section.threads)
    classifier = Classifier(runtime, read_model_file(folder, manifest.classifier), manifest.classifier, section.threads)
    return Models(manifest, detector, classifier, runtime.name, detector.delegate)
