"""A cell's looks in a haematologist's words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from string import Formatter

from agent.domain import Attribute

SURE = 0.6
"""An attribute that is told with less is not put into words."""


def describe(
    morphology: Mapping[str, Attribute], phrases: Sequence[str], words: Mapping[str, Mapping[str, str | None]]
) -> str:
    """A text like "bilobed nucleus, red coarse granules"; empty where nothing is sure.

    phrases, words: from the manifest. A phrase is left out where one of its attributes is unsure or has no word.
    """
    return ", ".join(told for phrase in phrases if (told := _say(phrase, morphology, words)) is not None)


def _say(phrase: str, morphology: Mapping[str, Attribute], words: Mapping[str, Mapping[str, str | None]]) -> str | None:
    said = {}
    for _, name, _, _ in Formatter().parse(phrase):
        if name:
            attribute = morphology.get(name)
            if attribute is None or attribute.probability < SURE:
                return None
            word = words.get(name, {}).get(attribute.value, attribute.value)
            if word is None:
                return None
            said[name] = word
    return phrase.format_map(said)
