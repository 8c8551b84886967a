"""What the page answers to each request; everything that decides or reads is elsewhere.

| request                         | answer                                                                           |
|---------------------------------|----------------------------------------------------------------------------------|
| GET  /                          | the page; the question for the password to who is not in                         |
| POST /login, /logout            | in and out                                                                       |
| GET  /static/{name}             | style and script                                                                 |
| GET  /api/state                 | all that is watched                                                              |
| GET  /api/frame/{number}.jpg    | the picture that a state speaks of                                               |
| POST /api/command/{name}        | a command, as on cmd/{name}; its reply                                           |
| GET  /api/review                | the review list                                                                  |
| GET  /api/map                   | the map of the sample's slide                                                    |
| GET  /api/crop/{sample}/{cell}  | the picture of a cell of it                                                      |
| POST /api/picture               | an uploaded picture; what was found in it                                        |
| GET  /api/picture/{id}.jpg      | that picture, as a browser can show it                                           |
| HEAD, where there is a GET      | the same without its body (RFC 9110, 9.3.2)                                      |
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import secrets
import time
from collections import OrderedDict
from collections.abc import Awaitable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import tornado.web

from agent.config import WebSection
from agent.delivery.commands import EXPIRES_S, InboundCommand
from agent.errors import OutboxError
from agent.web.examining import Examiner, ExaminerBusy, ExaminerFailed
from agent.web.guard import Pace, Sessions, TooManyTries, is_own_name, is_own_origin
from agent.web.reading import Reader
from agent.web.views import Sights

COMMANDS = frozenset({"start", "pause", "resume", "stop", "amend"})
"""What the page may ask. None of these needs the operator's role: with `commands.operator: broker` it is the broker's
rights that make an operator, and what comes from here has not passed them."""

CHANGES_NOTHING = frozenset({"GET", "HEAD"})
"""Methods that any page may have a browser send: it is not told the answer, and nothing is other than before."""

COOKIE = "hv_page"

KEPT_UPLOADS = 4
"""Examined pictures that are kept for the browsers that have just sent them."""

SLOW_ANSWER_S = 0.3
"""s; before each answer about a password."""

STATIC = Path(__file__).parent / "static"

CONTENT_TYPES: Mapping[str, str] = MappingProxyType(
    {
        ".html": "text/html; charset=utf-8",
        ".css": "text/css; charset=utf-8",
        ".js": "text/javascript; charset=utf-8",
        ".svg": "image/svg+xml",
    }
)

HEADERS: Mapping[str, str] = MappingProxyType(
    {
        # Nothing from elsewhere, no script or style in the text of a page, and nobody may frame it.
        "Content-Security-Policy": (
            "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
            "form-action 'none'; base-uri 'none'; frame-ancestors 'none'"
        ),
        "X-Content-Type-Options": "nosniff",
        "X-Frame-Options": "DENY",
        "Referrer-Policy": "no-referrer",
        "Cross-Origin-Opener-Policy": "same-origin",
        "Cross-Origin-Resource-Policy": "same-origin",
        "Permissions-Policy": "camera=(), microphone=(), geolocation=()",
        "Cache-Control": "no-store",
        "Server": "HematoVision",
    }
)


@dataclass(slots=True, eq=False)
class Parts:
    """What the handlers work with; all of it lives on the page's loop. uploads: one at a time."""

    section: WebSection
    sights: Sights
    reader: Reader
    examiner: Examiner
    sessions: Sessions
    pace: Pace
    names: frozenset[str]
    uploads: asyncio.Semaphore
    examined: OrderedDict[str, bytes] = field(default_factory=OrderedDict)


