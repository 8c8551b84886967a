"""The configuration: frozen sections, one for each part of the agent, with a unit under each key.

`load_config` reads YAML and the environment, reports every fault at once (path in the document, line, what was found,
what is allowed, the nearest known key: see `config_reader.py`) and returns a `Config` that cannot change. Secrets come
from files or the environment, never from the YAML itself, and are never part of a `Config`, a message or a log line.

The docstring below a key is its comment in config.yaml and its description in docs/config.schema.json; tests hold
both to what this file says.
"""

from __future__ import annotations

import functools
import hashlib
import ipaddress
import json
import logging
import os
import re
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, model_validator

from agent.config_reader import Clash, default_yaml, read_plain, read_section
from agent.domain import AgeBand, ReferenceInterval
from agent.errors import ConfigError

log = logging.getLogger(__name__)

VARIABLE_PREFIX = "HEMATOVISION_"
BROKER_PASSWORD_VARIABLE = "HEMATOVISION_BROKER_PASSWORD"
CAMERA_PASSWORD_VARIABLE = "HEMATOVISION_CAMERA_PASSWORD"
WEB_PASSWORD_VARIABLE = "HEMATOVISION_WEB_PASSWORD"

LARGEST_CONFIG_BYTES = 1_000_000
"""The default file has 10 kB; what is a hundred times larger was named by mistake (a picture, a model)."""

LARGEST_SECRET_BYTES = 4096

Identifier = Annotated[
    str, Field(pattern=r"^[a-z0-9-]{1,63}$", json_schema_extra={"x-allowed": "1 to 63 of a-z, 0-9 and hyphen"})
]
"""A part of an MQTT topic: no dots, because RabbitMQ and NATS map topics to keys in which a dot separates."""

Accession = Annotated[
    str,
    Field(
        pattern=r"^[A-Za-z0-9_-]{1,64}$",
        json_schema_extra={"x-allowed": "1 to 64 letters, digits, hyphens and underscores"},
    ),
]
"""A laboratory's token for a sample, as bar codes hold it: no blanks, so that no name of a person fits by accident."""


class Section(BaseModel):
    """One part of the configuration: immutable, and an unknown key is a fault."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)


class FolderSection(Section):
    """A folder of images, for kind folder."""

    path: Path | None = None
    """Folder of images; images are read in the natural order of their paths."""
    watch: bool = False
    """false: read what is there once, then finish. true: go on waiting for new files; each is counted once, and one
    that is deleted for more than an hour is forgotten."""
    recursive: bool = True
    """Whether sub-folders are read too."""
    settle_s: Annotated[float, Field(ge=0, le=60)] = 1.0
    """s; with watch: a file is read when its size has not changed for this long (a microscope may still be writing)."""


class VideoSection(Section):
    """A video file, for kind video."""

    path: Path | None = None
    """A video file."""
    every_nth: Annotated[int, Field(ge=1, le=1000)] = 1
    """Take each n-th picture only."""


class NetworkSection(Section):
    """An MJPEG or RTSP stream, for kind network."""

    url: (
        Annotated[
            str,
            Field(
                pattern=r"^(http|https|rtsp|rtsps)://[^/]",
                json_schema_extra={"x-allowed": "an address that starts with http://, https://, rtsp:// or rtsps://"},
            ),
        ]
        | None
    ) = None
    """Address of an MJPEG (http, https) or RTSP stream. Put no password here: see `password_file`."""
    username: str | None = None
    """User of the camera, if it asks for one."""
    password_file: Path | None = None
    """File that holds the camera's password in one line; null = the variable HEMATOVISION_CAMERA_PASSWORD, if set."""
    read_timeout_s: Annotated[float, Field(ge=0.5, le=60)] = 5.0
    """s; a stream that gives no picture for this long is closed and opened again."""


class UsbSection(Section):
    """A USB or V4L2 camera, for kind usb."""

    device: (
        Annotated[int, Field(ge=0, le=1023)]
        | Annotated[str, Field(pattern=r"^/dev/.", json_schema_extra={"x-allowed": "a path below /dev"})]
    ) = 0
    """Index of the camera, or its stable path /dev/v4l/by-id/..., which survives re-plugging."""
    width_px: Annotated[int, Field(ge=64, le=16384)] | None = None
    """px; width to ask the camera for."""
    height_px: Annotated[int, Field(ge=64, le=16384)] | None = None
    """px; height to ask the camera for."""
    fourcc: (
        Annotated[
            str,
            Field(pattern=r"^[A-Z0-9]{4}$", json_schema_extra={"x-allowed": "four of A-Z and 0-9, as MJPG or YUYV"}),
        ]
        | None
    ) = None
    """Pixel format to ask the camera for, for example MJPG or YUYV."""
    read_timeout_s: Annotated[float, Field(ge=0.5, le=60)] = 5.0
    """s; a camera that gives no picture for this long is closed and opened again."""


