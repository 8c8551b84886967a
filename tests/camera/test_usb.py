"""A V4L2 camera: the checks before opening, the guards while reading. Device and kernel answers are made."""

from __future__ import annotations

import errno
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from agent.camera import usb
from agent.camera.camera import open_camera
from agent.camera.usb import (
    V4L2_CAP_DEVICE_CAPS,
    V4L2_CAP_VIDEO_CAPTURE,
    VIDIOC_QUERYCAP,
    VIDIOC_REQBUFS,
    UsbCamera,
    check_device,
    device_path,
)
from agent.config import CameraSection
from agent.errors import CameraError

A_CHARACTER_DEVICE = Path("/dev/null")
METADATA_CAPTURE = 0x00800000


class MadeKernel:
    """Answers the two calls that the check makes, as a driver does."""

    def __init__(
        self, *, of_driver: int = V4L2_CAP_VIDEO_CAPTURE, of_device: int = 0, refusals: dict[int, int] | None = None
    ) -> None:
        self.calls: list[int] = []
        self._capabilities = struct.pack("=II", of_driver, of_device)
        self._refusals = refusals or {}

    def __call__(self, _: int, request: int, answer: bytearray) -> int:
        self.calls.append(request)
        if request in self._refusals:
            number = self._refusals[request]
            raise OSError(number, os.strerror(number))
        if request == VIDIOC_QUERYCAP:
            answer[84:92] = self._capabilities
        return 0


class MadeCapture:
    """Plays (picture, driver time in ms) as cv2.VideoCapture does; `wait_any` says that nothing waits at the end."""

    def __init__(self, *shots: tuple[np.ndarray | None, float]) -> None:
        self._shots = list(shots)
        self._time_ms = 0.0
        self.is_released = False

    def wait_any(self, captures: Any, timeout_ns: int) -> tuple[bool, list[int]]:
        assert captures == [self]
        assert timeout_ns == 2_500_000_000
        return (True, [0]) if self._shots else (False, [])

    def read(self) -> tuple[bool, np.ndarray | None]:
        picture, self._time_ms = self._shots.pop(0)
        return picture is not None, picture

    def get(self, name: int) -> float:
        return self._time_ms if name == cv2.CAP_PROP_POS_MSEC else 0.0

    def release(self) -> None:
        self.is_released = True


def picture(shade: int = 100) -> np.ndarray:
    return np.full((48, 64, 3), shade, np.uint8)


@pytest.fixture
def device(tmp_path: Path) -> Path:
    """Stands for the device file; only whether it is there matters."""
    path = tmp_path / "video0"
    path.touch()
    return path


def camera_of(device: Path, capture: MadeCapture) -> UsbCamera:
    return UsbCamera(
        capture,  # type: ignore[arg-type]
        device,
        read_timeout_s=2.5,
        um_per_px=0.1,
        wait_any=capture.wait_any,
    )


def open_handles() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def opening_error(number: int) -> Callable[..., int]:
    def refuse(*_: Any) -> int:
        raise OSError(number, os.strerror(number))

    return refuse


# ------------------------------------------------------------------------------------------------- before opening
def test_an_index_and_a_stable_path_name_a_device() -> None:
    assert device_path(2) == Path("/dev/video2")
    assert device_path("2") == Path("/dev/video2")
    assert device_path("/dev/v4l/by-id/usb-x-video-index0") == Path("/dev/v4l/by-id/usb-x-video-index0")


def test_a_camera_that_is_not_plugged_in_is_told_as_such() -> None:
    section = CameraSection.model_validate({"kind": "usb", "usb": {"device": "/dev/v4l/by-id/usb-no-such-camera"}})
    with pytest.raises(CameraError, match=r"usb-no-such-camera: no such camera; is it plugged in\? There "):
        open_camera(section)


def test_a_file_that_is_no_device_is_told_as_such(tmp_path: Path) -> None:
    path = tmp_path / "camera"
    path.touch()
    with pytest.raises(CameraError, match="this is no device"):
        check_device(path)


def test_a_device_that_is_no_camera_is_told_as_such() -> None:
    with pytest.raises(CameraError, match="/dev/null: this is not a V4L2 camera"):
        check_device(A_CHARACTER_DEVICE)


def test_a_missing_permission_names_the_group_that_has_it(monkeypatch: pytest.MonkeyPatch, device: Path) -> None:
    monkeypatch.setattr(os, "open", opening_error(errno.EACCES))
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    group = usb._group_of(device)
    with pytest.raises(CameraError, match=rf"put the user that runs the agent into the group `{group}`"):
        check_device(device)
    assert usb._group_of(device / "absent") == "video"


def test_a_group_that_the_services_namespace_hides_is_told_as_video(
    monkeypatch: pytest.MonkeyPatch, device: Path, tmp_path: Path
) -> None:
    hidden = tmp_path / "overflowgid"
    hidden.write_text(f"{device.stat().st_gid}\n")
    monkeypatch.setattr(usb, "OVERFLOW_GID_FILE", hidden)
    assert usb._group_of(device) == "video"
    assert usb.grp.getgrgid(device.stat().st_gid).gr_name != "video"