class Handler(tornado.web.RequestHandler):
    """What all of them have in common: who is let in, the headers, and refusals in words."""

    is_for_all = False
    """Whether who is not in gets an answer too."""

    def initialize(self, parts: Parts) -> None:
        self.parts = parts

    def set_default_headers(self) -> None:
        for name, value in HEADERS.items():
            self.set_header(name, value)

    async def prepare(self) -> None:
        """Let the request in, or end it with a reason."""
        parts, request = self.parts, self.request
        wait_s = parts.pace.wait_s()
        await asyncio.sleep(parts.pace.longest_wait_s if wait_s is None else wait_s)
        if wait_s is None:
            self.refuse(429, "too many requests; wait a moment")
        elif not is_own_name(request.host, parts.names):
            self.refuse(421, "the page does not answer under this name; use its address, or put the name in web.names")
        elif request.method not in CHANGES_NOTHING and not is_own_origin(
            request.headers.get("Origin"), request.protocol, request.host
        ):
            self.refuse(403, "only this page itself may send this")
        elif not (self.is_for_all or self.is_in):
            self.refuse(401, "the password is needed")

    async def head(self, *parts_of_path: str) -> None:
        """As GET, which refuses where there is none; the framework leaves the body out."""
        answering = self.get(*parts_of_path)
        if answering is not None:
            await answering

    @property
    def is_in(self) -> bool:
        return self.parts.sessions.is_in(self.get_cookie(COOKIE))

    def refuse(self, status: int, message: str) -> None:
        """End the request with a reason in words."""
        self.set_status(status)
        self.answer({"message": message})

    def answer(self, body: Mapping[str, Any] | bytes) -> None:
        self.set_header("Content-Type", "application/json")
        self.finish(body if isinstance(body, bytes) else json.dumps(body).encode())

    def answer_picture(self, jpeg: bytes | None, message: str) -> None:
        if not jpeg:
            self.refuse(404, message)
            return
        self.set_header("Content-Type", "image/jpeg")
        self.finish(jpeg)

    def write_error(self, status_code: int, **_details: Any) -> None:
        words = {404: "there is nothing of this name", 405: "not in this way", 500: "the page has failed at this"}
        self.answer({"message": words.get(status_code, "this request is not understood")})


class Front(Handler):
    is_for_all = True

    def get(self) -> None:
        self.set_header("Content-Type", CONTENT_TYPES[".html"])
        self.finish(ASSETS["index.html" if self.is_in else "login.html"])


class Asset(Handler):
    is_for_all = True

    def get(self, name: str) -> None:
        if name not in ASSETS or name.endswith(".html"):
            raise tornado.web.HTTPError(404)
        self.set_header("Content-Type", CONTENT_TYPES[Path(name).suffix])
        self.set_header("Cache-Control", "no-cache")  # asked again, by its ETag: an update of the agent shows at once
        self.finish(ASSETS[name])


class Login(Handler):
    is_for_all = True

    async def post(self) -> None:
        await asyncio.sleep(SLOW_ANSWER_S)
        try:
            token = self.parts.sessions.begin(_password_of(self.request.body))
        except TooManyTries as error:
            self.refuse(429, str(error))
            return
        if token is None:
            self.refuse(403, "this is not the password")
            return
        is_encrypted = self.request.protocol == "https"
        self.set_cookie(COOKIE, token, path="/", httponly=True, samesite="Strict", secure=is_encrypted)
        self.answer({"message": "in"})


class Logout(Handler):
    is_for_all = True

    def post(self) -> None:
        self.parts.sessions.end(self.get_cookie(COOKIE))
        self.clear_cookie(COOKIE, path="/", samesite="Strict")
        self.answer({"message": "out"})


class State(Handler):
    async def get(self) -> None:
        section = self.parts.section
        limits = {
            "needs_password": self.parts.sessions.needs_password,
            "max_upload_mb": section.max_upload_mb,
            "max_upload_megapixels": section.max_upload_megapixels,
        }
        state = await self.parts.reader.state()
        self.answer(b'{"page":' + json.dumps(limits).encode() + b"," + state[1:])


class FramePicture(Handler):
    async def get(self, number: str) -> None:
        self.answer_picture(await self.parts.reader.picture(int(number)), "a newer field has come meanwhile")


class SendCommand(Handler):
    """A command goes where those of the broker go, and is judged, done, answered and audited as they are."""

    async def post(self, name: str) -> None:
        if name not in COMMANDS:
            self.refuse(404, f"the page sends {', '.join(sorted(COMMANDS))}; others come over the broker")
            return
        loop = asyncio.get_running_loop()
        reply: asyncio.Future[Mapping[str, Any]] = loop.create_future()

        def hear_reply(body: Mapping[str, Any]) -> None:
            with contextlib.suppress(RuntimeError):  # the page has ended
                loop.call_soon_threadsafe(_settle, reply, body)

        inbound = InboundCommand(name, self.request.body, received_monotonic_s=time.monotonic(), hear_reply=hear_reply)
        if not self.parts.sights.send(inbound):
            self.refuse(503, "no command is taken now: the agent is ending, or too many wait")
            return
        try:
            body = await asyncio.wait_for(reply, EXPIRES_S)
        except asyncio.TimeoutError:
            self.refuse(504, "no answer yet; it may still be done. Sent again unchanged it is not done twice")
            return
        self.parts.reader.forget()
        self.answer(body)