class SimulatedSection(Section):
    """A rendered smear with known truth, for kind simulated: needs no hardware."""

    seed: Annotated[int, Field(ge=0)] = 1
    """The slide; the same seed gives the same slide, byte for byte."""
    fields: Annotated[int, Field(ge=0, le=1_000_000)] = 0
    """How many fields the stage visits, then the camera ends; 0 = goes on for ever."""
    frame_width_px: Annotated[int, Field(ge=160, le=4096)] = 640
    """px; width of a frame."""
    frame_height_px: Annotated[int, Field(ge=120, le=4096)] = 480
    """px; height of a frame."""
    interval_s: Annotated[float, Field(ge=0, le=3600)] = 1.0
    """s; time from one field to the next."""
    overlap: Annotated[float, Field(ge=0, le=0.9)] = 0.0
    """Share of a field that the next one shows again, 0 to 0.9."""
    red_cells_per_field: Annotated[float, Field(ge=0, le=500)] = 22
    """Mean number of red cells in a field."""
    nucleated_cells_per_field: Annotated[float, Field(ge=0, le=50)] = 1.4
    """Mean number of nucleated cells in a field."""
    platelets_per_field: Annotated[float, Field(ge=0, le=100)] = 2.5
    """Mean number of platelets in a field."""
    blur_px: Annotated[float, Field(ge=0, le=20)] = 0.6
    """px; sigma of the optical blur."""
    noise: Annotated[float, Field(ge=0, le=60)] = 2.0
    """Grey levels; sigma of the sensor's noise."""
    illumination: Annotated[float, Field(ge=0.05, le=2)] = 1.0
    """Lamp brightness; 1 = well set."""
    vignetting: Annotated[float, Field(ge=0, le=0.9)] = 0.1
    """Loss of light in the corners, 0 to 0.9."""
    dust: Annotated[int, Field(ge=0, le=100)] = 0
    """Specks on the sensor, at the same pixel in each frame."""
    frozen_share: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Share of frames that repeat the one before byte for byte."""
    missing_share: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Share of frames that never arrive."""


class CameraSection(Section):
    """Where the frames come from."""

    kind: Literal["simulated", "folder", "video", "network", "usb"] = "simulated"
    """Which of the sections below is used."""
    um_per_px: Annotated[float, Field(gt=0, le=100)] | None = None
    """um; size of a pixel on the slide, from the calibration of objective and camera. null = not calibrated."""
    queue_frames: Annotated[int, Field(ge=1, le=64)] = 2
    """Frames that may wait for the models."""
    max_megapixels: Annotated[float, Field(gt=0, le=1000)] = 80
    """Megapixels; a larger picture is refused before it is decoded, to keep within memory."""
    folder: FolderSection = FolderSection()
    video: VideoSection = VideoSection()
    network: NetworkSection = NetworkSection()
    usb: UsbSection = UsbSection()
    simulated: SimulatedSection = SimulatedSection()

    @property
    def is_one_device(self) -> bool:
        """Whether all frames come from one microscope; the pictures of a folder that is read once may not."""
        return self.kind != "folder" or self.folder.watch

    @property
    def can_begin_anew(self) -> bool:
        """Whether another sample takes the same pictures from the first: stored ones of one slide, or a drawn slide."""
        return self.kind in ("video", "simulated") or (self.kind == "folder" and not self.folder.watch)


class QualitySection(Section):
    """The gate: which frames are good enough to count."""

    min_brightness: Annotated[float, Field(ge=0, le=255)] = 25
    """Grey levels; a frame darker than this on average is refused as `dark`."""
    max_clipped_pct: Annotated[float, Field(ge=0, le=100)] = 70
    """%; a frame with more pixels at full white is refused as `saturated`."""
    min_shaded_pct: Annotated[float, Field(ge=0, le=100)] = 0.15
    """%; a frame of which less is darker than the ground around it is refused as `empty`: bare glass. 0 = never."""
    max_colour_cast: Annotated[float, Field(gt=0, le=10)] = 0.45
    """Natural logarithm of blue over green, and of red over green, where no cell lies; a frame with more is refused as
    `colour-cast`. 10 = never."""
    min_focus: Annotated[float, Field(ge=0)] = 14.0
    """Thousandths; fine detail as a share of coarse detail at the edges of cells; a frame with less is refused as
    `blurred`. 0 = no fixed limit."""
    motion_window_s: Annotated[float, Field(ge=0, le=10)] = 0.5
    """s; a frame of a live camera that shows another place than one so shortly before is refused as `moving`.
    0 = never, for a camera that is triggered at each field."""
    learn: bool = True
    """Whether focus and colour are also held against what is usual on this device, learnt from accepted frames. Never
    for a folder that is read once: its pictures may come from many devices."""
    skip_unchanged: bool = True
    """Whether a field that was analysed a moment ago, and is still there, is refused as `unchanged`."""


