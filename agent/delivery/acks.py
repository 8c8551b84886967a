"""A receiver's word that it has everything of a stream up to a message on its disk: `ack/{receiver}`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

LARGEST_ACK_BYTES = 4096
"""An honest one has some two hundred."""

Number = Annotated[int, Field(ge=1, le=2**53, strict=True)]


@dataclass(frozen=True, slots=True)
class Ack:
    """All rows of `stream` with a boot up to `boot` and a number up to `seq` are on the receiver's disk."""

    receiver: str
    stream: str
    boot: int
    seq: int


class _Spoken(BaseModel):
    """As it stands in the message. Keys of a newer contract are passed over."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    contract: Annotated[Literal["hv/1/ack"], Field(alias="schema")]
    receiver: str
    device: str
    stream: Annotated[str, Field(pattern=r"^[a-z]{1,32}$")]
    boot: Number
    seq: Number


def read_ack(payload: bytes, *, receiver: str, device: str, is_retained: bool) -> Ack | str:
    """What an arrived acknowledgement says, or why it is not believed. receiver: whose topic it came on."""
    if is_retained:
        return "it is retained: it may be of another time"
    if len(payload) > LARGEST_ACK_BYTES:
        return f"{len(payload)} bytes; an acknowledgement has at most {LARGEST_ACK_BYTES}"
    try:
        spoken = _Spoken.model_validate_json(payload)
    except (ValidationError, ValueError, RecursionError) as error:
        return f"it cannot be read: {str(error)[:200]}"
    if (spoken.receiver, spoken.device) != (receiver, device):
        return f"it came on the topic of {receiver} and speaks for {spoken.receiver[:80]!r} of {spoken.device[:80]!r}"
    return Ack(spoken.receiver, spoken.stream, spoken.boot, spoken.seq)
