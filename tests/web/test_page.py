"""The page over real sockets, beside a pipeline with a real desk and outbox."""

from __future__ import annotations

import json
import logging
import re
import socket
import ssl
import time
from collections.abc import Callable
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest

from agent.config import WebSection
from agent.delivery.commands import COMMANDS as KINDS_OF_COMMAND
from agent.delivery.reports import Alert
from agent.domain import SampleState
from agent.errors import ConfigError, OutboxError
from agent.review import CROPS_FOLDER, CropStore
from agent.web import page as page_module
from agent.web.handlers import ROUTES
from agent.web.page import MOST_CONNECTIONS, Page
from tests.frames import make_frame
from tests.web.beside import Beside, count

Make = Callable[..., Beside]
PASSWORD = "the page's own password"
OPEN_ROUTES = (("GET", "/"), ("GET", "/static/main.js"), ("POST", "/login"), ("POST", "/logout"))
CLOSED_ROUTES = (
    *(("GET", path) for path in ("/api/state", "/api/frame/1.jpg", "/api/review", "/api/map", "/api/crop/s-1/s-1-1")),
    *(("POST", path) for path in ("/api/command/start", "/api/picture")),
    ("GET", "/api/picture/0123456789abcdef.jpg"),
)


# --------------------------------------------------------------------------------------------------- what is watched


def test_the_state_tells_the_newest_field_its_cells_and_the_counts(beside: Make) -> None:
    one = beside(sample=SampleState("s-1", target_cells=5))
    assert one.state()["frame"] is None
    count(one, 1, 2)
    state = one.state()
    frame, sample, differential = state["frame"], state["sample"], state["differential"]
    assert (frame["is_counted"], frame["reason"], frame["size_px"], frame["sample"]) == (True, None, [64, 48], "s-1")
    assert [(cell["class"], cell["status"], cell["is_small"]) for cell in frame["cells"]] == [
        ("round", "accepted", False),
        ("red", "accepted", True),
    ]
    assert (sample["phase"], sample["fields"], sample["nucleated"], sample["stop_at"]["cells"]) == ("running", 2, 2, 5)
    assert (differential["leukocytes"], differential["status"]) == (2, "preliminary")
    assert state["chart"].startswith("<svg")
    assert state["answers"] == ["round", "lobed", "red", "unidentified", "artefact"], "from the manifest, and the two"
    assert len({one["colour"] for one in state["classes"]}) == 3
    picture = one.get(f"/api/frame/{frame['number']}.jpg")
    assert (picture.status, picture.content[:2]) == (200, b"\xff\xd8")
    assert one.get("/api/frame/999.jpg").status == 404


def test_a_refused_frame_is_shown_with_its_reason_and_a_stage_that_stands_keeps_the_field_in_sight(
    beside: Make,
) -> None:
    one = beside(sample=SampleState("s-1"))
    count(one, 1)
    field = one.state()["frame"]
    assert one.place.frames.put_waiting(make_frame(3, pixels=0 * make_frame(3).pixels_bgr), 5)
    one.wait_until(lambda: one.place.pipeline.sample.refused == {"dark": 1})
    refused = one.state()["frame"]
    assert (refused["is_counted"], refused["reason"], refused["cells"]) == (False, "dark", [])
    assert "lamp" in refused["words"]
    assert refused["number"] == field["number"] + 1
    assert one.place.frames.put_waiting(make_frame(4, pixels=make_frame(1).pixels_bgr, repeats_last=True), 5)
    one.wait_until(lambda: one.place.pipeline.sample.refused.get("frozen") == 1)
    frozen = one.state()["frame"]
    assert (frozen["reason"], frozen["number"], len(frozen["cells"])) == ("frozen", field["number"], 2)