class PreprocessingSection(Section):
    """Steps before the models, all off. What each brings and costs: docs/preprocessing.md."""

    denoise: Annotated[float, Field(ge=0, le=100)] = 0.0
    """Grey levels; noise of this size is smoothed, edges stay (bilateral filter). 0 = off."""
    white_balance: bool = False
    """Whether the channels are scaled so that the ground between the cells has its usual colour."""
    stain: bool = False
    """Whether lightness and colours are brought to the mean and spread that the models know best (Reinhard)."""
    contrast: Annotated[float, Field(ge=0, le=40)] = 0.0
    """Clip limit of adaptive histogram equalisation of the lightness (CLAHE), for example 2. 0 = off."""


class ModelsSection(Section):
    """The detector and the classifier."""

    folder: Path | None = None
    """Folder with manifest.json and the model files; null = the models that came with the package. Once models were
    activated (model.activate), those are in use instead, after a restart and an update too; `hematovision check-config`
    says so, and how to come back to this folder."""
    classifier: Annotated[str, Field(min_length=1, max_length=64)] | None = None
    """Name of the classifier where the manifest has more than one, for example mobilenetv2-x0.5; null = its first. A
    change needs a restart."""
    runtime: Literal["auto", "ai-edge-litert", "tflite-runtime"] = "auto"
    """TFLite interpreter; auto = LiteRT where installed, else tflite-runtime."""
    threads: Annotated[int, Field(ge=1, le=64)] = 2
    """CPU threads for a model."""
    min_score: Annotated[float, Field(ge=0, le=1)] | None = None
    """Detector's threshold, 0 to 1; null = the one in the manifest."""
    min_probability: Annotated[float, Field(ge=0, le=1)] | None = None
    """A cell named with less is `unidentified`, 0 to 1; null = the one in the manifest."""
    most_tiles: Annotated[int, Field(ge=1, le=64)] = 16
    """Frames in which red cells are narrower than a tenth of the longer side are looked at in up to so many overlapping
    tiles, each of which takes the time of a field; 1 = every frame is looked at once, as a whole."""


class SampleSection(Section):
    """The slide under the microscope."""

    id: Identifier | None = None
    """The sample's id in topics; null = the agent makes one for each slide (date, boot and number). Another one begins
    another sample at the next start: a folder that is read once, or a video, from its beginning; in a watched folder
    with what has not been counted."""
    start: Literal["auto", "each-slide", "command"] = "auto"
    """auto = a sample begins at the agent's first start, and at the next start after a folder or video was read to its
    end; after one that has stopped otherwise, cmd/start begins the next. each-slide = and when another slide is seen,
    which ends the sample before; command = only cmd/start begins one."""
    absence_s: Annotated[float, Field(ge=2, le=3600)] = 15.0
    """s; with each-slide: so long no slide is in view, or the agent is off, before a field at an unknown place is taken
    for another slide. A new start of the computer counts as long enough."""
    accession: Accession | None = None
    """The laboratory's opaque token for the sample (a bar code); never a name, a birth date or a personal fact."""
    age_band: AgeBand | None = None
    """Age band of the person, which chooses the reference intervals; null = not told, nothing is judged."""
    stop_at_cells: Annotated[int, Field(ge=1, le=1_000_000)] | None = None
    """Nucleated cells with a name at which a sample stops by itself, usually 100, 200 or 400; null = it goes on."""
    stop_at_half_width_pct: Annotated[float, Field(ge=0.5, le=50)] | None = None
    """% points; a sample stops by itself when the widest 95 % interval is +- this or narrower; null = it goes on."""


