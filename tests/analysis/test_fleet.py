"""One device beside the others: who stands out, and who cannot be judged."""

from __future__ import annotations

from dataclasses import replace

import pytest

from agent.analysis.fleet import FEWEST_DEVICES, FleetDevice, Standing, WatchedFigure, compare_fleet, standing_words


def make_device(name: str, models: str = "m", **figures: float) -> FleetDevice:
    """The figures by name, with `_` for `-`; each by chance within 2 % of what it is."""
    watched = {
        key.replace("_", "-"): WatchedFigure(value, value * 0.98, value * 1.02) for key, value in figures.items()
    }
    return FleetDevice(("lab", name), models, watched)


def make_fleet(*grounds: float) -> list[FleetDevice]:
    return [make_device(f"scope-{number}", ground_red=value) for number, value in enumerate(grounds)]


def of(device: str, fleet: list[FleetDevice], **before: list[str]) -> Standing:
    (one,) = compare_fleet(fleet, {("lab", name): names for name, names in before.items()})["lab", device]
    return one


def test_the_odd_one_stands_out_and_the_others_do_not() -> None:
    fleet = make_fleet(1.90, 1.10, 1.11, 1.09, 1.10)
    odd = of("scope-0", fleet)
    assert (odd.stands_out, odd.devices, odd.here) == (True, 4, 1.9)
    assert odd.others == pytest.approx(1.10)
    assert odd.low is not None
    assert odd.high is not None
    assert odd.low == pytest.approx(1.10 / 1.05**8.75)
    assert odd.high == pytest.approx(1.10 * 1.05**8.75)
    assert not any(of(f"scope-{number}", fleet).stands_out for number in range(1, 5))


def test_a_second_odd_device_does_not_hide_the_first() -> None:
    fleet = make_fleet(1.80, 1.75, 1.10, 1.11, 1.09, 1.10, 1.10, 1.09)
    assert of("scope-0", fleet).stands_out
    assert of("scope-1", fleet).stands_out
    assert not of("scope-2", fleet).stands_out


def test_of_three_devices_nobody_is_judged() -> None:
    fleet = make_fleet(9.0, 1.1, 1.1)
    assert len(fleet) == FEWEST_DEVICES - 1
    assert of("scope-0", fleet) == Standing("ground-red", 9.0, 2)
    assert standing_words(compare_fleet(fleet)["lab", "scope-0"]) is None


def test_where_devices_differ_anyway_more_is_asked_for() -> None:
    assert not of("scope-0", make_fleet(1.50, 1.00, 1.15, 1.30, 1.10, 0.95)).stands_out


def test_what_lies_within_the_chance_of_its_own_slides_does_not_stand_out() -> None:
    fleet = make_fleet(1.90, 1.10, 1.11, 1.09, 1.10)
    restless = replace(fleet[0], figures={"ground-red": WatchedFigure(1.9, 0.9, 3.5)})
    assert not of("scope-0", [restless, *fleet[1:]]).stands_out


def test_who_stood_out_does_so_until_it_is_well_back() -> None:
    fleet = make_fleet(1.50, 1.10, 1.11, 1.09, 1.10)
    assert not of("scope-0", fleet).stands_out
    assert of("scope-0", fleet, **{"scope-0": ["ground-red"]}).stands_out
    assert not of("scope-0", make_fleet(1.15, 1.10, 1.11, 1.09, 1.10), **{"scope-0": ["ground-red"]}).stands_out


def test_what_the_models_say_is_compared_among_devices_with_the_same_models_only() -> None:
    fleet = [make_device(f"scope-{number}", confidence=value) for number, value in enumerate((70, 95, 95, 94, 95))]
    assert of("scope-0", fleet).stands_out
    fleet[0] = replace(fleet[0], models="others")
    assert of("scope-0", fleet) == Standing("confidence", 70, 0)
    optics = [replace(one, models=f"model {number}") for number, one in enumerate(make_fleet(2.0, 1.1, 1.1, 1.1))]
    assert of("scope-0", optics).stands_out


def test_focus_is_not_compared() -> None:
    assert compare_fleet([make_device(str(number), focus=50.0 * number) for number in range(1, 7)])["lab", "6"] == ()


def test_shares_are_compared_as_angles_and_told_in_per_cent() -> None:
    name = {"share_band": 3.0}
    fleet = [make_device("odd", share_band=40.0), *(make_device(f"s{number}", **name) for number in range(5))]
    odd = of("odd", fleet)
    assert odd.stands_out
    assert odd.others == pytest.approx(3.0)
    words = standing_words([odd]) or ""
    assert words.startswith("the share of band among the named nucleated cells is 40 % here, 3 % on 5 others")
    assert "ask first whether the patients" in words
