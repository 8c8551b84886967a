"""Both models, opened and checked together."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from agent.analysis.cells import NamingRules, typical_red_cell_px
from agent.analysis.crops import CropCutter, shown_detection
from agent.analysis.morphology import describe
from agent.config import ModelsSection, models_folder
from agent.domain import Classification, Detection, Pixels
from agent.inference.classifier import Classifier
from agent.inference.detector import Detector
from agent.inference.golden import ANSWERS_NAME, answers_name
from agent.inference.interpreter import load_runtime
from agent.inference.manifest import Manifest, load_manifest, read_model_file

CENTRAL_CELL_SCORE = 0.1
"""Somebody says that a cell is there: less evidence is asked for than the manifest's min_score for a field."""


@dataclass(frozen=True, slots=True, eq=False)
class Models:
    """The detector, the classifier, and what runs them. Owned by one thread."""

    manifest: Manifest
    detector: Detector
    classifier: Classifier
    runtime: str
    delegate: str
    answers_name: str = ANSWERS_NAME
    """Of the file beside the manifest with what these two models are known to answer."""

    def naming_rules(self, min_probability: float | None = None) -> NamingRules:
        """When the manifest lets a name be believed; min_probability replaces the manifest's."""
        detector, thresholds = self.manifest.detector, self.manifest.classifier.thresholds
        return NamingRules(
            thresholds.min_probability if min_probability is None else min_probability,
            detector.agreeing,
            detector.largest_in_red_cells,
            thresholds.min_cell_probability,
            detector.contradicted,
        )

    def name_central_cell(self, pixels_bgr: Pixels, min_score: float | None = None) -> Classification:
        """The class of the one cell that a picture is about.

        pixels_bgr: uint8, (height, width, 3), B G R. min_score: replaces the manifest's. People cut cells tightly or
        with half a field around them; the classifier was taught on crops of one kind. So the cell in the middle, or
        else the largest, is looked for and cut again as in a field, and both models are heard; where the detector sees
        none, the whole picture is the crop.
        """
        height, width = pixels_bgr.shape[:2]
        classified = self.manifest.detector.classified
        detections = self.detector.detect(pixels_bgr, CENTRAL_CELL_SCORE)
        sure = self.manifest.detector.thresholds.min_score if min_score is None else min_score
        shown = shown_detection(detections, classified, width, height, sure)
        cutter = self.cutter(pixels_bgr, detections)
        if shown is None:
            return self.classifier.classify(cutter.whole())
        red_cell_px = typical_red_cell_px(detections, classified, (width, height))
        return self.naming_rules().weigh(self.classifier.classify(cutter.around(shown.box)), shown, red_cell_px)

    def cutter(self, pixels_bgr: Pixels, detections: Iterable[Detection]) -> CropCutter:
        """Cuts the classifier's crops from a picture as the manifest says.

        pixels_bgr: (height, width, 3), B G R. detections: what the detector found in it.
        """
        crop = self.manifest.classifier.crop
        return CropCutter(pixels_bgr, crop.margin, crop.look_for({found.class_name for found in detections}))

    def describe(self, classification: Classification) -> str:
        """A cell's looks in words; empty where the model does not tell any, or is sure of none."""
        wording = self.manifest.classifier.morphology
        return "" if wording is None else describe(classification.morphology, wording.phrases, wording.words)


def open_models(section: ModelsSection) -> Models:
    """Load and try both models of the configured folder. Errors: `ModelError` with the file and what to do."""
    folder = models_folder(section)
    stored = load_manifest(folder)
    manifest = stored.choosing(section.classifier)
    runtime = load_runtime(section.runtime)
    content = read_model_file(folder, manifest.detector)
    detector = Detector(runtime, content, manifest.detector, section.threads, section.most_tiles)
    classifier = Classifier(runtime, read_model_file(folder, manifest.classifier), manifest.classifier, section.threads)
    name = answers_name(None if manifest.classifier.name == stored.classifier.name else manifest.classifier.name)
    return Models(manifest, detector, classifier, runtime.name, detector.delegate, name)
