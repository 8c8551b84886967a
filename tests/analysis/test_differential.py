"""What counts become: shares, ratios, corrected shares, concentrations, and flags that know how sure they are."""

from __future__ import annotations

import numpy as np
import pytest

from agent.analysis.differential import (
    CellKind,
    Chamber,
    Confusion,
    Differential,
    Rules,
    Tally,
    correct_shares,
    count_nucleated,
    kinds_in_order,
    make_differential,
    still_needed,
)
from agent.analysis.intervals import binomial_interval, poisson_interval
from agent.analysis.reference import judge
from agent.config import load_reference_intervals, packaged_folder
from agent.domain import ReferenceInterval
from agent.inference.manifest import load_manifest

KINDS: dict[str, CellKind] = {
    "round": "leukocyte",
    "lobed": "leukocyte",
    "young": "erythroblast",
    "broken": "smudge",
    "small": "platelet",
    "red": "red-cell",
}


def make(counts: dict[str, int], *, fields: int = 10, area_um2: float | None = None, **rules: object) -> Differential:
    tally = Tally(counts, fields, area_um2=area_um2)
    return make_differential(tally, Rules(KINDS, **rules))  # type: ignore[arg-type]


def test_shares_are_of_the_classified_leukocytes_alone() -> None:
    made = make({"round": 30, "lobed": 70, "young": 5, "broken": 9, "small": 40, "red": 900, "unidentified": 50})
    assert made.leukocytes == 100
    assert [(share.class_name, share.count, share.pct) for share in made.shares] == [
        ("round", 30, pytest.approx(30)),
        ("lobed", 70, pytest.approx(70)),
    ]
    assert (made.shares[0].low_pct, made.shares[0].high_pct) == pytest.approx(
        tuple(100 * bound for bound in binomial_interval(30, 100))
    )
    assert made.unidentified == 50


def test_erythroblasts_and_smudges_stand_beside_a_hundred_leukocytes() -> None:
    made = make({"round": 200, "young": 5, "broken": 9})
    assert [(ratio.name, ratio.count, ratio.ratio) for ratio in made.per_100] == [
        ("young", 5, pytest.approx(2.5)),
        ("broken", 9, pytest.approx(4.5)),
    ]
    assert made.per_100[0].low < 2.5 < (made.per_100[0].high or 0)


def test_platelets_and_red_cells_are_told_for_each_field_and_beside_the_leukocytes() -> None:
    made = make({"round": 20, "small": 30, "red": 500}, fields=10)
    assert [(ratio.name, ratio.ratio) for ratio in made.per_field] == [("platelet", 3.0), ("red-cell", 50.0)]
    assert made.red_cells_per_leukocyte is not None
    assert made.red_cells_per_leukocyte.ratio == 25


def test_unidentified_and_not_classed_are_two_things() -> None:
    made = make_differential(Tally({"unidentified": 3, "stranger": 2, "round": 1}, 1, not_classed=4), Rules(KINDS))
    assert (made.unidentified, made.not_classed, made.leukocytes) == (3, 6, 1)


def test_without_leukocytes_there_is_no_share_and_no_ratio() -> None:
    made = make({"red": 100}, fields=0)
    assert (made.shares, made.per_100, made.per_field, made.red_cells_per_leukocyte) == ((), (), (), None)


def test_nucleated_cells_are_those_with_a_nucleus_and_a_name() -> None:
    counts = {"round": 4, "young": 2, "broken": 3, "unidentified": 9}
    assert count_nucleated(counts, KINDS) == 6


def test_how_many_are_needed_follows_the_widest_share() -> None:
    assert still_needed({"round": 50, "lobed": 50}, KINDS, 0.05) == 402 - 100
    assert still_needed({"round": 500, "lobed": 500}, KINDS, 0.05) == 0
    assert still_needed({}, KINDS, 0.05) == 402
    assert still_needed({}, KINDS, None) is None
    assert still_needed({}, KINDS, 1e-5) is None


def test_goodman_can_be_asked_for() -> None:
    exact, joint = make({"round": 30, "lobed": 70}), make({"round": 30, "lobed": 70}, method="goodman")
    assert joint.shares[0].low_pct < exact.shares[0].low_pct


# ------------------------------------------------------------------------------------------------- the correction

TRUTH = {"round": 0.3, "lobed": 0.7}
CONFUSION = Confusion(
    {"round": {"round": 900, "lobed": 50, "unidentified": 50}, "lobed": {"lobed": 800, "round": 100, "missed": 100}}
)


def test_the_correction_gives_back_the_truth_from_what_is_expected_to_be_named() -> None:
    named = {"round": round(10_000 * (0.3 * 0.9 + 0.7 * 0.1)), "lobed": round(10_000 * (0.3 * 0.05 + 0.7 * 0.8))}
    corrected = correct_shares(named, CONFUSION)
    assert corrected["round"].pct == pytest.approx(30, abs=0.05)
    assert corrected["lobed"].pct == pytest.approx(70, abs=0.05)


