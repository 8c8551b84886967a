"""A USB or other V4L2 camera, by index or by its stable path below /dev/v4l/by-id.

OpenCV tells no reason when a device does not open, and may say that all is well after the plug was pulled: it hands out
the last picture again. Therefore the device is asked here first, by the kernel's own calls, and each picture's driver
time must be another than the last one's.
"""

from __future__ import annotations

import errno
import fcntl
import grp
import os
import stat
import struct
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

import cv2

from agent.camera.camera import SYSTEM_CLOCKS, Clocks, make_frame
from agent.camera.opencv import captured_pixels, check_capture_size, quiet_opencv
from agent.config import CameraSection
from agent.domain import Frame, Pixels
from agent.errors import CameraError

# linux/videodev2.h: struct v4l2_capability (104 bytes), struct v4l2_requestbuffers (20 bytes).
VIDIOC_QUERYCAP: Final = 0x80685600
VIDIOC_REQBUFS: Final = 0xC0145608
V4L2_CAP_VIDEO_CAPTURE: Final = 0x1
V4L2_CAP_VIDEO_CAPTURE_MPLANE: Final = 0x1000
V4L2_CAP_DEVICE_CAPS: Final = 0x80000000
V4L2_BUF_TYPE_VIDEO_CAPTURE: Final = 1
V4L2_MEMORY_MMAP: Final = 1

OVERFLOW_GID_FILE: Final = Path("/proc/sys/kernel/overflowgid")
"""Has the number that stands for a group of which a user namespace does not know (user_namespaces(7))."""

Ioctl = Callable[[int, int, bytearray], Any]
WaitAny = Callable[[Sequence[cv2.VideoCapture], int], tuple[bool, Sequence[int]]]


class UsbCamera:
    """An open V4L2 device."""

    is_live: Final = True

    def __init__(
        self,
        capture: cv2.VideoCapture,
        device: Path,
        *,
        read_timeout_s: float,
        um_per_px: float | None = None,
        clocks: Clocks = SYSTEM_CLOCKS,
        wait_any: WaitAny = cv2.VideoCapture.waitAny,
    ) -> None:
        self.description = f"camera {device}"
        self._capture = capture
        self._device = device
        self._read_timeout_s = read_timeout_s
        self._um_per_px = um_per_px
        self._clocks = clocks
        self._wait_any = wait_any
        self._frames = 0
        self._driver_time_ms = 0.0

    def read(self) -> Frame:
        with quiet_opencv():
            pixels_bgr = self._wait_and_read()
        driver_time_ms = self._capture.get(cv2.CAP_PROP_POS_MSEC)
        if 0 < driver_time_ms == self._driver_time_ms:
            raise CameraError(f"{self._device}: it gives an old picture again; the camera has stopped")
        self._driver_time_ms = driver_time_ms
        self._frames += 1
        return make_frame(
            self._frames, pixels_bgr, source=str(self._device), clocks=self._clocks, um_per_px=self._um_per_px
        )

    def close(self) -> None:
        with quiet_opencv():
            self._capture.release()

    def _wait_and_read(self) -> Pixels:
        try:
            # Waited for here: OpenCV's own wait is ten seconds, whatever is configured.
            is_ready, _ = self._wait_any([self._capture], int(self._read_timeout_s * 1e9))
            pixels_bgr = captured_pixels(self._capture.read(), str(self._device)) if is_ready else None
        except cv2.error:  # the driver reports a fault instead of a picture
            is_ready, pixels_bgr = True, None
        if pixels_bgr is not None:
            return pixels_bgr
        if not self._device.exists():
            raise CameraError(f"{self._device}: the camera was unplugged")
        if is_ready:
            raise CameraError(f"{self._device}: the driver reports a fault instead of a picture; check cable and power")
        raise CameraError(f"{self._device}: no picture for {self._read_timeout_s:g} s; check cable and power")


def open_usb(section: CameraSection, *, clocks: Clocks = SYSTEM_CLOCKS) -> UsbCamera:
    """The V4L2 camera of the configuration.

    Raises CameraError that says which it is: not there, no permission, no camera, in use. Width, height and pixel
    format are wishes; the camera takes the nearest that it has.
    """
    usb = section.usb
    device = device_path(usb.device)
    check_device(device)
    capture = cv2.VideoCapture()
    with quiet_opencv():
        if not capture.open(str(device), cv2.CAP_V4L2):
            raise CameraError(f"{device}: the camera does not start; unplug it and plug it in again")
        # The format first: it decides which sizes there are.
        if usb.fourcc is not None:
            capture.set(cv2.CAP_PROP_FOURCC, cv2.VideoWriter.fourcc(*usb.fourcc))
        if usb.width_px is not None:
            capture.set(cv2.CAP_PROP_FRAME_WIDTH, usb.width_px)
        if usb.height_px is not None:
            capture.set(cv2.CAP_PROP_FRAME_HEIGHT, usb.height_px)
    check_capture_size(capture, section.max_megapixels, str(device))
    return UsbCamera(capture, device, read_timeout_s=usb.read_timeout_s, um_per_px=section.um_per_px, clocks=clocks)


