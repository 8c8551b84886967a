"""A camera in the network: a real MJPEG server on loopback that stands still and comes back; RTSP where installed."""

from __future__ import annotations

import base64
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from agent.camera.camera import NOTHING_YET, Camera, open_camera
from agent.camera.grabber import FrameQueue, Grabber
from agent.camera.network import NetworkCamera
from agent.config import CameraSection
from agent.domain import Frame
from agent.errors import CameraError
from agent.health import Health

PASSWORD = "gehe1m: @/%ü"


class MjpegServer(ThreadingHTTPServer):
    """Streams grey pictures on /stream, one brighter than the other, twenty a second."""

    daemon_threads = True

    def __init__(self, port: int = 0, login: str | None = None) -> None:
        super().__init__(("127.0.0.1", port), _Stream)
        self.login = login
        self.is_frozen = threading.Event()
        self.is_closing = threading.Event()
        self._thread = threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.02})
        self._thread.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/stream"

    def close(self) -> None:
        self.is_closing.set()
        self.shutdown()
        self.server_close()
        self._thread.join()

    def handle_error(self, *_: Any) -> None:
        """A client that goes away is no event here."""


class _Stream(BaseHTTPRequestHandler):
    server: MjpegServer

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        expected = self.server.login and "Basic " + base64.b64encode(self.server.login.encode()).decode()
        if expected and self.headers.get("Authorization") != expected:
            self.send_response(401)
            self.send_header("WWW-Authenticate", 'Basic realm="camera"')
        elif self.path == "/page":
            self.send_response(200)
            self.send_header("Content-Type", "text/html")
        elif not self.path.startswith("/stream"):
            self.send_response(404)
        else:
            self._stream()
            return
        self.send_header("Content-Length", "0")
        self.end_headers()

    def _stream(self) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "multipart/x-mixed-replace; boundary=frame")
        self.end_headers()
        shade = 0
        while not self.server.is_closing.is_set():
            if not self.server.is_frozen.is_set():
                jpeg = cv2.imencode(".jpg", np.full((96, 128, 3), shade % 250, np.uint8))[1].tobytes()
                head = f"--frame\r\nContent-Type: image/jpeg\r\nContent-Length: {len(jpeg)}\r\n\r\n"
                self.wfile.write(head.encode() + jpeg + b"\r\n")
                self.wfile.flush()
                shade += 1
            time.sleep(0.05)


@pytest.fixture
def mjpeg() -> Iterator[Callable[..., MjpegServer]]:
    servers: list[MjpegServer] = []

    def start(**keys: Any) -> MjpegServer:
        servers.append(MjpegServer(**keys))
        return servers[-1]

    yield start
    for server in servers:
        server.close()


def section(url: str | None, **keys: Any) -> CameraSection:
    network = {"url": url, "read_timeout_s": 1.0, **keys}
    return CameraSection.model_validate({"kind": "network", "um_per_px": 0.3, "network": network})


def read_until_lost(camera: Camera) -> None:
    """What waits in buffers is read first."""
    for _ in range(1000):
        camera.read()


def refusal(url: str, **keys: Any) -> str:
    with pytest.raises(CameraError) as caught:
        open_camera(section(url, **keys))
    return str(caught.value)


