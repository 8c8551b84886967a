"""No secret leaves the agent: not in its log, its messages, its files or the list of processes."""

from __future__ import annotations

import contextlib
import http.client
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from agent_process import START_S, Bench, wait_until

SECRETS = {
    "broker": "tops3cret-of-the-broker",
    "camera": "tops3cret-of-the-camera",
    "page": "tops3cret-of-the-page",
}


def holds_secret(content: bytes) -> bool:
    return any(secret.encode() in content for secret in SECRETS.values())


def command_lines() -> bytes:
    """Those of all processes, ours and everybody's children, now."""
    found = b""
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):  # it has ended
            found += file.read_bytes() + b"\n"
    return found


def test_no_secret_is_in_the_log_the_messages_the_outbox_or_the_list_of_processes(
    bench: Bench,
    make_fields: Callable[..., Path],
    mosquitto: Any,
    mosquitto_password_file: Callable[[str, str], Path],
    subscriber: Any,
) -> None:
    """With the right password, then with one that the broker refuses: both ways have words of their own."""
    users = mosquitto_password_file("scope", SECRETS["broker"])
    open_door = "listener {ears} 127.0.0.1\nallow_anonymous true"
    ears_port = mosquitto(start=False).port
    broker = mosquitto(
        "per_listener_settings true\nlistener {port} 127.0.0.1\nallow_anonymous false\n"
        f"password_file {users}\n" + open_door.replace("{ears}", str(ears_port)),
        listener=False,
    )
    door = type("Door", (), {"host": "127.0.0.1", "port": ears_port})
    ears = subscriber(door, "#")
    password = bench.folder / "password"
    password.touch(mode=0o600)
    password.write_text(SECRETS["broker"] + "\n")
    bench.use_broker(broker.port, username="scope", password_file=str(password))
    bench.use_folder(make_fields(2), watch=True, settle_s=0)
    bench.config["log"] = {"level": "debug"}
    page_port = mosquitto(start=False).port
    (bench.folder / "page-password").touch(mode=0o600)
    (bench.folder / "page-password").write_text(SECRETS["page"] + "\n")
    bench.config["web"] = {"enabled": True, "port": page_port, "password_file": "page-password"}

    agent = bench.start(HEMATOVISION_CAMERA_PASSWORD=SECRETS["camera"])
    ears.wait_for(lambda heard: sum(m.kind == "field" for m in heard) == 2, START_S)
    ears.wait_for(lambda heard: any(m.kind == "health" for m in heard), START_S)
    assert not holds_secret(command_lines())
    for password_of_page, status in ((SECRETS["page"], 200), ("another one", 403)):
        connection = http.client.HTTPConnection("127.0.0.1", page_port, timeout=START_S)
        own = {"Origin": f"http://127.0.0.1:{page_port}"}
        connection.request("POST", "/login", json.dumps({"password": password_of_page}), own)
        answer = connection.getresponse()
        assert answer.status == status
        assert not holds_secret(str(answer.headers).encode() + answer.read())
        connection.close()
    broker.stop()
    password.write_text(SECRETS["camera"] + "\n")
    broker.start()
    wait_until(lambda: "broker refused" in agent.log_text, "the broker refuses the other password")
    assert not holds_secret(command_lines())
    assert agent.terminate() == 0

    assert "broker connected" in agent.log_text
    assert not holds_secret(agent.log_text.encode())
    assert not any(holds_secret(message.topic.encode() + message.payload) for message in ears.messages)
    for file in bench.outbox_folder.rglob("*"):
        assert not file.is_file() or not holds_secret(file.read_bytes()), file
    assert holds_secret(password.read_bytes()), "what is looked for can be found"