def device_path(device: int | str) -> Path:
    """The device file: 0 and "0" are /dev/video0."""
    text = str(device)
    return Path(f"/dev/video{text}" if text.isdecimal() else text)


def check_device(device: Path, *, ioctl: Ioctl = fcntl.ioctl) -> None:
    """Raise CameraError where this is not a camera that we may use now, with the reason and the way out."""
    try:
        handle = os.open(device, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise CameraError(f"{device}: {_explain_open(device, error)}") from error
    try:
        if not stat.S_ISCHR(os.fstat(handle).st_mode):
            raise CameraError(f"{device}: this is no device; name an index or a path below /dev/v4l/by-id")
        _check_captures(handle, device, ioctl)
        _check_free(handle, device, ioctl)
    finally:
        os.close(handle)


def _explain_open(device: Path, error: OSError) -> str:
    if error.errno in (errno.ENOENT, errno.ENODEV, errno.ENXIO):
        return f"no such camera; is it plugged in? {_list_cameras()}"
    if error.errno in (errno.EACCES, errno.EPERM):
        return f"no permission; {_let_in(device)}"
    if error.errno == errno.EBUSY:
        return _busy(device)
    return f"it cannot be opened: {error.strerror or error}"


def _list_cameras() -> str:
    by_id = Path("/dev/v4l/by-id")
    there = sorted(by_id.iterdir()) if by_id.is_dir() else sorted(Path("/dev").glob("video[0-9]*"))
    return f"There are: {', '.join(map(str, there))}" if there else "There is no camera at all on this machine"


def _let_in(device: Path) -> str:
    """What to do so that the agent may use the device."""
    group = _group_of(device)
    if "NOTIFY_SOCKET" not in os.environ:
        return f"put the user that runs the agent into the group `{group}` and log in anew"
    return (
        f"give the service the device's group (`ls -lL {device}` shows it): `systemctl edit` the unit, "
        f"`SupplementaryGroups={group}` under [Service], and restart it"
    )


def _group_of(device: Path) -> str:
    """Whose members may use the device; on all usual systems, and where it cannot be told, `video`."""
    try:
        gid = device.stat().st_gid
        # With `PrivateUsers=` in the service's unit all groups but its own look like this one.
        return "video" if gid == int(OVERFLOW_GID_FILE.read_text()) else grp.getgrgid(gid).gr_name
    except (OSError, KeyError, ValueError):
        return "video"


def _busy(device: Path) -> str:
    return f"another program uses it; close that first (`fuser -v {device}` shows which)"


def _check_captures(handle: int, device: Path, ioctl: Ioctl) -> None:
    """Many cameras have a second device file for their notes about pictures, which gives no pictures."""
    answer = bytearray(104)
    try:
        ioctl(handle, VIDIOC_QUERYCAP, answer)
    except OSError as error:
        raise CameraError(f"{device}: this is not a V4L2 camera ({error.strerror})") from error
    of_driver, of_device = struct.unpack_from("=II", answer, 84)
    capabilities = of_device if of_driver & V4L2_CAP_DEVICE_CAPS else of_driver
    if not capabilities & (V4L2_CAP_VIDEO_CAPTURE | V4L2_CAP_VIDEO_CAPTURE_MPLANE):
        raise CameraError(f"{device}: this device gives no pictures (perhaps metadata); take another one of the camera")


def _check_free(handle: int, device: Path, ioctl: Ioctl) -> None:
    """Ask for no buffers: the kernel refuses even that while another program streams. OpenCV would try for long."""
    request = bytearray(struct.pack("=III8x", 0, V4L2_BUF_TYPE_VIDEO_CAPTURE, V4L2_MEMORY_MMAP))
    try:
        ioctl(handle, VIDIOC_REQBUFS, request)
    except OSError as error:
        if error.errno == errno.EBUSY:
            raise CameraError(f"{device}: {_busy(device)}") from error
        # Other answers (a driver without these buffers) are for OpenCV to cope with.
