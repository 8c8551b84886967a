"""Signed reports: a file `REPORT.sig` beside the report says who signed which bytes, and that it was this key.

Ed25519 over the canonical JSON of the statement (all its keys but `signature`), which holds the SHA-256 of the report's
bytes: every format is signed alike, and whoever has the public key can verify without a secret. It does not show whose
key it is: compare the public key with the one that `hematovision report key` prints on the device
(docs/decisions/0005-reports-are-signed-beside-the-file.md).
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from agent.delivery.commands import canonical_json
from agent.delivery.messages import rfc3339_ms
from agent.errors import ConfigError, HematoVisionError

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

SCHEMA = "hematovision/report-signature/1"
KEY_NAME = "report-key.pem"
"""Beside the outbox."""

ENDING = ".sig"


class SignatureWrong(HematoVisionError):
    """The report is not what was signed, or was not signed by this key."""


@dataclass(frozen=True, slots=True)
class Signed:
    """What a signature says that holds. by: an opaque token of the person, None = the device alone."""

    sample: str
    by: str | None
    at: str
    public_key: str


def open_key(path: Path, *, create: bool) -> Ed25519PrivateKey:
    """The key of this device, made where it is not there yet. Raises ConfigError."""
    ed25519, serialization = _cryptography()
    try:
        if create and not path.exists():
            _make_key(path)
        key: Any = serialization.load_pem_private_key(path.read_bytes(), None)
    except OSError as error:
        raise ConfigError(str(path), (f"the key of reports cannot be used: {error.strerror}",)) from error
    except (ValueError, TypeError) as error:
        raise ConfigError(
            str(path), ("holds no private key without a password; give an Ed25519 key as PEM",)
        ) from error
    if not isinstance(key, ed25519.Ed25519PrivateKey):
        raise ConfigError(str(path), ("is no Ed25519 key; `openssl genpkey -algorithm ed25519` makes one",))
    found: Ed25519PrivateKey = key
    return found


def _make_key(path: Path) -> None:
    """A new key under this name; of two programs that make one at once the first has it. Raises OSError."""
    ed25519, serialization = _cryptography()
    pem = ed25519.Ed25519PrivateKey.generate().private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(pem)
            file.flush()
            os.fsync(file.fileno())
    except OSError:  # a part of it would be taken for the key ever after
        path.unlink(missing_ok=True)
        raise


def public_hex(key: Ed25519PrivateKey) -> str:
    """The public key, 64 hex digits."""
    return key.public_key().public_bytes_raw().hex()


def sign(report: bytes, sample: str, key: Ed25519PrivateKey, *, at: datetime, by: str | None = None) -> bytes:
    """The content of the file beside the report."""
    statement: dict[str, Any] = {
        "schema": SCHEMA,
        "sample": sample,
        "sha256": hashlib.sha256(report).hexdigest(),
        "at": rfc3339_ms(at),
        "by": by,
        "public_key": public_hex(key),
        "ruo": True,
    }
    return json.dumps({**statement, "signature": key.sign(canonical_json(statement)).hex()}, indent=2).encode() + b"\n"


def verify(report: bytes, signature: bytes, public_key: str | None = None) -> Signed:
    """What was signed. public_key: the one that it must be, 64 hex digits. Raises SignatureWrong."""
    ed25519, _ = _cryptography()
    from cryptography.exceptions import InvalidSignature

    try:
        spoken: Mapping[str, Any] = json.loads(signature)
        statement = {name: value for name, value in spoken.items() if name != "signature"}
        key = ed25519.Ed25519PublicKey.from_public_bytes(bytes.fromhex(spoken["public_key"]))
        told = bytes.fromhex(spoken["signature"])
        signed = Signed(str(spoken["sample"]), spoken["by"], str(spoken["at"]), str(spoken["public_key"]))
        digest, is_ours = spoken["sha256"], spoken["schema"] == SCHEMA
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise SignatureWrong("this is no signature of a report") from error
    if not is_ours:
        raise SignatureWrong("this is no signature of a report, or one of a newer version")
    try:
        key.verify(told, canonical_json(statement))
    except InvalidSignature as error:
        raise SignatureWrong("the signature was changed, or was not made by the key that it names") from error
    if hashlib.sha256(report).hexdigest() != digest:
        raise SignatureWrong("the report was changed after it was signed, or this is another report's signature")
    if public_key is not None and public_key.lower() != signed.public_key:
        raise SignatureWrong(f"signed by another key: {signed.public_key}")
    return signed


def _cryptography() -> tuple[Any, Any]:
    try:
        from cryptography.hazmat.primitives import serialization
        from cryptography.hazmat.primitives.asymmetric import ed25519
    except ModuleNotFoundError as error:
        fault = f"{error.name} is not installed; `pip install 'hematovision-agent[report]'` brings it"
        raise ConfigError("hematovision report", (fault,)) from None
    return ed25519, serialization
