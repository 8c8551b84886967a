"""A camera in the network: MJPEG over HTTP, or RTSP, read by FFMPEG through OpenCV.

A stream that stands still or has gone makes the handle useless for good: `read` raises CameraError after the read
timeout and the grabber opens a new one. Pictures inside the stream that are cut short are completed by FFMPEG with what
it has; it does not say so.

User and password are put into the address at the last moment, on its way to FFMPEG. They are in no message, no log
line and no frame; neither is the query of the address, where some cameras want their password.
"""

from __future__ import annotations

import http.client
import socket
import ssl
from pathlib import Path
from typing import Final
from urllib.parse import SplitResult, quote, unquote, urlsplit, urlunsplit

import cv2

from agent.camera.camera import SYSTEM_CLOCKS, Clocks, make_frame
from agent.camera.opencv import captured_pixels, check_capture_size, quiet_opencv
from agent.config import CAMERA_PASSWORD_VARIABLE, CameraSection, read_secret
from agent.domain import Frame
from agent.errors import CameraError, ConfigError

DEFAULT_PORTS: Final = {"http": 80, "https": 443, "rtsp": 554, "rtsps": 322}

OPEN_TIMEOUTS: Final = 2
"""Opening may take this many read timeouts: FFMPEG reads the first two pictures before it calls a stream open."""

SENT_AS_THEY_ARE: Final = "!#$%&'()*+,/:;=?@[]~"
"""What may stand in the path of an address beside letters and digits; anything else is percent-encoded (RFC 3986)."""


class NetworkCamera:
    """An open stream. source: its address without user, password and query."""

    is_live: Final = True

    def __init__(
        self,
        capture: cv2.VideoCapture,
        source: str,
        *,
        read_timeout_s: float,
        um_per_px: float | None = None,
        clocks: Clocks = SYSTEM_CLOCKS,
    ) -> None:
        self.description = f"network camera {source}"
        self._capture = capture
        self._source = source
        self._read_timeout_s = read_timeout_s
        self._um_per_px = um_per_px
        self._clocks = clocks
        self._frames = 0

    def read(self) -> Frame:
        with quiet_opencv():
            pixels_bgr = captured_pixels(self._capture.read(), self._source)
        if pixels_bgr is None:
            raise CameraError(f"{self._source}: the stream ended, or gave no picture for {self._read_timeout_s:g} s")
        self._frames += 1
        return make_frame(self._frames, pixels_bgr, source=self._source, clocks=self._clocks, um_per_px=self._um_per_px)

    def close(self) -> None:
        self._capture.release()


def open_network(section: CameraSection, *, clocks: Clocks = SYSTEM_CLOCKS) -> NetworkCamera:
    """The stream of the configuration. Raises CameraError that says how far it came: name, port, rights, content."""
    network = section.network
    if network.url is None:
        raise CameraError("no address is named; set camera.network.url")
    try:
        address = urlsplit(network.url)
    except ValueError:  # not repeated here: a password may stand in it
        raise CameraError("what stands in brackets is no IPv6 address (camera.network.url)") from None
    source = _without_secrets(address)
    username, password = _credentials(address, network.username, network.password_file)
    _try_port(address, source, network.read_timeout_s)
    timeout_ms = int(network.read_timeout_s * 1000)
    capture = cv2.VideoCapture()
    with quiet_opencv():
        is_open = capture.open(
            _with_credentials(address, username, password),
            cv2.CAP_FFMPEG,
            [
                cv2.CAP_PROP_OPEN_TIMEOUT_MSEC,
                timeout_ms * OPEN_TIMEOUTS,
                cv2.CAP_PROP_READ_TIMEOUT_MSEC,
                timeout_ms,
            ],
        )
    if not is_open:
        raise CameraError(f"{source}: {_explain_refusal(address, network.read_timeout_s)}")
    check_capture_size(capture, section.max_megapixels, source)
    return NetworkCamera(
        capture, source, read_timeout_s=network.read_timeout_s, um_per_px=section.um_per_px, clocks=clocks
    )


