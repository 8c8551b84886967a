"""Morphology against class, on cases with known answers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from agent.domain import Attribute, Classification
from models.contradictions import compare, learn_rarity


@pytest.fixture
def attributes(tmp_path: Path) -> Path:
    """Nine round monocytes and one lobed one; neutrophils are lobed, one of them in `test`."""
    cells, told = ["path,class,split,prefix"], ["path,nucleus"]
    for number in range(10):
        cells.append(f"m{number}.png,monocyte,train,X")
        told.append(f"m{number}.png,{'lobed' if number == 0 else 'round'}")
    cells += ["n0.png,neutrophil,train,X", "n1.png,neutrophil,test,X"]
    told += ["n0.png,lobed", "n1.png,round"]
    (tmp_path / "pbc.csv").write_text("\n".join(cells))
    (tmp_path / "attributes.csv").write_text("\n".join(told))
    return tmp_path


def answer(class_name: str, nucleus: str, probability: float = 0.9) -> Classification:
    return Classification(class_name, 0.9, {class_name: 0.9}, morphology={"nucleus": Attribute(nucleus, probability)})


def test_a_value_is_as_rare_as_it_was_in_the_class_while_training(attributes: Path) -> None:
    rarity = learn_rarity(attributes)
    assert rarity.of(answer("monocyte", "round")) == pytest.approx(9.5 / 11)
    assert rarity.of(answer("monocyte", "lobed")) == pytest.approx(1.5 / 11)
    assert rarity.of(answer("neutrophil", "round")) == pytest.approx(0.5 / 2)  # the one of `test` is not known


def test_what_is_told_unsurely_and_what_has_no_attributes_contradicts_nothing(attributes: Path) -> None:
    rarity = learn_rarity(attributes)
    assert rarity.of(answer("monocyte", "lobed", 0.4)) == 1
    assert rarity.of(answer("platelet", "lobed")) == 1


def test_contradicted_cells_are_held_against_as_many_unsure_ones() -> None:
    right = np.array([True, False, True, False, True])
    figures = compare(right, np.array([0.9, 0.8, 0.76, 0.95, 0.99]), np.array([0.5, 0.5, 0.5, 0.004, 0.008]))
    assert (figures["accepted"], figures["wrong"]) == (5, 2)
    rows = {row["bound"]: row for row in figures["bounds"]}  # type: ignore[attr-defined]
    assert rows[0.005] == {"bound": 0.005, "contradicted": 1, "wrong": 1, "wrong_of_unsure": 0}
    assert rows[0.01] == {"bound": 0.01, "contradicted": 2, "wrong": 1, "wrong_of_unsure": 1}