class DifferentialSection(Section):
    """How the counts become a differential."""

    interval: Literal["clopper-pearson", "goodman"] = "clopper-pearson"
    """95 % intervals of the shares: clopper-pearson = exact, each for itself; goodman = wider, all of them together."""
    correct_confusions: bool = True
    """Whether a column is added that takes out the classifier's known confusions, where the manifest has them."""
    reference_file: Path | None = None
    """The laboratory's own table of reference intervals; null = the one that came with the package."""
    update_s: Annotated[float, Field(ge=0, le=3600)] = 5.0
    """s; shortest time between two running differentials of a sample. The final one never waits."""
    field_area_mm2: Annotated[float, Field(gt=0, le=100)] | None = None
    """mm2; area that a field shows; null = from camera.um_per_px, else unknown."""
    chamber_depth_mm: Annotated[float, Field(gt=0, le=10)] | None = None
    """mm; depth of a counting chamber (Neubauer 0.1): cells per microlitre are told. null = a smear, no chamber."""
    dilution: Annotated[float, Field(ge=1, le=100_000)] = 1.0
    """Dilution of the blood in the chamber: 20 = one part in twenty."""


class ReviewSection(Section):
    """Cells that a person should look at: `hematovision review`. Their pictures stay on this device."""

    enabled: bool = True
    """Whether cells that the models are unsure of enter the review list, with their pictures."""
    max_margin: Annotated[float, Field(ge=0, le=1)] = 0.2
    """A named cell whose first two probabilities are nearer than this enters the list too; 0 = only `unidentified`."""
    gallery: Annotated[int, Field(ge=0, le=100)] = 6
    """Pictures of surely named cells that are kept of each class and sample, for the report's gallery."""
    max_mb: Annotated[float, Field(ge=1, le=100_000)] = 64
    """MB; when the pictures have grown to this the oldest go, first those that nobody waits for."""


class DriftSection(Section):
    """Whether colours, focus, sureness and class mix move away from what was usual on this device: alert/drift."""

    enabled: bool = True
    """Whether it is watched. Never for a folder that is read once: its pictures may come from many devices."""
    slides: Annotated[int, Field(ge=5, le=10_000)] = 30
    """Finished samples from which it is learnt what is usual, and how far slides differ. Few of them make wide
    limits."""
    limit: Annotated[float, Field(ge=2, le=20)] = 4.0
    """Standard deviations of the moving average beyond which a figure has moved. A lower limit tells sooner, and more
    often without a cause."""


class PicturesSection(Section):
    """Whole fields that were counted, kept so that `hematovision replay` can analyse them again."""

    keep_mb: Annotated[float, Field(ge=0, le=10_000_000)] = 0
    """MB; counted fields are kept without loss beside the outbox, up to this; then the oldest go. 0 = none are kept: a
    picture of 640 x 480 pixels takes about 0.5 MB, one of 12 megapixels about 20 MB and most of a second."""


class OutboxSection(Section):
    """The results on disk that nobody has confirmed yet, and for a while those that are confirmed."""

    folder: Path | None = None
    """Folder of the outbox; must be on a local disk. The service must be allowed to write to it: docs/outbox.md, on
    another disk. null = $STATE_DIRECTORY (systemd), else $XDG_STATE_HOME/hematovision, else
    ~/.local/state/hematovision."""
    max_mb: Annotated[float, Field(ge=1, le=1_000_000)] = 2048
    """MB; when the outbox has grown to this, room is made: first confirmed results go, then cells (their fields hold
    them too) and old events, and what goes is counted. When that is not enough, intake stops; a sample can still be
    ended. The map of the running sample takes up to 40 MB."""
    min_free_mb: Annotated[float, Field(ge=0, le=1_000_000)] = 64
    """MB; disk space that the outbox leaves free; below it, the pictures that lie beside it go first, then it makes
    room in the same way, and then intake stops."""


class DeliverySection(Section):
    """Until when a result is kept on this device, and how it is sent again."""

    confirm: Literal["broker", "receiver"] = "broker"
    """Whose word lets a result leave: broker = its acknowledgement (what it loses afterwards is lost; while nobody
    subscribes, results wait here); receiver = the receivers' own word that they have it on disk (ack/{receiver})."""
    receiver: Annotated[
        str,
        Field(
            pattern=r"^[a-z0-9-]{1,63}( *, *[a-z0-9-]{1,63}){0,7}$",
            json_schema_extra={"x-allowed": "a name as in ack/{receiver}, or up to 8 of them separated by commas"},
        ),
    ] = "central"
    """For confirm: receiver. Whose word counts; of several, a result waits for the word of each."""
    resend_s: Annotated[float, Field(ge=1, le=86400)] = 60
    """s; for confirm: receiver. What was sent and not confirmed for this long is sent again; the time doubles, up to
    an hour, while no receiver confirms anything."""
    unconfirmed: Annotated[int, Field(ge=20, le=100_000)] = 2000
    """Messages; for confirm: receiver. At this many sent and not confirmed, no new ones are sent."""
    keep_hours: Annotated[float, Field(ge=0, le=8760)] = 72
    """hours; for how long confirmed results are kept as well, to be sent again at cmd/replay; 0 = not at all."""
    keep_mb: Annotated[float, Field(ge=0, le=1_000_000)] = 256
    """MB; how much of them is kept. They are the first to go when the outbox or the disk becomes full."""

    @property
    def receivers(self) -> tuple[str, ...]:
        """The names in `receiver`, each once."""
        return tuple(dict.fromkeys(name.strip() for name in self.receiver.split(",")))


