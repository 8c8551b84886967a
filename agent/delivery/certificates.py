"""What there is to say about certificates: until when they are good, and why one was refused.

The standard library reads the dates of a certificate only once it is in use. A library that reads them from a file
would be the agent's largest dependency after OpenCV for the sake of two dates, so the few bytes that lead to them are
walked here (X.690, RFC 5280 section 4.1) and the tests compare with that library.
"""

from __future__ import annotations

import contextlib
import re
import ssl
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import TYPE_CHECKING

from agent.config import TlsSection

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

EXPIRY_NOTICE_DAYS = 30
"""From so many days before the end a certificate is worth an event, a warning and an alert."""

BROKER = "broker"
"""Instead of a key: the broker's own certificate is in no file of ours."""

_CERTIFICATE = re.compile(r"-----BEGIN CERTIFICATE-----.+?-----END CERTIFICATE-----", re.DOTALL)

_SEQUENCE, _INTEGER, _UTC_TIME, _GENERALIZED_TIME, _VERSION = 0x30, 0x02, 0x17, 0x18, 0xA0

_EXPIRED, _NOT_YET_VALID, _OTHER_NAME, _OTHER_ADDRESS = 10, 9, 62, 64
"""OpenSSL's verdicts over a certificate, X509_V_ERR_* in x509_vfy.h."""

_ALERTS = {
    "CERTIFICATE_REQUIRED": "it asks for a certificate; set broker.tls.certificate_file and key_file",
    "HANDSHAKE_FAILURE": "it asks for a certificate, perhaps; see broker.tls.certificate_file and key_file",
    "CERTIFICATE_EXPIRED": "our certificate has expired; renew broker.tls.certificate_file",
    "CERTIFICATE_REVOKED": "our certificate was taken back; ask for a new broker.tls.certificate_file",
    "UNKNOWN_CA": "it does not know the authority of our certificate; see broker.tls.certificate_file",
    "BAD_CERTIFICATE": "it does not accept our certificate; see broker.tls.certificate_file",
    "UNSUPPORTED_CERTIFICATE": "our certificate is not one for a client; see broker.tls.certificate_file",
    "CERTIFICATE_UNKNOWN": "it does not accept our certificate; see broker.tls.certificate_file",
    "DECRYPT_ERROR": "it does not accept our certificate; see broker.tls.certificate_file and key_file",
}
"""The last words of a TLS alert (RFC 8446 section 6.2), as OpenSSL names them, and what they mean to the operator."""


@dataclass(frozen=True, slots=True)
class Expiry:
    """A certificate that the connection needs, and the time left.

    key: where the configuration names its file, or BROKER. file: None for the broker's, which it shows us.
    """

    key: str
    file: Path | None
    days_left: float

    @property
    def is_near(self) -> bool:
        return self.days_left < EXPIRY_NOTICE_DAYS

    @property
    def words(self) -> str:
        """For people, with the remedy."""
        what = "the broker's certificate" if self.file is None else f"{self.key} {self.file}"
        where = " at the broker" if self.file is None else ""
        if self.days_left < 0:
            return f"{what}: expired {-self.days_left:.0f} days ago; renew it{where}"
        return f"{what}: expires in {self.days_left:.0f} days; renew it{where} before"


def days_left(pem: str, now: datetime) -> float:
    """Days until the first certificate of a PEM text ends, in fractions; negative when it is over.

    now: with time zone.   A file may hold several (a chain, old and new authority); the one that ends first counts.
    Raises ValueError for a text without a certificate, or with one that cannot be read.
    """
    ends = [_not_after(ssl.PEM_cert_to_DER_cert(found.group())) for found in _CERTIFICATE.finditer(pem)]
    if not ends:
        raise ValueError("holds no certificate (-----BEGIN CERTIFICATE-----)")
    return (min(ends) - now) / timedelta(days=1)


def read_expiries(section: TlsSection, now: datetime, broker_ends_at: datetime | None = None) -> tuple[Expiry, ...]:
    """How long the certificates of a connection are good, the shortest first.

    broker_ends_at: of the certificate that the broker showed last; None = it showed none. A file that cannot be read is
    left out: connecting tells.
    """
    found = []
    if broker_ends_at is not None:
        found.append(Expiry(BROKER, None, (broker_ends_at - now) / timedelta(days=1)))
    if section.enabled:
        for key, file in (("ca_file", section.ca_file), ("certificate_file", section.certificate_file)):
            if file is None:
                continue
            try:
                left = days_left(file.read_text("ascii", errors="replace"), now)
            except (OSError, ValueError):
                continue
            found.append(Expiry(f"broker.tls.{key}", file, left))
    return tuple(sorted(found, key=lambda expiry: expiry.days_left))