def test_a_finished_sample_frames_without_one_and_alerts_are_told(beside: Make) -> None:
    one = beside()
    since = datetime(2026, 11, 27, 8, tzinfo=timezone.utc)
    one.alerts = (Alert("disk-low", "warning", "the disk is nearly full", since),)
    count(one, 1)
    state = one.state()
    assert (state["sample"], state["differential"], state["chart"], state["may"]) == (None, None, None, ["start"])
    assert (state["frame"]["reason"], state["frame"]["is_counted"]) == ("no-sample", False)
    assert state["alerts"][0]["message"] == "the disk is nearly full"
    assert state["health"]["state"] == "ready"


def test_the_map_takes_in_each_field_once_and_begins_anew_with_another_sample(
    beside: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("agent.web.reading.MAP_FRESH_S", 0)
    monkeypatch.setattr("agent.web.mapping.FIELDS_AT_ONCE", 2)
    one = beside(sample=SampleState("s-1"))
    assert one.get("/api/map").body["fields"] == 0
    count(one, 1, 2, 3)
    assert [one.get("/api/map").body["fields"] for _ in range(3)] == [2, 3, 3], "a long sample comes in portions"
    told = one.get("/api/map").body
    assert (told["sample"], told["is_full"]) == ("s-1", False)
    assert sum(part["fields"] for part in told["parts"]) + told["unknown_places"] == 3
    assert all(part["svg"].startswith("<svg") for part in told["parts"])
    one.command("stop", "t-1")
    one.wait_until(lambda: one.place.phase == "finished")
    one.command("start", "t-2", sample="s-2")
    assert (one.get("/api/map").body["sample"], one.get("/api/map").body["fields"]) == ("s-2", 0)
    monkeypatch.setattr("agent.web.mapping.MOST_FIELDS", 1)
    count(one, 4, 5)
    assert (one.get("/api/map").body["fields"], one.get("/api/map").body["is_full"]) == (1, True)


def test_a_counting_that_stands_still_is_told_while_the_page_itself_answers(beside: Make) -> None:
    one = beside(start=False)
    one.start(with_pipeline=False)
    one.state()
    time.sleep(0.7)
    assert one.state()["still_s"] >= 0.5


def test_looking_on_changes_nothing(beside: Make) -> None:
    one = beside(sample=SampleState("s-1"))
    count(one, 1, 2)
    one.wait_until(lambda: one.place.pipeline.sample.fields == 2)
    before = [(row.stream, row.payload) for row in one.outbox.pending(0, 1000)]
    picture = f"/api/frame/{one.state()['frame']['number']}.jpg"
    for path in ("/", "/api/state", "/api/review", "/api/map", picture, "/static/main.js", "/static/page.css"):
        assert one.get(path).status == 200, path
    assert [(row.stream, row.payload) for row in one.outbox.pending(0, 1000)] == before


def head(one: Beside, path: str, **headers: str) -> str:
    """All that is sent in answer to a HEAD: read from the socket, for a client leaves out what should not be there."""
    sent = {"Host": f"127.0.0.1:{one.section.port}", "Connection": "close", **headers}
    lines = [f"HEAD {path} HTTP/1.1", *(f"{name}: {value}" for name, value in sent.items()), "", ""]
    with socket.create_connection(("127.0.0.1", one.section.port), 10) as client:
        client.sendall("\r\n".join(lines).encode())
        return b"".join(iter(lambda: client.recv(4096), b"")).decode()


def test_a_head_is_answered_as_a_get_without_its_body(beside: Make) -> None:
    one = beside(sample=SampleState("s-1"))
    for path in ("/", "/static/main.js", "/static/page.css", "/api/review", "/api/frame/1.jpg", "/nothing"):
        got, said = one.get(path), head(one, path)
        status, *lines = said.removesuffix("\r\n\r\n").split("\r\n")
        assert (said.endswith("\r\n\r\n"), status.split()[1]) == (True, str(got.status)), path
        of_its_own = ("Date: ", "Connection: ")
        assert [line for line in lines if not line.startswith(of_its_own)] == [
            f"{name}: {value}" for name, value in got.headers.items() if name != "Date"
        ], path


def test_a_head_passes_the_same_guard_as_a_get(beside: Make) -> None:
    one = beside(PASSWORD)
    assert head(one, "/", Host="evil.example").startswith("HTTP/1.1 421 ")
    assert head(one, "/api/state").startswith("HTTP/1.1 401 ")
    assert head(one, "/login").startswith("HTTP/1.1 405 "), "there is no GET"
    assert one.ask("DELETE", "/").status == 403, "what is not known to change nothing comes from the page alone"


# ------------------------------------------------------------------------------------------------ driving a sample


def test_a_sample_is_driven_from_the_page_and_audited_as_over_the_broker(beside: Make) -> None:
    one = beside()
    begun = one.command("start", "t-1", sample="s-9", accession="A-7", age_band="child", stop_at_cells=100, by="mtl-7")
    assert (begun.status, begun.body["status"], begun.body["data"]["phase"]) == (200, "ok", "running")
    assert one.state()["may"] == ["pause", "stop", "abort"]
    assert one.command("pause", "t-2", by="mtl-7").body["data"]["phase"] == "paused"
    assert one.state()["may"] == ["resume", "stop", "abort"]
    assert one.command("resume", "t-3").body["data"]["phase"] == "running"
    assert one.command("stop", "t-4").body["data"]["phase"] == "finishing"
    one.wait_until(lambda: one.place.phase == "finished")
    entries = one.place.messages("audit")
    assert [(entry["action"], entry["outcome"], entry["by"]) for entry in entries] == [
        ("cmd.start", "done", "mtl-7"),
        ("cmd.pause", "done", "mtl-7"),
        ("cmd.resume", "done", None),
        ("cmd.stop", "done", None),
    ]
    assert one.state()["sample"]["accession"] == "A-7"
    assert one.place.replies == [], "nobody at the broker has asked"


def test_what_the_start_form_says_of_empty_fields_is_what_the_desk_does(beside: Make) -> None:
    """The other half is in test_desk.py: a start without them takes the configured age band and limits."""
    form = beside().get("/").content.decode().partition('id="start-form"')[2].partition("</form>")[0]
    assert '<option value="">as configured</option>' in form
    assert re.findall(r'name="stop_at_\w+" .*placeholder="([^"]*)"', form) == ["as configured"] * 2
    assert "never taken from the configuration" in form


def test_the_same_transaction_again_is_answered_and_not_done_again(beside: Make) -> None:
    one = beside()
    first = one.command("start", "t-1", sample="s-9").body
    again = one.command("start", "t-1", sample="s-9").body
    assert (again["message"], again["repeated"], first["repeated"]) == (first["message"], True, False)
    assert len(one.place.messages("audit")) == 1


def test_what_the_state_does_not_allow_is_refused_with_what_would_be_possible(beside: Make) -> None:
    one = beside()
    refused = one.command("pause").body
    assert (refused["status"], refused["code"]) == ("refused", "not-now")
    assert "possible now: start" in refused["message"]
    unread = one.ask("POST", "/api/command/start", b"{not json").body
    assert (unread["status"], unread["code"]) == ("refused", "not-json")
    named = one.command("start", "t-2", accession="Jane Doe").body
    assert (named["status"], named["code"]) == ("refused", "bad-request")


def test_an_operators_command_never_comes_from_the_page(beside: Make) -> None:
    """With `operator: broker` the desk takes whatever arrives for an operator's: the broker's rights have decided."""
    one = beside()
    operators = [name for name, kind in KINDS_OF_COMMAND.items() if kind.role == "operator"]
    assert len(operators) >= 5
    for name in (*operators, "selftest", "fly"):
        assert one.command(name).status == 404, name
    assert one.place.messages("audit") == []


def test_while_no_command_is_taken_the_page_says_so(beside: Make) -> None:
    one = beside()
    one.is_taking = False
    answer = one.command("start")
    assert answer.status == 503
    assert "no command is taken" in answer.words


# ------------------------------------------------------------------------------------------------------- the review


def test_an_answer_amends_is_kept_beside_the_others_and_audited(beside: Make) -> None:
    one = beside(sample=SampleState("s-1"))
    count(one, 1)
    listed = one.get("/api/review").body
    assert (listed["open"], listed["answered"]) == (1, 0)
    (cell,) = listed["cells"]
    assert (cell["cell_id"], cell["class"], cell["probability"], cell["reason"]) == (
        "s-1-1",
        "round",
        0.75,
        "low-margin",
    )
    assert one.get("/api/crop/s-1/s-1-1").status == 404
    CropStore(one.folder / CROPS_FOLDER).put("s-1", "s-1-1", b"\xff\xd8 a picture \xff\xd9")
    assert one.get("/api/crop/s-1/s-1-1").content == b"\xff\xd8 a picture \xff\xd9"

    def answer(transaction: str, name: str, by: str | None) -> dict[str, Any]:
        words = {"sample": "s-1", "cell_id": "s-1-1", "class": name, **({"by": by} if by else {})}
        return dict(one.command("amend", transaction, **words).body)

    assert answer("t-1", "lobed", None)["code"] == "bad-request", "an answer says who gives it"
    assert answer("t-2", "unicorn", "mtl-7")["code"] == "unknown-class"
    assert answer("t-3", "lobed", "mtl-7")["status"] == "ok"
    assert answer("t-4", "round", "mtl-8")["status"] == "ok"
    listed = one.get("/api/review").body
    assert (listed["open"], listed["answered"]) == (0, 1)
    given = [(said["person"], said["by"]) for said in listed["cells"][0]["answers"]]
    assert given == [("lobed", "mtl-7"), ("round", "mtl-8")]
    assert [entry["outcome"] for entry in one.place.messages("audit")] == ["refused", "refused", "done", "done"]
    assert one.state()["sample"]["amendments"] == 2


def test_the_cells_of_the_sample_that_was_begun_last_are_listed_first_whatever_its_name(
    beside: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("agent.web.views.MOST_REVIEW_CELLS", 2)
    one = beside()
    for number, sid in enumerate(("s-9", "s-10", "a-1"), start=1):
        one.command("start", f"start-{number}", sample=sid)
        count(one, number)
        if sid != "a-1":
            one.command("stop", f"stop-{number}", sample=sid)
            one.wait_until(lambda: one.state()["sample"]["phase"] == "finished")
    listed = one.get("/api/review").body
    assert (listed["open"], [cell["sample"] for cell in listed["cells"]]) == (3, ["a-1", "s-10"])


def test_a_crop_lies_in_the_folder_of_crops_or_nowhere(beside: Make) -> None:
    one = beside()
    CropStore(one.folder / CROPS_FOLDER).put("s-1", "s-1-1", b"\xff\xd8 for the page \xff\xd9")
    CropStore(one.folder).put("secrets", "s-1-1", b"\xff\xd8 not for the page \xff\xd9")
    for place in ("..%2fsecrets/s-1-1", "../secrets/s-1-1", "s-1/..", "s-1/%2e%2e%2fsecrets%2fs-1-1", "S_1/x"):
        assert one.get(f"/api/crop/{place}").status == 404, place


def test_a_review_list_that_cannot_be_read_is_an_answer_and_read_again(
    beside: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = beside()

    def fail(*_read: object) -> None:
        raise OutboxError("the disk does not answer")

    with monkeypatch.context() as broken:
        broken.setattr("agent.web.reading.review_body", fail)
        answer = one.get("/api/review")
    assert (answer.status, answer.words) == (503, "the review list cannot be read now: the disk does not answer")
    assert one.get("/api/review").body["open"] == 0


# ------------------------------------------------------------------------------------------------------ who is let in


def test_every_answer_forbids_what_a_page_could_be_made_to_do(beside: Make) -> None:
    one = beside()
    for method, path in (
        *OPEN_ROUTES,
        ("GET", "/nothing"),
        ("DELETE", "/"),
        ("POST", "/api/command/fly"),
        *CLOSED_ROUTES,
    ):
        headers = one.ask(method, path, b"{}" if method == "POST" else None).headers
        policy = headers["Content-Security-Policy"]
        assert policy.startswith("default-src 'none'"), path
        assert "unsafe" not in policy
        assert "frame-ancestors 'none'" in policy
        assert (headers["X-Content-Type-Options"], headers["Referrer-Policy"]) == ("nosniff", "no-referrer")
        assert headers["Cross-Origin-Resource-Policy"] == "same-origin"
        assert "Access-Control-Allow-Origin" not in headers
        assert "Tornado" not in headers["Server"]


def test_under_a_foreign_name_nothing_is_answered(beside: Make) -> None:
    one = beside(names="scope.lab")
    host = "evil.example"
    for method, path in (*OPEN_ROUTES, *CLOSED_ROUTES):
        answer = one.ask(method, path, b"{}" if method == "POST" else None, Host=host, Origin=f"http://{host}")
        assert answer.status == 421, path
        assert "web.names" in answer.words
    assert one.get("/api/state", Host="scope.lab:8080").status == 200


@pytest.mark.parametrize("origin", [None, "null", "http://evil.example", "https://127.0.0.1"])
def test_a_foreign_page_changes_nothing(beside: Make, origin: str | None) -> None:
    one = beside()
    for path in ("/api/command/start", "/api/picture", "/login", "/logout"):
        answer = one.ask("POST", path, b'{"transaction": "t-1"}', Origin=origin)
        assert (answer.status, answer.words) == (403, "only this page itself may send this"), path
    assert one.place.phase == "idle"
    assert one.place.messages("audit") == []


def test_with_a_password_nothing_is_told_or_done_without_it(beside: Make) -> None:
    one = beside(PASSWORD)
    for method, path in CLOSED_ROUTES:
        for cookie in (None, "hv_page=made-up"):
            answer = one.ask(method, path, b"{}" if method == "POST" else None, Cookie=cookie)
            assert (answer.status, answer.words) == (401, "the password is needed"), path
    assert b'type="password"' in one.get("/").content


def test_every_route_is_known_to_these_tests() -> None:
    """A new one is closed, or is named among those that are for all."""
    for pattern, handler in ROUTES:
        paths = [path for _, path in (OPEN_ROUTES if handler.is_for_all else CLOSED_ROUTES)]
        assert pattern == ".*" or any(re.fullmatch(pattern, path) for path in paths), pattern


def test_the_right_password_lets_in_until_one_goes_out(beside: Make) -> None:
    one = beside(PASSWORD)

    def log_in(password: object) -> Any:
        return one.ask("POST", "/login", json.dumps({"password": password}).encode())

    for wrong in ("guess", "", None, 7, [PASSWORD]):
        answer = log_in(wrong)
        assert (answer.status, answer.words) == (403, "this is not the password")
        assert "Set-Cookie" not in answer.headers
    assert one.ask("POST", "/login", b"\xff{").status == 403
    answer = log_in(PASSWORD)
    flags = answer.headers["Set-Cookie"]
    assert answer.status == 200
    assert "HttpOnly" in flags
    assert "SameSite=Strict" in flags
    assert PASSWORD not in flags
    assert one.get("/api/state", Cookie=answer.cookie).body["page"]["needs_password"] is True
    assert b'id="watch"' in one.get("/", Cookie=answer.cookie).content
    assert one.ask("POST", "/logout", b"", Cookie=answer.cookie).status == 200
    assert one.get("/api/state", Cookie=answer.cookie).status == 401


def test_guessing_is_stopped_and_told(beside: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("agent.web.handlers.SLOW_ANSWER_S", 0)
    one = beside(PASSWORD)
    for number in range(10):
        assert one.ask("POST", "/login", json.dumps({"password": f"guess {number}"}).encode()).status == 403
    answer = one.ask("POST", "/login", json.dumps({"password": PASSWORD}).encode())
    assert answer.status == 429
    assert "too many wrong passwords" in answer.words


def test_with_a_certificate_it_speaks_https_and_its_cookie_stays_there(beside: Make, tmp_path: Path) -> None:
    x509 = pytest.importorskip("cryptography.x509")
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "scope")])
    now = datetime.now(timezone.utc)
    made = x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(key.public_key())
    made = made.serial_number(1).not_valid_before(now - timedelta(1)).not_valid_after(now + timedelta(1))
    certificate, key_file = tmp_path / "page.pem", tmp_path / "page.key"
    certificate.write_bytes(made.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM))
    key_file.write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    one = beside(PASSWORD, certificate_file=certificate, key_file=key_file)
    trusting = ssl.create_default_context(cafile=str(certificate))
    trusting.check_hostname = False
    host = f"127.0.0.1:{one.section.port}"
    content = json.dumps({"password": PASSWORD})
    with (
        socket.create_connection(("127.0.0.1", one.section.port), 10) as plain,
        trusting.wrap_socket(plain) as secret,
    ):
        head = (
            f"POST /login HTTP/1.1\r\nHost: {host}\r\nOrigin: https://{host}\r\nContent-Length: {len(content)}\r\n\r\n"
        )
        secret.sendall((head + content).encode())
        said = secret.recv(4096).decode()
    assert said.startswith("HTTP/1.1 200")
    assert "Secure" in said

    key_file.write_text("no key")
    with pytest.raises(ConfigError, match="no certificate with its key"):
        Page(one.section, PASSWORD, one.page._sights)