class TlsSection(Section):
    """Encryption of the connection to the broker."""

    enabled: bool = False
    """true = encrypted connection."""
    ca_file: Path | None = None
    """PEM file of the authority that signed the broker's certificate; null = the system's authorities."""
    certificate_file: Path | None = None
    """PEM file of this device's certificate, if the broker asks for one."""
    key_file: Path | None = None
    """PEM file of the certificate's private key."""


class BrokerSection(Section):
    """The MQTT broker that takes the results."""

    host: Annotated[str, Field(pattern=r"^[^\s/]+$", json_schema_extra={"x-allowed": "a name or address"})] = (
        "127.0.0.1"
    )
    """Name or address of the broker."""
    port: Annotated[int, Field(ge=1, le=65535)] = 1883
    """TCP port; usually 1883, with TLS 8883."""
    protocol: Literal["auto", "5", "3.1.1"] = "auto"
    """MQTT version; auto = 5, and 3.1.1 when the broker refuses 5."""
    username: str | None = None
    """User at the broker; null = none."""
    password_file: Path | None = None
    """File that holds the password in one line; null = the variable HEMATOVISION_BROKER_PASSWORD, if set."""
    keepalive_s: Annotated[int, Field(ge=2, le=3600)] = 8
    """s; a dead broker is noticed after about twice this."""
    window: Annotated[int, Field(ge=1, le=20)] = 20
    """Messages under way without an acknowledgement; never above the broker's Receive Maximum."""
    max_backoff_s: Annotated[float, Field(ge=0.1, le=3600)] = 30
    """s; longest pause between two attempts to connect."""
    tls: TlsSection = TlsSection()


class PublishSection(Section):
    """What is published, and how often."""

    cells: bool = True
    """Whether each cell is published on cell/{sample} too; the field message holds all of them anyway."""
    images: bool = False
    """Whether the crop of each nucleated cell and platelet is published on image/{sample}/{cell} as JPEG. They are not
    kept: what no broker takes at once is dropped."""
    health_interval_s: Annotated[float, Field(ge=1, le=3600)] = 30
    """s; time between two health messages."""


class CommandsSection(Section):
    """Commands that come over MQTT."""

    enabled: bool = True
    """Whether the agent listens to cmd/{name} at all."""
    operator: Literal["none", "broker", "key"] = "none"
    """What shows that reload and model.* come from an operator: none = they are refused; broker = its access list says
    who may write to these topics; key = they are signed with the key below."""
    operator_key_file: Path | None = None
    """File with the operators' key in one line (32 characters or more), for operator: key."""
    staging_folder: Path | None = None
    """Folder in which new models are put, each in a folder of its own, for model.stage; null = models/staging beside
    the outbox."""


class WebSection(Section):
    """The local page: watch the counting, drive a sample, review cells, have a picture examined. Extra: web."""

    enabled: bool = False
    """Whether the agent serves the page."""
    host: Annotated[str, Field(pattern=r"^[^\s/]+$", json_schema_extra={"x-allowed": "a name or address"})] = (
        "127.0.0.1"
    )
    """Address on which it listens: 127.0.0.1 = this computer alone; 0.0.0.0 = all networks, which needs a password."""
    port: Annotated[int, Field(ge=1, le=65535)] = 8080
    """TCP port on which it listens; below 1024 needs rights that the service has not."""
    password_file: Path | None = None
    """File that holds the page's password in one line, of 8 characters or more; null = the variable
    HEMATOVISION_WEB_PASSWORD, if set. Without one, whoever uses this computer may use the page."""
    names: (
        Annotated[
            str,
            Field(
                pattern=r"^[A-Za-z0-9.-]{1,253}( *, *[A-Za-z0-9.-]{1,253}){0,7}$",
                json_schema_extra={"x-allowed": "a host name, or up to 8 of them separated by commas"},
            ),
        ]
        | None
    ) = None
    """Names by which browsers reach the page, besides its addresses, localhost and this computer's own name; under any
    other name it does not answer."""
    certificate_file: Path | None = None
    """PEM file of the page's certificate: https. null = http, over which the password can be read on the way."""
    key_file: Path | None = None
    """PEM file of the certificate's private key; null = it stands in the certificate's file."""
    max_upload_mb: Annotated[float, Field(ge=0.1, le=200)] = 20
    """MB; a larger file is not taken to be examined."""
    max_upload_megapixels: Annotated[float, Field(gt=0, le=80)] = 12
    """Megapixels; a larger picture is not examined."""

    @property
    def is_local(self) -> bool:
        """Whether only this computer can reach the page."""
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"