def shown_certificate_ends_at(sock: object) -> datetime | None:
    """When the certificate ends that the other end of a connection has shown; None = not encrypted."""
    shown = sock.getpeercert(binary_form=True) if isinstance(sock, ssl.SSLSocket) else None
    return None if shown is None else _not_after(shown)


def refusal_of_ours(error: ssl.SSLError | None) -> str | None:
    """What the broker's TLS alert says about our certificate, in words; None = it speaks of something else."""
    told: str | None = getattr(error, "reason", None)  # OpenSSL's name of it, as TLSV1_ALERT_UNKNOWN_CA
    return _ALERTS.get((told or "").partition("_ALERT_")[2])


def refusal_of_theirs(error: ssl.SSLCertVerificationError, now: datetime) -> str:
    """Why we do not accept the broker's certificate, and what to look at."""
    clock = f"(this computer's date is {now:%Y-%m-%d})"
    remedies = {
        _EXPIRED: f"renew it at the broker, or set the clock {clock}",
        _NOT_YET_VALID: f"set the clock {clock}",
        _OTHER_NAME: "broker.host must be one of the names in its certificate",
        _OTHER_ADDRESS: "broker.host must be one of the names in its certificate",
    }
    remedy = remedies.get(error.verify_code, "broker.tls.ca_file must hold the authority that signed it")
    return f"its certificate is not accepted ({error.verify_message.rstrip('.')}); {remedy}"


class NotingSocket(ssl.SSLSocket):
    """Keeps what the other end said in its TLS alert.

    With TLS 1.3 it comes after our side of the handshake is done, and the MQTT library swallows it.
    """

    alert: ssl.SSLError | None = None

    def recv(self, buflen: int = 1024, flags: int = 0) -> bytes:
        try:
            return super().recv(buflen, flags)
        except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
            raise
        except ssl.SSLError as error:
            self.alert = error
            raise

    def send(self, data: ReadableBuffer, flags: int = 0) -> int:
        try:
            return super().send(data, flags)
        except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
            raise
        except OSError:  # closed there; why may already lie here
            with contextlib.suppress(OSError):
                self.recv()
            raise


# ----------------------------------------------------------------------------------------------------- inside


def _not_after(der: bytes) -> datetime:
    """The end of a certificate: Certificate{tbs{[version], serial, algorithm, issuer, validity{from, to}, ..}, ..}."""
    try:
        certificate = _expect(_SEQUENCE, next(_values(der)))
        fields = _values(_expect(_SEQUENCE, next(_values(certificate))))
        first = next(fields)
        _expect(_INTEGER, next(fields) if first[0] == _VERSION else first)
        _expect(_SEQUENCE, next(fields))
        _expect(_SEQUENCE, next(fields))
        times = _values(_expect(_SEQUENCE, next(fields)))
        next(times)
        return _time(*next(times))
    except (StopIteration, IndexError):
        raise ValueError("the certificate is cut off") from None


def _values(der: bytes) -> Iterator[tuple[int, bytes]]:
    """Tag and content of one value after the other."""
    at = 0
    while at < len(der):
        tag, length = der[at], der[at + 1]
        at += 2
        if length & 0x80:  # the long form: so many bytes of length follow
            size = length & 0x7F
            length = int.from_bytes(der[at : at + size], "big")
            at += size
        if at + length > len(der):
            raise ValueError("the certificate is cut off")
        yield tag, der[at : at + length]
        at += length


def _expect(wanted: int, value: tuple[int, bytes]) -> bytes:
    tag, content = value
    if tag != wanted:
        raise ValueError(f"is no certificate (tag {tag:#04x} where {wanted:#04x} belongs)")
    return content


def _time(tag: int, content: bytes) -> datetime:
    """Both forms end in Z (RFC 5280 section 4.1.2.5); two digits of a year below 50 are 20xx."""
    text = content.decode("ascii", errors="replace")
    if tag == _UTC_TIME and len(text) == 13:
        text = ("20" if text[:2] < "50" else "19") + text
    elif tag != _GENERALIZED_TIME:
        raise ValueError(f"is no certificate (tag {tag:#04x} where a time belongs)")
    return datetime.strptime(text, "%Y%m%d%H%M%SZ").replace(tzinfo=timezone.utc)
