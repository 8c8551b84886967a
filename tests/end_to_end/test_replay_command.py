"""A field that the real agent counted is analysed again, by the command, and found to be the same; or not, and why."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path

import cv2
import pytest
import yaml
from agent_process import START_S, Bench

from agent.central.database import migrate, open_database
from agent.central.store import Arrival, Store
from agent.cli import main
from agent.delivery.outbox import open_outbox
from agent.report.device import read_messages
from tests.model_folders import put_models


@pytest.fixture
def replay(bench: Bench, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[object, str]]:
    """`replay(*words) -> exit code and what was printed`."""

    def run(*words: str) -> tuple[object, str]:
        with pytest.raises(SystemExit) as ended:
            main(["replay", *words, "--config", str(bench.folder / "config.yaml")])
        said = capsys.readouterr()
        return ended.value.code, said.out + said.err

    return run


def count(bench: Bench, folder: Path) -> None:
    """Let the real agent count the pictures of a folder, to their end; no broker is there."""
    bench.use_broker(9)
    bench.use_folder(folder)
    bench.config["sample"] = {"id": "s-1"}
    agent = bench.start()
    assert agent.wait(2 * START_S) == 0, agent.log_text


def test_a_counted_sample_is_the_same_to_the_last_digit_when_it_is_analysed_again(
    bench: Bench, make_fields: Callable[..., Path], replay: Callable[..., tuple[object, str]], tmp_path: Path
) -> None:
    pictures = make_fields(4)
    bench.config["pictures"] = {"keep_mb": 20}
    count(bench, pictures)
    code, said = replay("s-1")  # found in the camera's own folder, or among the kept ones
    assert code == 0, said
    assert "identical: 4 of 4 fields the same to the last digit" in said
    assert said.count("with its place on the slide") == 4

    with open_outbox(bench.outbox_folder, device="scope", verify=False, create=False) as outbox:
        rows = list(outbox.of_topic("field", "hv/1/lab/scope/field/s-1"))
        messages = list(read_messages(outbox, "field", "hv/1/lab/scope/field/s-1"))
    assert all(len(message["frame"]["sha256"]) == 64 for message in messages)
    assert set(messages[0]["provenance"]["software"]) == {"machine", "python", "numpy", "opencv"}

    # One field, from one picture; then from another one, and from one of which a single pixel was changed.
    field_id = messages[1]["id"]
    code, said = replay(field_id, "--image", str(pictures / "field-2.png"))
    assert code == 0, said
    assert "as the models see it" in said
    code, said = replay(field_id, "--image", str(pictures / "field-3.png"))
    assert (code, "another picture" in said) == (1, True)
    pixels = cv2.imread(str(pictures / "field-2.png"))
    pixels[5, 5, 0] ^= 1
    cv2.imwrite(str(tmp_path / "touched.png"), pixels)
    assert "another picture" in replay(field_id, "--image", str(tmp_path / "touched.png"))[1]

    # The folder is gone: the device's own pictures are enough. Those are gone too: it is said where was looked.
    shutil.rmtree(pictures)
    assert replay("s-1")[0] == 0
    shutil.rmtree(bench.outbox_folder / "pictures")
    code, said = replay("s-1")
    assert (code, said.count("MISSING")) == (1, 4)
    assert "--images DIR" in said

    # What the collector has is as good as what the device has.
    url = f"sqlite:///{tmp_path}/central.db"
    engine = open_database(url)
    migrate(engine)
    now = datetime.now(timezone.utc)
    Store(engine).commit([Arrival(row.topic, row.payload, now) for row in rows])
    engine.dispose()
    code, said = replay(field_id, "--database", url, "--images", str(tmp_path))
    assert (code, "no picture with the SHA-256" in said) == (1, True)
    assert replay("scope:1:99", "--database", url)[0] == 1


def test_other_thresholds_and_other_models_are_named_with_the_cells_that_differ(
    bench: Bench, make_fields: Callable[..., Path], replay: Callable[..., tuple[object, str]], tmp_path: Path
) -> None:
    count(bench, make_fields(2))
    put_models(tmp_path / "next", "7.7")
    code, said = replay("s-1", "--models", str(tmp_path / "next"))
    assert code == 0, said  # the same files under another version: all cells are the same, and the version is told
    assert "provenance classifier.version" in said
    assert ", now 7.7" in said

    config_file = bench.folder / "config.yaml"
    config = yaml.safe_load(config_file.read_text())
    config["models"]["min_probability"] = 1.0
    config_file.write_text(yaml.safe_dump(config))
    code, said = replay("s-1", "--json")
    told = json.loads(said)
    assert code == 1
    keys = {one["key"] for field in told["fields"] for one in field["differences"]}
    assert "status" in keys
    assert {"thresholds.min_probability", "thresholds.rules_sha256", "config_sha256"} <= {
        one["key"] for field in told["fields"] for one in field["provenance"]
    }


def test_what_cannot_be_asked_is_said(bench: Bench, replay: Callable[..., tuple[object, str]]) -> None:
    (bench.folder / "config.yaml").write_text(yaml.safe_dump(bench.config))
    assert replay("../s-1")[0] == 2
    code, said = replay("s-1", "--image", "x.png")
    assert (code, "--image: is of one field" in said) == (2, True)
    code, said = replay("scope:1:1")
    assert code == 5, said  # there is no outbox yet
