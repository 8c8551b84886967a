"""Both models, opened and checked together."""

from __future__ import annotations

from dataclasses import dataclass

from agent.analysis.cells import NamingRules
from agent.analysis.crops import central_detection, cut_crop, surrounded, whole_crop
from agent.analysis.morphology import describe
from agent.config import ModelsSection, models_folder
from agent.domain import Classification, Detection, Pixels
from agent.inference.classifier import Classifier
from agent.inference.detector import Detector
from agent.inference.interpreter import load_runtime
from agent.inference.manifest import Manifest, load_manifest, read_model_file

CENTRAL_CELL_SCORE = 0.1
"""Somebody says that a cell is there: less evidence is asked for than the manifest's min_score for a field."""


CLOSE_UP = 0.55
"""Share of a picture's longer side from which the box in its middle is not believed: the whole cell is larger."""

SURROUNDINGS = 0.3
"""Width, as a share of the longer side, of what is put around a close-up."""


@dataclass(frozen=True, slots=True, eq=False)
class Models:
    """The detector, the classifier, and what runs them. Owned by one thread."""

    manifest: Manifest
    detector: Detector
    classifier: Classifier
    runtime: str
    delegate: str

    def naming_rules(self, min_probability: float | None = None) -> NamingRules:
        """When the manifest lets a name be believed; min_probability replaces the manifest's."""
        detector, thresholds = self.manifest.detector, self.manifest.classifier.thresholds
        return NamingRules(
            thresholds.min_probability if min_probability is None else min_probability,
            detector.agreeing,
            detector.largest_in_red_cells,
            thresholds.min_cell_probability,
        )

    def name_central_cell(self, pixels_bgr: Pixels) -> Classification:
        """The class of the one cell that a picture is about.

        pixels_bgr: uint8, (height, width, 3), B G R. People cut cells tightly or with half a field around them; the
        classifier was taught on crops of one kind. So the cell in the middle is looked for and cut again as in a
        field. A cell that fills the picture is looked for in the middle of a wider one, whose edge is repeated: the
        detector learnt from fields, and would box its nucleus alone. Where it sees none, the whole picture is the crop.
        """
        found = self._central(pixels_bgr)
        side_px = max(pixels_bgr.shape[:2])
        if found is None or max(found.box.width_px, found.box.height_px) > CLOSE_UP * side_px:
            wider = surrounded(pixels_bgr, round(SURROUNDINGS * side_px))
            found_wider = self._central(wider)
            if found_wider is not None:
                pixels_bgr, found = wider, found_wider
        if found is None:
            return self.classifier.classify(whole_crop(pixels_bgr))
        return self.classifier.classify(cut_crop(pixels_bgr, found.box, self.manifest.classifier.crop.margin))

    def _central(self, pixels_bgr: Pixels) -> Detection | None:
        height, width = pixels_bgr.shape[:2]
        found = self.detector.detect(pixels_bgr, CENTRAL_CELL_SCORE)
        return central_detection(found, self.manifest.detector.classified, width, height)

    def describe(self, classification: Classification) -> str:
        """A cell's looks in words; empty where the model does not tell any, or is sure of none."""
        wording = self.manifest.classifier.morphology
        return "" if wording is None else describe(classification.morphology, wording.phrases, wording.words)


def open_models(section: ModelsSection) -> Models:
    """Load and try both models of the configured folder. Errors: `ModelError` with the file and what to do."""
    folder = models_folder(section)
    manifest = load_manifest(folder)
    runtime = load_runtime(section.runtime)
    content = read_model_file(folder, manifest.detector)
    detector = Detector(runtime, content, manifest.detector, section.threads, section.most_tiles)
    classifier = Classifier(runtime, read_model_file(folder, manifest.classifier), manifest.classifier, section.threads)
    return Models(manifest, detector, classifier, runtime.name, detector.delegate)
