"""A real browser, driven as a person drives it: chromium without a window, over its DevTools protocol."""

from __future__ import annotations

import asyncio
import base64
import json
import shutil
import subprocess
import time
import urllib.request
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from tornado.websocket import websocket_connect

ANSWER_S = 30.0
"""s; for anything that a browser does on a machine with other work."""

DESKTOP, TABLET, UPRIGHT = (1440, 900), (1024, 768), (800, 1180)
"""px; width and height of the windows that the page is looked at in."""

KEYS = {"Enter": (13, "\r"), "ArrowRight": (39, ""), "ArrowLeft": (37, "")}
"""Code and text of the keys that are no letters."""


def find_chromium() -> str | None:
    return next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


class Browser:
    """One window. Close it."""

    def __init__(self, program: str, folder: Path) -> None:
        self._loop = asyncio.new_event_loop()
        self._number = 0
        self.errors: list[str] = []
        options = ("--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-extensions")
        quiet = ("--disable-background-networking", "--disable-sync", "--disable-component-update", "--mute-audio")
        self._process = subprocess.Popen(
            [program, *options, *quiet, "--remote-debugging-port=0", f"--user-data-dir={folder}", "about:blank"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        address = folder / "DevToolsActivePort"
        self._wait(lambda: address.exists() and address.read_text().count("\n") >= 1, "the browser has started")
        port = address.read_text().split()[0]
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/json/list", timeout=ANSWER_S) as told:
            pages = [page for page in json.load(told) if page["type"] == "page"]
        self._socket = self._run(lambda: websocket_connect(pages[0]["webSocketDebuggerUrl"]))
        for domain in ("Page", "Runtime", "Log", "DOM"):
            self.call(f"{domain}.enable")
        self.resize(*DESKTOP)

    def close(self) -> None:
        self._loop.call_soon(self._socket.close)
        self._process.terminate()
        self._process.wait(ANSWER_S)
        self._loop.close()

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """One word of the protocol and its answer; what the page logs as an error meanwhile is kept in `errors`."""
        self._number += 1
        number = self._number
        asked = json.dumps({"id": number, "method": method, "params": params})
        self._run(lambda: self._socket.write_message(asked))
        while True:
            told = json.loads(self._run(self._socket.read_message))
            if told.get("id") == number:
                assert "error" not in told, told
                return dict(told["result"])
            self._note(told)

    def open(self, address: str) -> None:
        self.call("Page.navigate", url=address)
        self.wait_for("document.readyState === 'complete'")

    def evaluate(self, expression: str) -> Any:
        told = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in told, told["exceptionDetails"]
        return told["result"].get("value")

    def wait_for(self, expression: str, timeout_s: float = ANSWER_S) -> None:
        self._wait(lambda: self._holds(expression), expression, timeout_s)

    def text(self, selector: str) -> str:
        return str(self.evaluate(f"document.querySelector({json.dumps(selector)}).innerText"))

    def click(self, selector: str) -> None:
        """With the mouse, where it is on the screen: what is hidden or covered cannot be clicked."""
        place = self.evaluate(
            f"(() => {{ const it = document.querySelector({json.dumps(selector)});"
            "it.scrollIntoView({block: 'center'});"
            "const box = it.getBoundingClientRect(); const at = [box.x + box.width / 2, box.y + box.height / 2];"
            "return it.contains(document.elementFromPoint(...at)) ? at : null; })()"
        )
        assert place is not None, f"{selector} cannot be clicked"
        for kind in ("mousePressed", "mouseReleased"):
            where = {"x": place[0], "y": place[1], "button": "left", "clickCount": 1}
            self.call("Input.dispatchMouseEvent", type=kind, **where)

    def type(self, text: str) -> None:
        self.call("Input.insertText", text=text)

    def press(self, key: str) -> None:
        code, text = KEYS[key] if key in KEYS else (ord(key.upper()), key)
        about = {"key": key, "windowsVirtualKeyCode": code, "text": text}
        self.call("Input.dispatchKeyEvent", type="keyDown" if text else "rawKeyDown", **about)
        self.call("Input.dispatchKeyEvent", type="keyUp", key=key, windowsVirtualKeyCode=code)

    def choose_file(self, selector: str, file: Path) -> None:
        root = self.call("DOM.getDocument")["root"]["nodeId"]
        node = self.call("DOM.querySelector", nodeId=root, selector=selector)["nodeId"]
        self.call("DOM.setFileInputFiles", files=[str(file)], nodeId=node)

    def resize(self, width: int, height: int) -> None:
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)

    def screenshot(self, file: Path) -> None:
        told = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=True)
        file.write_bytes(base64.b64decode(told["data"]))

    def _holds(self, expression: str) -> bool:
        told = self.call("Runtime.evaluate", expression=f"Boolean({expression})", returnByValue=True)
        return told["result"].get("value") is True

    def _note(self, told: dict[str, Any]) -> None:
        params = told.get("params", {})
        if told.get("method") == "Runtime.exceptionThrown":
            self.errors.append(str(params["exceptionDetails"]))
        if told.get("method") == "Log.entryAdded" and params["entry"]["level"] == "error":
            self.errors.append(f"{params['entry']['text']} {params['entry'].get('url', '')}")

    def _wait(self, is_so: Any, what: str, timeout_s: float = ANSWER_S) -> None:
        deadline_s = time.monotonic() + timeout_s
        while not is_so():
            assert time.monotonic() < deadline_s, f"not within {timeout_s} s: {what}; errors: {self.errors}"
            time.sleep(0.05)

    def _run(self, begin: Callable[[], Awaitable[Any]]) -> Any:
        """What is begun in the loop, to its end."""

        async def to_its_end() -> Any:
            return await asyncio.wait_for(begin(), ANSWER_S)

        return self._loop.run_until_complete(to_its_end())