@pytest.fixture(autouse=True)
def _no_password_around(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HEMATOVISION_CAMERA_PASSWORD", raising=False)


# ------------------------------------------------------------------------------------------------- MJPEG
def test_an_mjpeg_stream_gives_numbered_frames(mjpeg: Callable[..., MjpegServer]) -> None:
    server = mjpeg()
    camera = open_camera(section(server.url))
    assert isinstance(camera, NetworkCamera)
    frames = [camera.read() for _ in range(5)]
    camera.close()
    assert camera.is_live
    assert [frame.number for frame in frames] == [1, 2, 3, 4, 5]
    assert [round(float(frame.pixels_bgr.mean())) for frame in frames] == [0, 1, 2, 3, 4]
    assert frames[0].pixels_bgr.shape == (96, 128, 3)
    assert frames[0].source == server.url
    assert frames[0].origin_key is None
    assert frames[0].um_per_px == 0.3
    assert not frames[0].pixels_bgr.flags.writeable


def test_a_frozen_stream_is_a_lost_camera_after_the_read_timeout(mjpeg: Callable[..., MjpegServer]) -> None:
    server = mjpeg()
    camera = open_camera(section(server.url))
    camera.read()
    server.is_frozen.set()
    began = time.monotonic()
    with pytest.raises(CameraError, match=r"no picture for 1 s"):
        read_until_lost(camera)
    assert time.monotonic() - began < 3
    server.is_frozen.clear()
    with pytest.raises(CameraError):
        camera.read()
    camera.close()


def test_a_stream_that_ends_is_a_lost_camera(mjpeg: Callable[..., MjpegServer]) -> None:
    server = mjpeg()
    camera = open_camera(section(server.url))
    camera.read()
    server.close()
    with pytest.raises(CameraError, match="the stream ended"):
        read_until_lost(camera)
    camera.close()


def test_the_grabber_opens_a_frozen_stream_again_and_frames_go_on(
    mjpeg: Callable[..., MjpegServer], caplog: pytest.LogCaptureFixture
) -> None:
    server = mjpeg()
    stop, queue, health = threading.Event(), FrameQueue(2), Health()
    opening = section(server.url, read_timeout_s=0.5)
    grabber = Grabber(lambda: open_camera(opening), queue, health, stop, sleep=lambda _: stop.wait(0.02))
    grabber.start()
    try:
        assert isinstance(queue.take(5), Frame)
        server.is_frozen.set()
        wait_for(lambda: health.snapshot().camera == "lost")
        while queue.take(0) is not NOTHING_YET:
            pass
        server.is_frozen.clear()
        frame = queue.take(10)
        assert isinstance(frame, Frame)
        wait_for(lambda: health.snapshot().camera == "open")
    finally:
        stop.set()
        grabber.join(5)
    assert not grabber.is_alive()
    assert grabber.failure is None
    assert sum("camera lost" in record.message for record in caplog.records) == 1


def wait_for(is_so: Callable[[], bool], seconds: float = 10) -> None:
    until = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < until
        time.sleep(0.01)


def test_an_address_that_does_not_answer_says_how_far_it_came(mjpeg: Callable[..., MjpegServer]) -> None:
    server = mjpeg()
    base = f"http://127.0.0.1:{server.server_port}"
    assert "404" in refusal(f"{base}/nothing")
    assert "text/html" in refusal(f"{base}/page")
    server.close()
    assert "Connection refused" in refusal(server.url)
    assert "nothing is known under this name" in refusal("http://no-such-camera.invalid/stream")
    assert "no host" in refusal("http://:80/stream")
    assert "port is not a number" in refusal("http://127.0.0.1:99999/stream")
    with pytest.raises(CameraError, match=r"set camera\.network\.url"):
        open_camera(section(None))


@pytest.mark.parametrize("host", ["camera..local", f"{'a' * 64}.local"])
def test_a_name_that_no_host_can_have_is_told_like_one_that_is_not_known(host: str) -> None:
    assert "nothing is known under this name" in refusal(f"http://{host}/stream")


@pytest.mark.parametrize("host", ["[::1", "[fe80::zz]"])
def test_an_address_in_brackets_that_is_none_is_told_without_its_password(host: str) -> None:
    reason = refusal(f"rtsp://user:geheim@{host}/stream")
    assert "camera.network.url" in reason
    assert "geheim" not in reason


@pytest.mark.parametrize("path", ["/k\u00fcche.mjpg", "/a field.mjpg"])
def test_a_path_with_a_space_or_an_umlaut_is_asked_for_and_the_answer_told(
    mjpeg: Callable[..., MjpegServer], path: str
) -> None:
    assert "404" in refusal(f"http://127.0.0.1:{mjpeg().server_port}{path}")


def test_a_port_that_accepts_and_is_silent_does_not_hold_us_up() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        began = time.monotonic()
        reason = refusal(f"http://127.0.0.1:{silent.getsockname()[1]}/stream", read_timeout_s=0.5)
        assert time.monotonic() - began < 4
    assert "not as a web server does" in reason


def test_a_stream_over_the_limit_of_megapixels_is_refused(mjpeg: Callable[..., MjpegServer]) -> None:
    small = section(mjpeg().url).model_copy(update={"max_megapixels": 0.01})
    with pytest.raises(CameraError, match=r"128 x 96 pixels = 0\.0 megapixels, the limit is 0\.01"):
        open_camera(small)


# ------------------------------------------------------------------------------------------------- passwords
def test_user_and_password_come_from_a_file(mjpeg: Callable[..., MjpegServer], tmp_path: Path) -> None:
    server = mjpeg(login=f"viewer:{PASSWORD}")
    secret = tmp_path / "password"
    secret.write_text(f"{PASSWORD}\r\n", "utf-8")
    camera = open_camera(section(server.url, username="viewer", password_file=secret))
    assert isinstance(camera.read(), Frame)
    camera.close()


def test_the_password_may_stand_in_the_environment_or_in_the_address(
    mjpeg: Callable[..., MjpegServer], monkeypatch: pytest.MonkeyPatch
) -> None:
    server = mjpeg(login="viewer:s3cret")
    camera = open_camera(section(server.url.replace("://", "://viewer:s3cret@")))
    assert isinstance(camera.read(), Frame)
    camera.close()
    monkeypatch.setenv("HEMATOVISION_CAMERA_PASSWORD", "s3cret")
    camera = open_camera(section(server.url, username="viewer"))
    frame = camera.read()
    camera.close()
    assert isinstance(frame, Frame)
    assert frame.source == server.url


def test_a_password_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    reason = refusal("http://127.0.0.1:9/stream", password_file=tmp_path / "absent")
    assert "absent: the password file cannot be read" in reason
    assert "camera.network.password_file" in reason


def test_no_secret_is_in_messages_logs_sources_or_on_standard_error(
    mjpeg: Callable[..., MjpegServer],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(0)
    server = mjpeg(login="viewer:RIGHT-SECRET")
    secret = tmp_path / "password"
    secret.write_text("WRONG-SECRET")
    login = {"username": "HIDDEN-USER", "password_file": secret}
    url = f"{server.url}?token=QUERY-SECRET"
    told = [
        refusal(url, **login),
        refusal(url.replace("://", "://HIDDEN-USER:WRONG-SECRET@")),
        refusal("rtsp://HIDDEN-USER:WRONG-SECRET@127.0.0.1:9/live?token=QUERY-SECRET"),
    ]
    assert "HTTP 401" in told[0]
    secret.write_text("RIGHT-SECRET")
    camera = open_camera(section(url, **{**login, "username": "viewer"}))
    frame = camera.read()
    assert isinstance(frame, Frame)
    told += [camera.description, frame.source, repr(frame)]
    camera.close()
    printed = capfd.readouterr()
    told += [printed.out, printed.err, caplog.text]
    for text in told:
        assert "SECRET" not in text
        assert "HIDDEN" not in text


# ------------------------------------------------------------------------------------------------- RTSP
RTSP_SERVER = """
import gi
gi.require_version("Gst", "1.0")
gi.require_version("GstRtspServer", "1.0")
from gi.repository import GLib, Gst, GstRtspServer
Gst.init(None)
if not Gst.ElementFactory.find("rtpjpegpay") or not Gst.ElementFactory.find("jpegenc"):
    raise SystemExit("no rtpjpegpay, no jpegenc")
server = GstRtspServer.RTSPServer()
server.set_address("127.0.0.1")
server.set_service("0")
factory = GstRtspServer.RTSPMediaFactory()
factory.set_launch("( videotestsrc is-live=true pattern=ball"
                   " ! video/x-raw,format=I420,width=320,height=240,framerate=20/1"
                   " ! jpegenc ! rtpjpegpay name=pay0 )")
server.get_mount_points().add_factory("/live", factory)
server.attach(None)
print(server.get_bound_port(), flush=True)
GLib.MainLoop().run()
"""


@pytest.fixture
def rtsp() -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """An RTSP server of GStreamer in a child process; under the system's Python, to which the bindings belong."""
    python = shutil.which("python3", path="/usr/bin:/bin")
    if python is None:
        pytest.skip("no system Python for the RTSP server")
    process = subprocess.Popen([python, "-c", RTSP_SERVER], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    port = process.stdout.readline().strip()
    try:
        if not port:
            pytest.skip("python3-gi, gir1.2-gst-rtsp-server-1.0 and gstreamer1.0-plugins-good are not installed")
        yield f"rtsp://127.0.0.1:{port}/live", process
    finally:
        process.kill()
        process.communicate()


def test_an_rtsp_stream_gives_frames_and_is_lost_when_its_server_dies(
    rtsp: tuple[str, subprocess.Popen[str]],
) -> None:
    url, server = rtsp
    camera = open_camera(section(url, read_timeout_s=3))
    frames = [camera.read() for _ in range(10)]
    assert all(isinstance(frame, Frame) and frame.pixels_bgr.shape == (240, 320, 3) for frame in frames)
    assert frames[-1].sha256_16 != frames[0].sha256_16
    assert frames[0].source == url
    server.kill()
    began = time.monotonic()
    with pytest.raises(CameraError):
        read_until_lost(camera)
    assert time.monotonic() - began < 6
    camera.close()


def test_an_rtsp_path_that_is_not_there_says_where_to_look(rtsp: tuple[str, subprocess.Popen[str]]) -> None:
    url, _ = rtsp
    reason = refusal(url.replace("/live", "/nothing"), read_timeout_s=1)
    assert "look at the path of the stream" in reason