class LogSection(Section):
    """What the agent tells about itself."""

    level: Literal["debug", "info", "warning", "error"] = "info"
    """What is logged to standard error (under systemd: the journal)."""


class Config(Section):
    """The whole configuration. Every key has a default; an empty file runs the simulated slide."""

    site: Identifier = "site"
    """Name of the laboratory in topics: a-z, 0-9, hyphen."""
    device: Identifier = "microscope-1"
    """Name of this microscope in topics; unique at the broker: two devices of one name knock each other off."""
    camera: CameraSection = CameraSection()
    quality: QualitySection = QualitySection()
    preprocessing: PreprocessingSection = PreprocessingSection()
    models: ModelsSection = ModelsSection()
    sample: SampleSection = SampleSection()
    differential: DifferentialSection = DifferentialSection()
    review: ReviewSection = ReviewSection()
    drift: DriftSection = DriftSection()
    pictures: PicturesSection = PicturesSection()
    outbox: OutboxSection = OutboxSection()
    delivery: DeliverySection = DeliverySection()
    broker: BrokerSection = BrokerSection()
    publish: PublishSection = PublishSection()
    commands: CommandsSection = CommandsSection()
    web: WebSection = WebSection()
    log: LogSection = LogSection()


def load_config(path: Path | None, environment: Mapping[str, str] | None = None) -> Config:
    """The configuration from a file (None = the packaged one) and the environment; `ConfigError` tells all faults."""
    path = path or packaged_folder() / "config.yaml"
    return loads(read_text(path), str(path), folder=path.absolute().parent, environment=environment)


def loads(
    text: str, source: str, *, folder: Path | None = None, environment: Mapping[str, str] | None = None
) -> Config:
    """The configuration from a YAML text; an empty one gives all defaults.

    source: names the text in messages.   folder: where relative paths start; None = the working directory.
    environment: None = this process's; its variables HEMATOVISION_SECTION__KEY go before the text.
    """
    return read_section(
        Config,
        text,
        source,
        folder=folder or Path.cwd(),
        environment=os.environ if environment is None else environment,
        prefix=VARIABLE_PREFIX,
        other_variables=(BROKER_PASSWORD_VARIABLE, CAMERA_PASSWORD_VARIABLE, WEB_PASSWORD_VARIABLE),
        find_clashes=_clashes,
    )


def read_text(path: Path) -> str:
    try:
        with path.open("rb") as file:
            content = file.read(LARGEST_CONFIG_BYTES + 1)
    except FileNotFoundError as error:
        raise ConfigError(
            str(path), ("there is no such file; `hematovision check-config --template` prints one",)
        ) from error
    except IsADirectoryError as error:
        raise ConfigError(str(path), ("this is a folder; name the configuration file in it",)) from error
    except OSError as error:
        raise ConfigError(str(path), (f"cannot be read: {error.strerror}",)) from error
    if len(content) > LARGEST_CONFIG_BYTES:
        raise ConfigError(str(path), (f"larger than {LARGEST_CONFIG_BYTES} bytes; this is no configuration file",))
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        fault = f"line {line}: byte {content[error.start]:#04x} is not UTF-8; save the file as UTF-8 text"
        raise ConfigError(str(path), (fault,)) from error