def _without_secrets(address: SplitResult) -> str:
    return urlunsplit((address.scheme, _host_and_port(address), address.path, "", ""))


def _with_credentials(address: SplitResult, username: str, password: str) -> str:
    login = f"{quote(username, safe='')}:{quote(password, safe='')}@" if username or password else ""
    return urlunsplit((address.scheme, login + _host_and_port(address), address.path, address.query, ""))


def _host_and_port(address: SplitResult) -> str:
    return address.netloc.rpartition("@")[2]


def _credentials(address: SplitResult, username: str | None, password_file: Path | None) -> tuple[str, str]:
    """User and password: from the configuration's file, else the environment, else what stands in the address."""
    try:
        password = read_secret(password_file, CAMERA_PASSWORD_VARIABLE)
    except ConfigError as error:
        raise CameraError(f"camera.network.password_file {error.source}: {'; '.join(error.faults)}") from None
    if password is None:
        password = unquote(address.password or "")
    return username if username is not None else unquote(address.username or ""), password


def _port(address: SplitResult) -> int:
    return address.port or DEFAULT_PORTS[address.scheme]


def _try_port(address: SplitResult, source: str, timeout_s: float) -> None:
    """Connect once: FFMPEG does not tell a wrong name from a closed port or a wrong password."""
    try:
        host, port = address.hostname, _port(address)
    except ValueError:
        raise CameraError(f"{source}: the port is not a number from 1 to 65535 (camera.network.url)") from None
    if not host:
        raise CameraError(f"{source}: there is no host in this address (camera.network.url)")
    try:
        socket.create_connection((host, port), timeout=timeout_s).close()
    except (socket.gaierror, UnicodeError):  # the latter for a name that no host can have: two dots, 64 letters
        raise CameraError(f"{source}: nothing is known under this name; is the name right, the network up?") from None
    except TimeoutError:
        raise CameraError(f"{source}: no answer in {timeout_s:g} s; is the camera on, the address right?") from None
    except OSError as error:
        raise CameraError(f"{source}: {error.strerror or error}; is the camera on, the port right?") from None


def _explain_refusal(address: SplitResult, timeout_s: float) -> str:
    """Why FFMPEG could not open what answers on the port, as far as can be found out."""
    if not address.scheme.startswith("http"):
        return (
            f"it answers, but gives no picture within {timeout_s * OPEN_TIMEOUTS:g} s; look at the path of the stream, "
            "camera.network.username and password_file"
        )
    try:
        status, content_type = _ask_http(address, timeout_s)
    except (OSError, http.client.HTTPException) as error:
        return f"it answers, but not as a web server does ({type(error).__name__})"
    if status in (401, 403):
        return f"it wants another user or password (HTTP {status}); see camera.network.username and password_file"
    if status >= 300:
        return f"it answers HTTP {status}; is the path of the stream right?"
    return f"it sends {content_type}, from which no picture comes; is this the address of the stream?"


def _ask_http(address: SplitResult, timeout_s: float) -> tuple[int, str]:
    """Status and content type of the address.

    Asked without the password: FFMPEG sends it in the form that the camera wants, this would send it readable.
    """
    host = address.hostname or ""
    if address.scheme == "https":
        # FFMPEG does not check certificates either: cameras sign their own.
        unchecked = ssl.create_default_context()
        unchecked.check_hostname = False
        unchecked.verify_mode = ssl.CERT_NONE
        connection: http.client.HTTPConnection = http.client.HTTPSConnection(
            host, _port(address), timeout=timeout_s, context=unchecked
        )
    else:
        connection = http.client.HTTPConnection(host, _port(address), timeout=timeout_s)
    try:
        target = urlunsplit(("", "", address.path or "/", address.query, ""))
        connection.request("GET", quote(target, safe=SENT_AS_THEY_ARE))
        answer = connection.getresponse()
        return answer.status, answer.headers.get("Content-Type", "something without a type")
    finally:
        connection.close()