# ---------------------------------------------------------------------------------------------------------- its bounds


def test_a_larger_upload_is_refused_before_its_bytes_are_taken(beside: Make) -> None:
    said = beside(max_upload_mb=1).announce("/api/picture", 2_000_000)
    assert said.startswith("HTTP/1.1 413")
    assert "web.max_upload_mb" in said


def test_an_empty_upload_is_refused_as_such_and_ends_no_examination(beside: Make) -> None:
    answer = beside().ask("POST", "/api/picture", b"")
    assert (answer.status, answer.words) == (422, "the file is empty")


def test_a_command_is_no_larger_than_a_command(beside: Make) -> None:
    one = beside()
    assert one.announce("/api/command/start", 20_022).startswith("HTTP/1.1 400")
    assert one.place.phase == "idle"


def test_one_upload_at_a_time_and_one_that_was_broken_off_leaves_its_place(beside: Make) -> None:
    one = beside()
    host = f"127.0.0.1:{one.section.port}"
    head = f"POST /api/picture HTTP/1.1\r\nHost: {host}\r\nOrigin: http://{host}\r\nContent-Length: 1000\r\n\r\n"
    with socket.create_connection(("127.0.0.1", one.section.port), 10) as slow:
        slow.sendall(head.encode() + b"the first bytes")
        one.wait_until(lambda: one.ask("POST", "/api/picture", b"x").status == 429)
    one.wait_until(lambda: one.ask("POST", "/api/picture", b"x").status == 422)