def _clashes(config: Config) -> Iterator[Clash]:
    """Keys that are allowed for themselves and do not go together."""
    camera, network, broker, tls = config.camera, config.camera.network, config.broker, config.broker.tls
    needed = {
        "folder": ("path", camera.folder.path, "the folder of images"),
        "video": ("path", camera.video.path, "the video file"),
        "network": ("url", network.url, "the address of the stream"),
    }
    if camera.kind in needed:
        name, value, meaning = needed[camera.kind]
        if value is None:
            key = ("camera", camera.kind, name)
            message = f"found '{camera.kind}', which needs {'.'.join(key)}; put {meaning} there"
            yield Clash(("camera", "kind"), (key,), message)
    if network.url and re.match(r"[a-z]+://[^/@]*:[^/@]*@", network.url):
        message = "holds a password; take it out and use camera.network.username and password_file"
        yield Clash(("camera", "network", "url"), (), message)
    for section, path in ((network, ("camera", "network")), (broker, ("broker",))):
        if section.password_file and section.username is None:
            message = f"a password without a user; set {'.'.join((*path, 'username'))} too"
            yield Clash((*path, "password_file"), ((*path, "username"),), message)
    if tls.key_file and tls.certificate_file is None:
        message = "a key without its certificate; set broker.tls.certificate_file too"
        yield Clash(("broker", "tls", "key_file"), (("broker", "tls", "certificate_file"),), message)
    if config.web.key_file and config.web.certificate_file is None:
        message = "a key without its certificate; set web.certificate_file too"
        yield Clash(("web", "key_file"), (("web", "certificate_file"),), message)
    if config.commands.operator == "key" and config.commands.operator_key_file is None:
        message = "found 'key', which needs commands.operator_key_file; put the file with the key there"
        yield Clash(("commands", "operator"), (("commands", "operator_key_file"),), message)
    if config.sample.start == "each-slide":
        for name in ("id", "accession"):
            if getattr(config.sample, name) is not None:
                message = (
                    "one for all slides, but sample.start is each-slide; leave it null, or begin samples by cmd/start"
                )
                yield Clash(("sample", name), (("sample", "start"),), message)
    if config.differential.dilution != 1 and config.differential.chamber_depth_mm is None:
        message = "a dilution without a chamber; set differential.chamber_depth_mm too"
        yield Clash(("differential", "dilution"), (("differential", "chamber_depth_mm"),), message)
    for name in ("ca_file", "certificate_file", "key_file"):
        if getattr(tls, name) and not tls.enabled:
            message = "given, but broker.tls.enabled is false: the connection would not be encrypted; set it to true"
            yield Clash(("broker", "tls", name), (("broker", "tls", "enabled"),), message)


class ReferenceRow(BaseModel):
    """One line of the table of reference intervals."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    class_name: Annotated[str, Field(alias="class", min_length=1)]
    age_band: AgeBand
    low_pct: Annotated[float, Field(ge=0, le=100)]
    high_pct: Annotated[float, Field(ge=0, le=100)]
    source: Annotated[str, Field(min_length=1)]

    @model_validator(mode="after")
    def _is_an_interval(self) -> ReferenceRow:
        if self.low_pct > self.high_pct:
            raise ValueError("low_pct is above high_pct")
        return self


def load_reference_intervals(path: Path | None = None) -> tuple[ReferenceInterval, ...]:
    """The table of reference intervals of a file; None = the packaged one. Raises ConfigError with all its faults."""
    path = path or Path(__file__).resolve().parent / "analysis" / "reference_intervals.yaml"
    source = str(path)
    try:
        rows = TypeAdapter(list[ReferenceRow]).validate_python(read_plain(read_text(path), source))
    except ValidationError as error:
        faults = (
            f"row {int(fault['loc'][0]) + 1 if fault['loc'] else '?'}, "
            f"{'.'.join(str(part) for part in fault['loc'][1:]) or 'the whole'}: {fault['msg']}"
            for fault in error.errors()
        )
        raise ConfigError(source, tuple(faults)) from error
    seen: set[tuple[str, str]] = set()
    for number, row in enumerate(rows, start=1):
        if (row.class_name, row.age_band) in seen:
            raise ConfigError(source, (f"row {number}: {row.class_name}, {row.age_band} stands there twice",))
        seen.add((row.class_name, row.age_band))
    return tuple(ReferenceInterval(row.class_name, row.age_band, row.low_pct, row.high_pct, row.source) for row in rows)


def read_secret(file: Path | None, variable: str, environment: Mapping[str, str] | None = None) -> str | None:
    """A password from its file, or where no file is named from the variable of the environment; None = neither.

    One line break at the end of the file does not count, nor the mark that editors on Windows put before UTF-8. The
    secret is never logged; a file that other users of this computer can read is warned about. Raises `ConfigError` for
    a file that is missing, empty or no single line.
    """
    if file is None:
        return (os.environ if environment is None else environment).get(variable) or None
    try:
        with file.open("rb") as stream:
            mode = os.fstat(stream.fileno()).st_mode
            secret = stream.read(LARGEST_SECRET_BYTES + 1).decode("utf-8-sig")
    except OSError as error:
        reason = f"the password file cannot be read: {error.strerror}; without a file, {variable} is taken"
        raise ConfigError(str(file), (reason,)) from error
    except UnicodeDecodeError:
        # `from None`: the cause carries the bytes of the file, and they may end in a log.
        raise ConfigError(str(file), ("the password file is not UTF-8 text",)) from None
    if mode & stat.S_IROTH:
        _warn_of_open_file(file)
    secret = secret.removesuffix("\n").removesuffix("\r")
    if not secret or "\n" in secret or len(secret) > LARGEST_SECRET_BYTES:
        raise ConfigError(str(file), ("the password file must hold the password in one line and nothing else",))
    return secret


SHORTEST_KEY = 32
"""Characters of the operators' key: 128 bits in hexadecimal."""


