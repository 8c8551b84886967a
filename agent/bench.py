"""The bench: the models, thresholds and names with which every frame is worked, as the configuration asks for them."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import agent
from agent.analysis.cells import NamingRules
from agent.analysis.crops import cut_crop, encode_jpeg
from agent.analysis.differential import NUCLEATED, Chamber, Confusion, Rules, kinds_in_order
from agent.analysis.drift import DriftPlan, drift_plan
from agent.config import (
    Config,
    ModelsSection,
    PreprocessingSection,
    QualitySection,
    ReviewSection,
    config_sha256,
    load_reference_intervals,
)
from agent.delivery.commands import canonical_json
from agent.delivery.topics import Topics
from agent.domain import Cell, Frame, Provenance, Thresholds
from agent.inference.manifest import Manifest
from agent.inference.models import Models
from agent.machine import read_software
from agent.reporting import Reporter

NO_REVIEW = ReviewSection(enabled=False)

AS_IT_IS = PreprocessingSection()

NO_KINDS = Rules({})
"""Where the manifest does not say what each class is, a differential has no shares."""


@dataclass(frozen=True, slots=True, eq=False)
class Bench:
    """What every frame is worked with: the models, the thresholds, the names that go into its messages.

    drift: how this device is watched; None = it is not. absence_s: so long no slide is in view before another one is
    recognised, which begins a sample; None = only commands do.
    """

    models: Models
    quality: QualitySection
    min_score: float | None
    rules: NamingRules
    provenance: Provenance
    topics: Topics
    with_cells: bool
    with_images: bool = False
    counting: Rules = NO_KINDS
    field_area_um2: float | None = None
    review: ReviewSection = NO_REVIEW
    preprocessing: PreprocessingSection = AS_IT_IS
    drift: DriftPlan | None = None
    absence_s: float | None = None

    @property
    def reporter(self) -> Reporter:
        """How samples are reported that are counted here."""
        return Reporter(self.topics, self.counting, self.provenance)

    def picture_of(self, cell: Cell, frame: Frame) -> bytes:
        """A cell as people are shown it, a JPEG: what the classifier got, in the look of its own laboratory."""
        margin = self.models.manifest.classifier.crop.margin
        return encode_jpeg(cut_crop(frame.pixels_bgr, cell.detection.box, margin))


def make_bench(config: Config, models: Models) -> Bench:
    """The bench that the configuration asks for."""
    rules = models.naming_rules(config.models.min_probability)
    provenance = Provenance(
        agent_version=agent.__version__,
        detector=models.detector.identity,
        classifier=models.classifier.identity,
        runtime=models.runtime,
        delegate=models.delegate,
        config_sha256=config_sha256(config),
        software=read_software(),
        thresholds=_thresholds(config.models, rules, models.manifest),
    )
    counting = counting_rules(config, models.manifest)
    return Bench(
        models=models,
        quality=_quality_section(config),
        min_score=config.models.min_score,
        rules=rules,
        provenance=provenance,
        topics=Topics(config.site, config.device),
        with_cells=config.publish.cells,
        with_images=config.publish.images,
        counting=counting,
        field_area_um2=_um2(config.differential.field_area_mm2),
        review=config.review,
        preprocessing=config.preprocessing,
        drift=drift_plan(config, provenance, tuple(name for name, kind in counting.kinds.items() if kind in NUCLEATED)),
        absence_s=config.sample.absence_s if config.sample.start == "each-slide" else None,
    )


_NOT_A_RULE = frozenset({"name", "version", "file", "sha256", "data", "command", "confusion"})
"""Keys of the manifest's entries that say who a model is, not how it is asked."""


def _thresholds(section: ModelsSection, rules: NamingRules, manifest: Manifest) -> Thresholds:
    """What is in force: the configuration's numbers where it has any, else the manifest's."""
    least = manifest.detector.thresholds.min_score if section.min_score is None else section.min_score
    says = {
        "detector": manifest.detector.model_dump(mode="json", exclude=set(_NOT_A_RULE)),
        "classifier": manifest.classifier.model_dump(mode="json", exclude=set(_NOT_A_RULE)),
        "in_force": [least, rules.min_probability, rules.min_cell_probability, section.most_tiles],
    }
    digest = hashlib.sha256(canonical_json(says)).hexdigest()
    return Thresholds(least, rules.min_probability, rules.min_cell_probability, digest)


def counting_rules(config: Config, manifest: Manifest) -> Rules:
    """How the differential is made: the manifest tells what each class is, the configuration what is asked."""
    section, confusion = config.differential, manifest.classifier.own_confusion
    has_column = section.correct_confusions and confusion is not None
    return Rules(
        kinds=kinds_in_order([*manifest.classifier.classes, *manifest.detector.classes], manifest.cell_kinds),
        method=section.interval,
        confusion=Confusion(confusion.counts) if has_column and confusion is not None else None,
        reference=load_reference_intervals(section.reference_file),
        chamber=None
        if section.chamber_depth_mm is None
        else Chamber(depth_mm=section.chamber_depth_mm, dilution=section.dilution),
    )


def _quality_section(config: Config) -> QualitySection:
    return config.quality if config.camera.is_one_device else config.quality.model_copy(update={"learn": False})


def _um2(area_mm2: float | None) -> float | None:
    return None if area_mm2 is None else area_mm2 * 1e6