def test_a_service_without_permission_is_told_what_its_unit_needs(
    monkeypatch: pytest.MonkeyPatch, device: Path
) -> None:
    monkeypatch.setattr(os, "open", opening_error(errno.EACCES))
    monkeypatch.setenv("NOTIFY_SOCKET", "/run/systemd/notify")
    with pytest.raises(CameraError, match="SupplementaryGroups=") as told:
        check_device(device)
    assert "restart" in str(told.value)
    assert "log in" not in str(told.value)


@pytest.mark.parametrize(
    ("number", "expected"), [(errno.EBUSY, "another program uses it"), (errno.EIO, "Input/output error")]
)
def test_other_faults_of_opening_are_told(
    monkeypatch: pytest.MonkeyPatch, device: Path, number: int, expected: str
) -> None:
    monkeypatch.setattr(os, "open", opening_error(number))
    with pytest.raises(CameraError, match=expected):
        check_device(device)


def test_a_device_for_metadata_is_refused_although_its_driver_can_capture() -> None:
    kernel = MadeKernel(of_driver=V4L2_CAP_VIDEO_CAPTURE | V4L2_CAP_DEVICE_CAPS, of_device=METADATA_CAPTURE)
    with pytest.raises(CameraError, match="gives no pictures"):
        check_device(A_CHARACTER_DEVICE, ioctl=kernel)


def test_a_camera_in_use_is_told_with_the_way_to_find_who_uses_it() -> None:
    kernel = MadeKernel(refusals={VIDIOC_REQBUFS: errno.EBUSY})
    with pytest.raises(CameraError, match=r"another program uses it.*fuser -v /dev/null"):
        check_device(A_CHARACTER_DEVICE, ioctl=kernel)


@pytest.mark.parametrize(
    "kernel",
    [
        MadeKernel(),
        MadeKernel(of_driver=V4L2_CAP_DEVICE_CAPS, of_device=V4L2_CAP_VIDEO_CAPTURE),
        MadeKernel(refusals={VIDIOC_REQBUFS: errno.EINVAL}),
    ],
)
def test_a_free_camera_passes_and_the_check_leaves_no_handle_open(kernel: MadeKernel) -> None:
    handles = open_handles()
    check_device(A_CHARACTER_DEVICE, ioctl=kernel)
    assert kernel.calls == [VIDIOC_QUERYCAP, VIDIOC_REQBUFS]
    assert open_handles() == handles


def test_a_device_that_passes_the_checks_and_does_not_start_is_told(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(usb, "check_device", lambda _: None)
    section = CameraSection.model_validate({"kind": "usb", "usb": {"device": "/dev/null"}})
    with pytest.raises(CameraError, match="does not start"):
        open_camera(section)
    assert "WARN" not in capfd.readouterr().err


# ------------------------------------------------------------------------------------------------- while reading
def test_frames_of_a_camera_are_numbered_and_read_only(device: Path) -> None:
    camera = camera_of(device, MadeCapture((picture(1), 40.0), (picture(2), 80.0)))
    first, second = camera.read(), camera.read()
    assert (first.number, second.number) == (1, 2)
    assert first.source == str(device)
    assert first.um_per_px == 0.1
    assert first.origin_key is None
    assert not first.pixels_bgr.flags.writeable
    assert camera.is_live


def test_a_camera_that_gives_no_picture_in_time_is_lost(device: Path) -> None:
    with pytest.raises(CameraError, match=r"no picture for 2\.5 s; check cable"):
        camera_of(device, MadeCapture()).read()


def test_a_camera_that_was_unplugged_is_told_as_such(device: Path) -> None:
    camera = camera_of(device, MadeCapture((picture(), 40.0)))
    camera.read()
    device.unlink()
    with pytest.raises(CameraError, match="unplugged"):
        camera.read()


def test_an_old_picture_with_the_same_driver_time_is_never_a_frame(device: Path) -> None:
    camera = camera_of(device, MadeCapture((picture(), 40.0), (picture(), 40.0)))
    camera.read()
    with pytest.raises(CameraError, match="old picture again"):
        camera.read()


def test_a_driver_without_times_is_trusted(device: Path) -> None:
    camera = camera_of(device, MadeCapture((picture(), 0.0), (picture(), 0.0)))
    assert [camera.read().number, camera.read().number] == [1, 2]


def test_a_fault_that_the_kernel_reports_while_waiting_is_a_lost_camera(device: Path) -> None:
    capture = MadeCapture((picture(), 40.0))

    def fail(*_: Any) -> tuple[bool, list[int]]:
        raise cv2.error("POLLERR")

    camera = UsbCamera(capture, device, read_timeout_s=2.5, wait_any=fail)  # type: ignore[arg-type]
    with pytest.raises(CameraError, match="reports a fault"):
        camera.read()
    with pytest.raises(CameraError, match="reports a fault"):
        camera_of(device, MadeCapture((None, 40.0))).read()


def test_a_pixel_format_that_opencv_does_not_convert_is_refused(device: Path) -> None:
    raw = np.zeros((48, 64, 2), np.uint8)
    with pytest.raises(CameraError, match="no colour picture of 8 bits"):
        camera_of(device, MadeCapture((raw, 40.0))).read()


def test_closing_releases_the_device(device: Path) -> None:
    capture = MadeCapture()
    camera_of(device, capture).close()
    assert capture.is_released