def read_operator_key(section: CommandsSection) -> bytes | None:
    """The key with which operators' commands are signed; None where they are not. Raises ConfigError."""
    if section.operator != "key" or section.operator_key_file is None:
        return None
    secret = read_secret(section.operator_key_file, "") or ""
    if len(secret) < SHORTEST_KEY:
        fault = f"the operators' key must have {SHORTEST_KEY} characters or more; `openssl rand -hex 32` makes one"
        raise ConfigError(str(section.operator_key_file), (fault,))
    return secret.encode()


SHORTEST_WEB_PASSWORD = 8
"""Characters: with ten tries a minute (`agent.web.guard`) that is centuries."""


def read_web_password(section: WebSection, environment: Mapping[str, str] | None = None) -> str | None:
    """The page's password; None where the page needs none. Raises ConfigError where one is needed and not there."""
    secret = read_secret(section.password_file, WEB_PASSWORD_VARIABLE, environment)
    if secret is None and not section.is_local:
        fault = (
            f"found '{section.host}', which other computers can reach: that needs a password. Name its file in "
            f"web.password_file or set {WEB_PASSWORD_VARIABLE}, or let web.host be 127.0.0.1"
        )
        raise ConfigError("web.host", (fault,))
    if secret is not None and len(secret) < SHORTEST_WEB_PASSWORD:
        source = WEB_PASSWORD_VARIABLE if section.password_file is None else str(section.password_file)
        raise ConfigError(source, (f"the page's password must have {SHORTEST_WEB_PASSWORD} characters or more",))
    return secret


@functools.cache  # once for each file: the publisher reads its password again with every connection
def _warn_of_open_file(file: Path) -> None:
    log.warning("password file %s is readable for all users of this computer; `chmod 600` mends it", file)


def config_sha256(config: Config) -> str:
    """64 hex digits that name the effective configuration; equal settings give equal digits, secrets have no part."""
    canonical = json.dumps(config.model_dump(mode="json"), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()


def json_schema() -> dict[str, Any]:
    """JSON Schema 2020-12 of the configuration, for editors; committed as docs/config.schema.json."""
    schema = Config.model_json_schema()
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **schema,
        "title": "HematoVision agent configuration",
    }


TEMPLATE_HEAD = """\
# yaml-language-server: $schema=docs/config.schema.json

Configuration of the HematoVision agent, with every key at its default. Research use only.

Keep only what you change: a missing key has its default, an unknown key is refused.
`hematovision check-config FILE` says whether the file is right and whether the camera, the broker and the folders
that it names answer. Relative paths start at the folder of this file; ~ is your home folder.
The variable HEMATOVISION_SECTION__KEY goes before this file, for example HEMATOVISION_BROKER__HOST.
Passwords never stand here: see the keys password_file.
"""


def template() -> str:
    """The default configuration as a commented YAML file; committed as config.yaml."""
    return default_yaml(Config, TEMPLATE_HEAD)


def packaged_folder() -> Path:
    """Where the models and the default configuration are: inside the installed package, else the checkout's top."""
    agent_folder = Path(__file__).resolve().parent
    packaged = agent_folder / "_packaged"
    return packaged if packaged.is_dir() else agent_folder.parent


def models_folder(section: ModelsSection) -> Path:
    """The folder with manifest.json and the model files."""
    return section.folder or packaged_folder() / "models"


def state_folder(section: OutboxSection, environment: Mapping[str, str] | None = None) -> Path:
    """The folder of the outbox: as configured, else systemd's StateDirectory, else the user's state folder (XDG)."""
    environment = os.environ if environment is None else environment
    if section.folder is not None:
        return section.folder
    if given := environment.get("STATE_DIRECTORY"):
        return Path(given.split(":")[0])  # systemd gives all of a unit's folders, separated by colons
    home = environment.get("XDG_STATE_HOME")
    # The XDG specification has relative values ignored.
    return (Path(home) if home and Path(home).is_absolute() else Path.home() / ".local" / "state") / "hematovision"