class FromOutbox(Handler):
    """What is read from the disk, which may refuse."""

    async def answer_with(self, reading: Awaitable[bytes], what: str) -> None:
        try:
            self.answer(await reading)
        except OutboxError as error:
            self.refuse(503, f"{what} cannot be read now: {error}")


class Review(FromOutbox):
    async def get(self) -> None:
        await self.answer_with(self.parts.reader.review(), "the review list")


class SlideMap(FromOutbox):
    async def get(self) -> None:
        await self.answer_with(self.parts.reader.slide_map(), "the fields")


class Crop(Handler):
    async def get(self, sid: str, cell_id: str) -> None:
        self.answer_picture(await self.parts.reader.crop(sid, cell_id), "the picture of this cell is not kept any more")


@tornado.web.stream_request_body
class Upload(Handler):
    """A picture to be examined. Its bytes are taken in only from who is in, up to the limit, one at a time."""

    async def prepare(self) -> None:
        self._has_slot = False
        self._content = bytearray()
        await super().prepare()
        if self._finished:
            return
        limit_bytes = int(self.parts.section.max_upload_mb * 2**20)
        length = self.request.headers.get("Content-Length", "")
        if not length.isdecimal() or int(length) > limit_bytes:
            self.refuse(413, f"more than {self.parts.section.max_upload_mb:g} MB (web.max_upload_mb), or of no length")
        elif int(length) == 0:
            self.refuse(422, "the file is empty")
        elif self.parts.uploads.locked():
            self.refuse(429, "another picture is being examined; try again in a moment")
        else:
            await self.parts.uploads.acquire()
            self._has_slot = True
            assert self.request.connection is not None
            self.request.connection.set_max_body_size(limit_bytes)  # type: ignore[attr-defined]

    def data_received(self, chunk: bytes) -> None:
        self._content += chunk

    async def post(self) -> None:
        try:
            found, jpeg = await self.parts.examiner.examine(bytes(self._content))
        except ExaminerBusy as error:
            self.refuse(429, str(error))
        except ExaminerFailed as error:
            self.refuse(422, str(error))
        else:
            if "error" in found:
                self.refuse(422, str(found["error"]))
            else:
                self.answer({**found, "picture": self._keep(jpeg)})

    def on_finish(self) -> None:
        self._leave()

    def on_connection_close(self) -> None:
        super().on_connection_close()
        self._leave()

    def _leave(self) -> None:
        if self._has_slot:
            self._has_slot = False
            self.parts.uploads.release()

    def _keep(self, jpeg: bytes) -> str:
        examined, name = self.parts.examined, secrets.token_hex(8)
        examined[name] = jpeg
        while len(examined) > KEPT_UPLOADS:
            examined.popitem(last=False)
        return name


class UploadedPicture(Handler):
    def get(self, name: str) -> None:
        self.answer_picture(self.parts.examined.get(name), "this picture is not kept any more")


class Nothing(Handler):
    def get(self) -> None:
        raise tornado.web.HTTPError(404)

    post = get


ROUTES: tuple[tuple[str, type[Handler]], ...] = (
    (r"/", Front),
    (r"/static/([a-z.-]{1,40})", Asset),
    (r"/login", Login),
    (r"/logout", Logout),
    (r"/api/state", State),
    (r"/api/frame/([0-9]{1,12})\.jpg", FramePicture),
    (r"/api/command/([a-z.]{1,32})", SendCommand),
    (r"/api/review", Review),
    (r"/api/map", SlideMap),
    (r"/api/crop/([a-z0-9-]{1,63})/([a-z0-9-]{1,80})", Crop),
    (r"/api/picture", Upload),
    (r"/api/picture/([0-9a-f]{16})\.jpg", UploadedPicture),
    (r".*", Nothing),
)


# ------------------------------------------------------------------------------------------------------- the parts


def _settle(reply: asyncio.Future[Mapping[str, Any]], body: Mapping[str, Any]) -> None:
    if not reply.done():
        reply.set_result(body)


def _password_of(body: bytes) -> str:
    """What was typed; empty where the request holds none."""
    try:
        said = json.loads(body)
    except (ValueError, RecursionError):
        return ""
    password = said.get("password") if isinstance(said, dict) else None
    return password if isinstance(password, str) else ""


def _read_assets() -> Mapping[str, bytes]:
    return MappingProxyType({file.name: file.read_bytes() for file in STATIC.iterdir() if file.suffix in CONTENT_TYPES})


ASSETS = _read_assets()
"""All files that the page is made of, by name; they come with the package."""
