"""A cell's looks in words."""

from __future__ import annotations

from agent.analysis.morphology import describe
from agent.domain import Attribute

PHRASES = ("{nucleus} nucleus", "{colour} {kind} granules", "{vacuoles}")
WORDS = {
    "nucleus": {"segmented-bilobed": "bilobed"},
    "kind": {"nil": None},
    "vacuoles": {"no": None, "yes": "vacuoles"},
}


def looks(probability: float = 0.9, **values: str) -> dict[str, Attribute]:
    found = {"nucleus": "segmented-bilobed", "colour": "red", "kind": "coarse", "vacuoles": "no"} | values
    return {name: Attribute(value, probability) for name, value in found.items()}


def test_phrases_stand_in_order_with_the_words_for_their_values() -> None:
    assert describe(looks(vacuoles="yes"), PHRASES, WORDS) == "bilobed nucleus, red coarse granules, vacuoles"


def test_a_value_without_a_word_leaves_its_phrase_out() -> None:
    assert describe(looks(kind="nil"), PHRASES, WORDS) == "bilobed nucleus"


def test_what_is_unsure_is_not_said() -> None:
    assert describe(looks(probability=0.5), PHRASES, WORDS) == ""
    unsure = {**looks(), "colour": Attribute("red", 0.4)}
    assert describe(unsure, PHRASES, WORDS) == "bilobed nucleus"


def test_a_model_that_says_nothing_gets_no_words() -> None:
    assert describe({}, PHRASES, WORDS) == ""
