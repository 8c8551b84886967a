"""A microscope that goes out of focus little by little: the alert at the broker, and the end of it."""

from __future__ import annotations

from typing import Any

import pytest
from agent_process import START_S, Bench
from test_operator import KEY, Desk, use_lively_slide

from agent.analysis.drift import FEWEST_FIELDS

SLIDES = 5
SOFT_SLIDES = 12
"""At most until the alert. With BLUR_PX it takes three, four at most: the usual focus is learnt from few small fields,
and a blur of 1.2 px lies within the limit of three in a hundred baselines."""

BLUR_PX = 1.8


def count_slide(desk: Desk, ears: Any, sid: str) -> None:
    """One sample with a few fields, from its start to its report."""
    assert desk.ask("start", sample=sid)["status"] == "ok"

    def fields(heard: list[Any]) -> int:
        return sum(one.kind == "field" and one.body["sample"] == sid for one in heard)

    ears.wait_for(lambda heard: fields(heard) >= FEWEST_FIELDS, START_S)
    assert desk.ask("stop")["status"] == "ok"
    ears.wait_for(
        lambda heard: any(
            one.kind == "differential" and one.topic.endswith(sid) and "seq" in one.body for one in heard
        ),
        START_S,
    )


def wait_ready(ears: Any, boot: int) -> None:
    def is_it(one: Any) -> bool:
        return one.kind == "state" and (one.body["state"], one.body["boot"]) == ("ready", boot)

    ears.wait_for(lambda heard: any(map(is_it, heard)), START_S)


def alerts(ears: Any) -> list[bytes]:
    """What stood on alert/drift, one after the other; empty = cleared."""
    return [one.payload for one in ears.wait_for(lambda _: True) if one.topic.endswith("/alert/drift")]


@pytest.mark.timeout(300)
def test_a_focus_that_moves_is_an_alert_until_an_operator_has_it_learnt_anew(
    bench: Bench, mosquitto: Any, subscriber: Any
) -> None:
    broker = mosquitto()
    ears = subscriber(broker, "hv/1/#")
    bench.use_broker(broker.port)
    use_lively_slide(bench)
    (bench.folder / "operator.key").write_text(f"{KEY}\n")
    bench.config["commands"] = {"operator": "key", "operator_key_file": "operator.key"}
    bench.config["sample"] = {"start": "command"}
    bench.config["drift"] = {"slides": SLIDES, "limit": 2}
    agent = bench.start()
    wait_ready(ears, boot=1)
    desk = Desk(broker, ears)
    try:
        for number in range(SLIDES + 1):
            count_slide(desk, ears, f"sharp-{number}")
        assert alerts(ears) == []

        # The usual is known after a restart; the camera is the same, and sees less sharply.
        assert agent.terminate() == 0
        use_lively_slide(bench, blur_px=BLUR_PX)
        agent = bench.start()
        wait_ready(ears, boot=2)
        for number in range(SOFT_SLIDES):
            count_slide(desk, ears, f"soft-{number}")
            if alerts(ears):
                break
        (raised,) = alerts(ears)
        assert b"the focus moved from" in raised
        assert b"hematovision ask relearn" in raised

        assert desk.ask("relearn")["code"] == "not-allowed"
        answer = desk.ask("relearn", key=KEY, by="op-1")
        assert (answer["status"], answer["data"]) == ("ok", {"slides": SLIDES})
        ears.wait_for(
            lambda heard: any(one.topic.endswith("/alert/drift") and not one.payload for one in heard), START_S
        )
        assert alerts(ears) == [raised, b""]
    finally:
        desk.close()
    assert agent.terminate() == 0
    assert "Traceback" not in agent.log_text
