"""The program that examines uploaded pictures for the page: `python -m agent.examiner`, started by the page.

    stdin: the configuration, then picture after picture  ->  stdout: for each what was found as JSON, and a JPEG of it

A process of its own, with interpreters of its own: a picture that breaks a decoder, or takes all memory, ends this
program and not the counting; and its memory is given back when nobody uploads any more. It ends with its input.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from agent.analysis.crops import encode_jpeg
from agent.analysis.preprocessing import preprocess
from agent.bench import Bench, make_bench
from agent.camera.decoding import MIN_CROP_SIDE_PX, MIN_FIELD_SIDE_PX, decode_bytes
from agent.camera.headers import PictureFault, read_header
from agent.config import Config
from agent.delivery.messages import Body
from agent.domain import Classification, Pixels, SampleState
from agent.errors import FrameUnreadable, HematoVisionError
from agent.inference.models import open_models
from agent.latest import LONGEST_SIDE_PX, at_most
from agent.offline import analyse_pixels
from agent.web.examining import read_block, write_block
from agent.web.views import cell_body

LARGEST_CROP_PX = 512
"""px; a picture whose longer side has no more may show one cell: the class of the one in its middle, or else of the
largest, is told too."""

SAMPLE_ID = "picture"
"""The sample in the cells' ids; no agent counts one of this name from an upload."""


@dataclass(frozen=True, slots=True, eq=False)
class Examined:
    """What was found in a picture, and the picture as a browser can show it."""

    body: Body
    jpeg: bytes


def main() -> None:
    """Answer picture after picture, until the input ends."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever a library prints must not come between the answers
    _stand_back()
    config = Config.model_validate_json(read_block(sys.stdin.buffer))
    bench: Bench | None = None
    while content := read_block(sys.stdin.buffer):
        try:
            pixels_bgr = decode(content, config.web.max_upload_megapixels)
            bench = bench or make_bench(config, open_models(config.models))
            examined = examine(pixels_bgr, config, bench)
        except HematoVisionError as error:
            reason = error.reason if isinstance(error, FrameUnreadable) else str(error)
            examined = Examined({"error": reason}, b"")
        write_block(answers, json.dumps(examined.body).encode())
        write_block(answers, examined.jpeg)


def examine(pixels_bgr: Pixels, config: Config, bench: Bench) -> Examined:
    """The cells of a picture, and of a small one the class of the cell in its middle, or else of its largest."""
    begun_s = time.monotonic()
    height_px, width_px = pixels_bgr.shape[:2]
    one_cell = None
    if max(width_px, height_px) <= LARGEST_CROP_PX:
        pixels = preprocess(pixels_bgr, config.preprocessing)
        answer = bench.models.name_central_cell(pixels, config.models.min_score)
        one_cell = _classification_body(answer, bench)
    body: Body = {"size_px": [width_px, height_px], "one_cell": one_cell, "cells": [], "refused": []}
    if min(width_px, height_px) >= MIN_FIELD_SIDE_PX:
        field = analyse_pixels(pixels_bgr, "an uploaded picture", config, bench, SampleState(SAMPLE_ID))
        body["refused"] = list(field.quality.reasons)
        body["cells"] = [
            {
                **cell_body(cell),
                "looks": "" if cell.classification is None else bench.models.describe(cell.classification),
            }
            for cell in field.cells
        ]
    body["took_ms"] = round((time.monotonic() - begun_s) * 1000)
    return Examined(body, encode_jpeg(at_most(pixels_bgr, LONGEST_SIDE_PX)))


def decode(content: bytes, max_megapixels: float) -> Pixels:
    """The pixels. Raises FrameUnreadable; the limit is the page's own, and so are the words about it."""
    try:
        header = read_header(content)
    except PictureFault as fault:
        raise FrameUnreadable("upload", str(fault)) from None
    megapixels = header.width_px * header.height_px / 1e6
    if megapixels > max_megapixels:
        raise FrameUnreadable(
            "upload",
            f"{header.width_px} x {header.height_px} pixels = {megapixels:.1f} megapixels; the page examines up to "
            f"{max_megapixels:g} (web.max_upload_megapixels)",
        )
    return decode_bytes(content, "upload", max_megapixels, min_side_px=MIN_CROP_SIDE_PX)


def _classification_body(answer: Classification, bench: Bench) -> Body:
    return {
        "class": answer.class_name,
        "probability": round(answer.probability, 3),
        "is_trusted": bench.rules.believes(answer),
        "probabilities": {name: round(share, 3) for name, share in answer.probabilities.items()},
        "looks": bench.models.describe(answer),
    }


def _stand_back() -> None:
    """The counting goes first: at the processor, and when memory is short."""
    with contextlib.suppress(OSError):
        os.nice(10)
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")


if __name__ == "__main__":
    main()