def test_the_corrected_interval_holds_the_truth_about_as_often_as_it_says() -> None:
    draws = np.random.default_rng(5)
    rates = {"round": [0.9, 0.05, 0.05], "lobed": [0.1, 0.8, 0.1]}
    hits = 0
    for _ in range(200):
        known = {
            name: dict(zip(("round", "lobed", "missed"), draws.multinomial(300, rate).tolist(), strict=True))
            for name, rate in rates.items()
        }
        expected = [0.3 * rates["round"][n] + 0.7 * rates["lobed"][n] for n in range(3)]
        round_, lobed, _missed = draws.multinomial(200, expected)
        corrected = correct_shares({"round": int(round_), "lobed": int(lobed)}, Confusion(known))["round"]
        hits += corrected.low_pct <= 30 <= corrected.high_pct
    assert 180 <= hits <= 199  # 190 expected of 200


@pytest.mark.parametrize("seen", [(1, 0, 0, 0), (100, 0, 0, 0), (0, 0, 0, 200), (97, 3, 0, 0), (1, 1, 1, 1)])
def test_a_corrected_share_lies_within_its_own_interval(seen: tuple[int, ...]) -> None:
    """Of a sample of one class too: 100 % with an interval that ends at 99.8 % would contradict itself."""
    names = ("round", "lobed", "young", "dark")
    good = Confusion({name: {name: 300, names[n - 1]: 3} for n, name in enumerate(names)})
    for one in correct_shares(dict(zip(names, seen, strict=True)), good).values():
        assert one.low_pct <= one.pct <= one.high_pct


def test_the_same_counts_give_the_same_corrected_column() -> None:
    assert correct_shares({"round": 30, "lobed": 70}, CONFUSION) == correct_shares(
        {"round": 30, "lobed": 70}, CONFUSION
    )


@pytest.mark.parametrize(
    "confusion",
    [
        None,
        Confusion({"round": {"round": 1}}),  # a class is missing
        Confusion({"round": {"round": 1, "lobed": 1}, "lobed": {"round": 1, "lobed": 1}}),  # tells nothing apart
        Confusion({"round": {}, "lobed": {"lobed": 4}}),  # never measured
    ],
)
def test_what_cannot_be_corrected_has_no_corrected_column(confusion: Confusion | None) -> None:
    assert correct_shares({"round": 30, "lobed": 70}, confusion) == {}
    assert correct_shares({"round": 0, "lobed": 0}, CONFUSION) == {}


def test_the_corrected_column_stands_beside_the_counted_one_and_changes_nothing_in_it() -> None:
    plain, with_column = make({"round": 30, "lobed": 70}), make({"round": 30, "lobed": 70}, confusion=CONFUSION)
    assert plain.shares[0].corrected is None
    assert with_column.shares[0].corrected is not None
    assert with_column.shares[0].pct == plain.shares[0].pct


# --------------------------------------------------------------------------------------------------- the chamber


def test_a_chamber_gives_cells_for_each_microlitre_with_a_poisson_interval() -> None:
    # Four corner squares of a Neubauer chamber: 4 mm2, 0.1 mm deep, 1 + 19; the classic factor is 50.
    made = make({"round": 150}, area_um2=4e6, chamber=Chamber(depth_mm=0.1, dilution=20))
    leukocytes = made.concentrations[0]
    low, high = poisson_interval(150)
    assert leukocytes.kind == "leukocyte"
    assert (leukocytes.per_ul, leukocytes.low_per_ul, leukocytes.high_per_ul) == pytest.approx(
        (7500, 50 * low, 50 * high)
    )


def test_a_chamber_of_unknown_area_tells_no_concentration() -> None:
    assert make({"round": 150}, area_um2=None, chamber=Chamber(0.1, 20)).concentrations == ()
    assert make({"round": 150}, area_um2=4e6).concentrations == ()


# ------------------------------------------------------------------------------------------------------ reference

USUAL = ReferenceInterval("round", "adult", 20.0, 40.0, "a book")


@pytest.mark.parametrize(
    ("pct", "low", "high", "flag"),
    [
        (30, 25, 35, "within"),
        (45, 41, 50, "high"),
        (45, 39, 50, "perhaps-high"),
        (15, 10, 19, "low"),
        (15, 10, 21, "perhaps-low"),
        (40, 30, 50, "within"),
    ],
)
def test_above_surely_is_not_perhaps_above(pct: float, low: float, high: float, flag: str) -> None:
    assert judge(pct, low, high, USUAL).flag == flag


def test_shares_are_judged_by_the_row_of_the_age_band() -> None:
    tally, rules = Tally({"round": 90, "lobed": 10}, 1), Rules(KINDS, reference=(USUAL,))
    judged = make_differential(tally, rules, "adult")
    assert judged.shares[0].judgement is not None
    assert judged.shares[0].judgement.flag == "high"
    assert judged.shares[1].judgement is None
    for age_band in ("child", None):
        assert make_differential(tally, rules, age_band).shares[0].judgement is None


# ------------------------------------------------------------------------------------------------- what is shipped


def test_the_shipped_manifest_and_reference_table_know_the_same_classes() -> None:
    manifest = load_manifest(packaged_folder() / "models")
    kinds = kinds_in_order([*manifest.classifier.classes, *manifest.detector.classes], manifest.cell_kinds)
    assert set(manifest.classifier.classes) <= set(kinds)
    leukocytes = {name for name, kind in kinds.items() if kind == "leukocyte"}
    table = load_reference_intervals()
    assert {row.class_name for row in table} <= leukocytes
    assert {row.age_band for row in table} == {"newborn", "infant", "child", "adolescent", "adult", "elder"}
    assert all(row.source for row in table)