def test_a_client_that_takes_all_connections_is_held_to_a_number_and_the_page_is_back_when_it_goes(
    beside: Make,
) -> None:
    one = beside()
    clients = [socket.create_connection(("127.0.0.1", one.section.port), 10) for _ in range(MOST_CONNECTIONS + 8)]
    try:

        def closed() -> int:
            return sum(_is_closed(client) for client in clients)

        one.wait_until(lambda: closed() >= 8)
    finally:
        for client in clients:
            client.close()
    one.wait_until(lambda: _answers(one))


def _is_closed(client: socket.socket) -> bool:
    client.setblocking(False)
    try:
        return client.recv(1) == b""
    except BlockingIOError:
        return False
    except ConnectionResetError:
        return True


def _answers(one: Beside) -> bool:
    try:
        return one.get("/api/state").status == 200
    except OSError:
        return False


def test_a_client_that_never_says_what_it_wants_is_hung_up_on(beside: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page_module, "IDLE_CONNECTION_S", 0.3)
    one = beside()
    with socket.create_connection(("127.0.0.1", one.section.port), 10) as client:
        client.sendall(b"GET /api/state HTTP/1.1\r\nHost: ")
        assert client.recv(100) == b""


def test_who_asks_without_end_is_slowed_and_then_refused(beside: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page_module, "BURST", 5)
    monkeypatch.setattr(page_module, "LONGEST_WAIT_S", 0.2)
    one = beside()
    begun_s = time.monotonic()
    assert [one.get("/static/login.js").status for _ in range(15)] == [200] * 15
    assert time.monotonic() - begun_s > 0.2, "30 a second, after the first few"
    monkeypatch.undo()
    clients = [socket.create_connection(("127.0.0.1", one.section.port), 10) for _ in range(25)]
    for client in clients:
        client.sendall(b"GET /static/login.js HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
    said = [client.recv(100).split(b"\r\n")[0] for client in clients]
    for client in clients:
        client.close()
    assert b"HTTP/1.1 429 Too Many Requests" in said


@pytest.mark.usefixtures("no_thread_left")
def test_the_stop_is_not_held_up_by_browsers_that_wait(beside: Make) -> None:
    one = beside(start=False)
    one.start(with_pipeline=False)  # a command gets no answer
    host = f"127.0.0.1:{one.section.port}"
    waiting = [socket.create_connection(("127.0.0.1", one.section.port), 10) for _ in range(4)]
    for client in waiting[:2]:
        content = '{"transaction": "t-1"}'
        head = (
            f"POST /api/command/start HTTP/1.1\r\nHost: {host}\r\nOrigin: http://{host}\r\nContent-Length: 22\r\n\r\n"
        )
        client.sendall((head + content).encode())
    one.wait_until(lambda: one.place.commands.qsize() == 2)
    begun_s = time.monotonic()
    assert one.page.stop(5)
    assert time.monotonic() - begun_s < 1.5
    one.wait_until(lambda: all(map(_is_closed, waiting)))
    for client in waiting:
        client.close()
    one.place.pipeline.start()  # and a reply that comes too late harms nobody
    one.wait_until(lambda: one.place.phase == "running")
    assert one.place.pipeline.stop(5)
    assert one.place.pipeline.failure is None


def test_a_port_that_is_taken_is_waited_for_and_told_once(
    beside: Make, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(page_module, "LISTEN_AGAIN_S", 0.05)
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        one = beside(start=False, port=other.getsockname()[1])
        with caplog.at_level(logging.INFO, "agent.web.page"):
            one.page.start()
            time.sleep(0.5)
            assert one.page.is_alive()
    one.wait_until(lambda: _answers(one))
    one.place.pipeline.start()
    told = [record.message for record in caplog.records if "cannot listen" in record.message]
    assert len(told) == 1
    assert str(one.section.port) in told[0]


def test_what_ends_the_page_unasked_is_known(beside: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    def break_down(*_args: object) -> None:
        raise RuntimeError("a fault of ours")

    one = beside(start=False)
    monkeypatch.setattr(Page, "_make_server", break_down)
    one.page.start()
    one.page.join(5)
    assert not one.page.is_alive()
    assert "a fault of ours" in str(one.page.failure)
    one.page.failure = None
    one.place.pipeline.start()


def test_the_default_is_this_computer_alone() -> None:
    assert not WebSection().enabled
    assert WebSection().is_local
    assert all(WebSection(host=host).is_local for host in ("127.0.0.1", "127.8.8.8", "::1", "localhost"))
    assert not any(WebSection(host=host).is_local for host in ("0.0.0.0", "::", "192.168.1.7", "scope.lab"))
