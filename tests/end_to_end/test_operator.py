"""Commands over a real broker to the real agent: operators' keys, exchanged models, power cuts in a sample."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from datetime import datetime, timezone
from typing import Any

import paho.mqtt.client as mqtt
import pytest
import yaml
from agent_process import START_S, Bench, wait_until
from ledger import Ledger

from agent.cli import main
from agent.delivery.audit import verify
from agent.delivery.commands import sign
from tests.model_folders import put_models
from tests.slides import small_slide

BASE = "hv/1/lab/scope"
KEY = "0123456789abcdef0123456789abcdef"


class Desk:
    """Sends commands and hears the replies."""

    def __init__(self, broker: Any, ears: Any) -> None:
        self.ears = ears
        self._asked = 0
        self._client = mqtt.Client(mqtt.CallbackAPIVersion.VERSION2, protocol=mqtt.MQTTv5)
        self._client.connect(broker.host, broker.port)
        self._client.loop_start()

    def ask(self, name: str, *, key: str | None = None, **body: Any) -> dict[str, Any]:
        self._asked += 1
        sent = {"transaction": f"desk-{self._asked}", "at": datetime.now(timezone.utc).isoformat(), **body}
        if key is not None:
            sent["auth"] = sign(name, sent, BASE, key.encode())
        self._client.publish(f"{BASE}/cmd/{name}", json.dumps(sent), qos=1).wait_for_publish(10)

        def is_it(message: Any) -> bool:
            return message.kind == "reply" and message.body["transaction"] == sent["transaction"]

        messages = self.ears.wait_for(lambda heard: any(map(is_it, heard)), START_S)
        return dict(next(filter(is_it, messages)).body)

    def close(self) -> None:
        self._client.disconnect()
        self._client.loop_stop()


def use_lively_slide(bench: Bench, **keys: Any) -> None:
    bench.config["camera"] = small_slide(interval_s=0.2, nucleated_cells_per_field=3, **keys)


def version_in(message: Any) -> str:
    return str(message.body["provenance"]["classifier"]["version"])


def wait_fields(ears: Any, is_it: Callable[[Any], bool]) -> None:
    since = len(ears.messages)
    ears.wait_for(lambda heard: any(one.kind == "field" and is_it(one) for one in heard[since:]), START_S)


def test_an_operator_exchanges_the_models_and_the_configuration_and_nobody_else_does(
    bench: Bench, mosquitto: Any, subscriber: Any
) -> None:
    broker = mosquitto()
    ears = subscriber(broker, "hv/1/#")
    bench.use_broker(broker.port)
    use_lively_slide(bench)
    (bench.folder / "operator.key").write_text(f"{KEY}\n")
    bench.config["commands"] = {"operator": "key", "operator_key_file": "operator.key"}
    put_models(bench.outbox_folder / "models" / "staging" / "next", "7.7")
    agent = bench.start()
    wait_fields(ears, lambda _one: True)
    desk = Desk(broker, ears)
    try:
        assert desk.ask("model.stage", folder="next")["code"] == "not-allowed"
        assert desk.ask("model.stage", key="x" * 32, folder="next")["code"] == "not-allowed"
        assert desk.ask("model.activate", key=KEY)["code"] == "no-models"
        assert desk.ask("model.stage", key=KEY, folder="next")["status"] == "ok"
        assert desk.ask("model.activate", key=KEY)["status"] == "ok"
        wait_fields(ears, lambda one: version_in(one) == "7.7")

        # The next start counts with them too.
        assert agent.terminate() == 0
        agent = bench.start()
        wait_fields(ears, lambda one: version_in(one) == "7.7")
        assert desk.ask("model.rollback", key=KEY)["status"] == "ok"
        wait_fields(ears, lambda one: version_in(one) != "7.7")

        # The configuration: a faulty one is refused, a good one is in force.
        config_file = bench.folder / "config.yaml"
        good = yaml.safe_load(config_file.read_text())
        config_file.write_text(yaml.safe_dump({**good, "quality": {"min_brightness": "very"}}))
        failed = desk.ask("reload", key=KEY)
        assert (failed["status"], "quality.min_brightness" in failed["message"]) == ("failed", True)
        config_file.write_text(yaml.safe_dump({**good, "models": {"threads": 1, "min_probability": 1.0}}))
        assert desk.ask("reload", key=KEY)["data"]["changed"] == ["models.min_probability"]
        wait_fields(ears, lambda one: all(c["status"] != "accepted" for c in one.body["cells"] if c["probabilities"]))
    finally:
        desk.close()
    assert agent.terminate() == 0
    ledger = Ledger(ears.messages)
    ledger.check_numbers()
    lines = [json.dumps(entry) for entry in ledger.audit.values()]
    assert verify(lines).is_sound
    done = Counter((entry["action"], entry["outcome"]) for entry in ledger.audit.values())
    assert done["cmd.model.stage", "refused"] == 2
    assert (
        done["cmd.model.stage", "done"] == done["cmd.model.activate", "done"] == done["cmd.model.rollback", "done"] == 1
    )
    assert done["cmd.reload", "failed"] == done["cmd.reload", "done"] == 1
    assert done["work-changed", "done"] >= 1
    told = {info["models"][1]["version"] for info in ledger.infos}
    assert "7.7" in told
    assert "Traceback" not in agent.log_text


def test_a_sample_that_is_cut_by_sigkill_again_and_again_ends_with_every_cell_counted_once(
    bench: Bench, mosquitto: Any, subscriber: Any
) -> None:
    broker = mosquitto("max_queued_messages 0")
    ears = subscriber(broker, "hv/1/#")
    bench.use_broker(broker.port)
    use_lively_slide(bench)
    bench.config["sample"] = {"start": "command"}
    agent = bench.start()
    ears.wait_for(lambda heard: any(one.kind == "state" and one.body["state"] == "ready" for one in heard), START_S)
    desk = Desk(broker, ears)
    try:
        begun = desk.ask("start", sample="s-1", accession="A-1", age_band="adult", stop_at_cells=40)
        assert begun["status"] == "ok"
        for _ in range(3):
            wait_fields(ears, lambda _one: True)
            agent.kill()
            agent = bench.start()
        ears.wait_for(
            lambda heard: any(one.kind == "differential" and one.payload and "seq" in one.body for one in heard),
            2 * START_S,
        )
        wait_until(lambda: bench.waiting() == {}, "everything is sent")
        assert desk.ask("ping")["data"]["phase"] == "finished"
    finally:
        desk.close()
    assert agent.terminate() == 0
    ledger = Ledger(ears.messages)
    ledger.check_numbers()
    ledger.check_cells()
    (report,) = ledger.reports.values()
    counted: Counter[str] = Counter()
    for field in ledger.fields.values():
        counted.update(field["unique_counts"])
    assert report["counts"] == dict(+counted), "the report is the sum of all fields, none lost and none twice"
    assert report["fields"] == len(ledger.fields)
    assert report["nucleated"] >= 40
    assert (report["status"], report["accession"]) == ("final", "A-1")
    assert {field["sample"] for field in ledger.fields.values()} == {"s-1"}


def test_a_person_asks_from_the_command_line(
    bench: Bench, mosquitto: Any, subscriber: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    broker = mosquitto()
    ears = subscriber(broker, "hv/1/#")
    bench.use_broker(broker.port)
    use_lively_slide(bench)
    key_file = bench.folder / "operator.key"
    key_file.write_text(f"{KEY}\n")
    bench.config["commands"] = {"operator": "key", "operator_key_file": "operator.key"}
    bench.config["sample"] = {"start": "command"}
    bench.start()
    config_file = bench.folder / "config.yaml"

    def ask(*arguments: str) -> tuple[object, Any, str]:
        """Exit code, reply, what was said on standard error."""
        with pytest.raises(SystemExit) as ended:
            main(["ask", *arguments, "--config", str(config_file)])
        said = capsys.readouterr()
        return ended.value.code, json.loads(said.out or "null"), said.err

    ears.wait_for(lambda heard: any(one.kind == "state" and one.body["state"] == "ready" for one in heard), START_S)
    code, reply, err = ask("start", "sample=s-17", "accession=00123", "stop_at_cells=200", "by=tech-4")
    assert code == 0, err
    assert reply["data"] == {"sample": "s-17", "phase": "running", "fields": 0}
    code, reply, _ = ask("pause", "sample=other")
    assert (code, reply["code"]) == (1, "other-sample")
    assert ask("reload")[1]["code"] == "not-allowed"
    code, reply, _ = ask("reload", "--key-file", str(key_file))
    assert (code, reply["data"]["changed"]) == (0, [])
    code, _, err = ask("dance")
    assert (code, "known are amend" in err) == (1, True)
    code, _, err = ask("ping", "colour")
    assert (code, "write KEY=VALUE" in err) == (1, True)
    config_file.write_text(yaml.safe_dump({**bench.config, "device": "nobody"}))
    code, _, err = ask("ping", "--timeout", "1")
    assert (code, "lab/nobody has not answered within 1 s" in err) == (6, True)


def test_while_the_self_test_fails_nothing_is_counted_until_the_answers_are_there(
    bench: Bench, mosquitto: Any, subscriber: Any
) -> None:
    broker = mosquitto()
    ears = subscriber(broker, "hv/1/#")
    bench.use_broker(broker.port)
    use_lively_slide(bench)
    folder = bench.folder / "mine"
    put_models(folder, "7.7")
    (folder / "golden.json").rename(folder / "kept.json")
    bench.config["models"]["folder"] = str(folder)
    agent = bench.start()
    ears.wait_for(
        lambda heard: (
            any(one.topic.endswith("alert/self-test-failed") for one in heard)
            and any(one.kind == "event" and one.body["kind"] == "self-test-failed" for one in heard)
        ),
        START_S,
    )
    words = next(one.body["message"] for one in ears.messages if one.topic.endswith("alert/self-test-failed"))
    assert "no known answers" in words
    assert "--make-answers" in words
    assert "ready" not in [one.body["state"] for one in ears.messages if one.kind == "state" and one.payload]
    assert not any(one.kind == "field" for one in ears.messages)
    (folder / "kept.json").rename(folder / "golden.json")
    desk = Desk(broker, ears)
    try:
        assert desk.ask("selftest")["status"] == "ok"
    finally:
        desk.close()
    wait_fields(ears, lambda _one: True)
    ears.wait_for(
        lambda heard: any(one.topic.endswith("alert/self-test-failed") and not one.payload for one in heard), START_S
    )
    assert agent.terminate() == 0
