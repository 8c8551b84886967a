"""The dates of certificates, compared with a library that knows them all; the words for refusals."""

from __future__ import annotations

import ssl
from datetime import datetime, timedelta, timezone
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from hypothesis import given
from hypothesis import strategies as st

from agent.config import TlsSection
from agent.delivery.certificates import EXPIRY_NOTICE_DAYS, days_left, read_expiries, refusal_of_ours

NOW = datetime(2026, 11, 25, 12, 0, tzinfo=timezone.utc)
KEY = ec.generate_private_key(ec.SECP256R1())


def make_certificate(end: datetime, name: str = "scope") -> str:
    """A certificate that ends then, signed by itself."""
    who = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
    certificate = (
        x509.CertificateBuilder()
        .subject_name(who)
        .issuer_name(who)
        .public_key(KEY.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(end - timedelta(days=1))
        .not_valid_after(end)
        .sign(KEY, hashes.SHA256())
    )
    return certificate.public_bytes(serialization.Encoding.PEM).decode()


SOUND = make_certificate(NOW)


@given(
    st.datetimes(datetime(1951, 1, 1), datetime(9999, 12, 31), timezones=st.just(timezone.utc)),
    st.text(st.characters(exclude_categories=("Cc", "Cs")), min_size=1, max_size=16),
)
def test_the_days_left_are_those_that_the_library_reads(end: datetime, name: str) -> None:
    pem = make_certificate(end, name)
    known = x509.load_pem_x509_certificate(pem.encode()).not_valid_after_utc
    assert days_left(pem, NOW) == (known - NOW) / timedelta(days=1)


def test_of_several_certificates_in_a_file_the_first_to_end_counts() -> None:
    pem = f"a note\n{make_certificate(NOW + timedelta(days=90))}\n{make_certificate(NOW + timedelta(days=3))}"
    assert days_left(pem, NOW) == pytest.approx(3)


@given(st.data())
def test_a_damaged_certificate_is_refused_in_words_or_read_and_never_worse(data: st.DataObject) -> None:
    der = bytearray(ssl.PEM_cert_to_DER_cert(SOUND))
    for _ in range(data.draw(st.integers(1, 3))):
        der[data.draw(st.integers(0, 199))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, 300))
    try:
        days_left(ssl.DER_cert_to_PEM_cert(bytes(der[:cut])), NOW)
    except ValueError as error:
        assert str(error)  # noqa: PT017 - either way is right


def test_a_key_or_an_empty_file_holds_no_certificate() -> None:
    for text in ("", "-----BEGIN EC PRIVATE KEY-----\nAAAA\n-----END EC PRIVATE KEY-----\n"):
        with pytest.raises(ValueError, match="holds no certificate"):
            days_left(text, NOW)


def test_the_configured_files_are_told_shortest_first_and_near_ones_with_the_remedy(tmp_path: Path) -> None:
    for name, days in (("ca", 3000), ("scope", EXPIRY_NOTICE_DAYS - 1)):
        (tmp_path / f"{name}.pem").write_text(make_certificate(NOW + timedelta(days=days)))
    section = TlsSection(
        enabled=True, ca_file=tmp_path / "ca.pem", certificate_file=tmp_path / "scope.pem", key_file=tmp_path / "k"
    )
    own, authority = read_expiries(section, NOW)
    assert (own.key, own.is_near, authority.is_near) == ("broker.tls.certificate_file", True, False)
    assert "scope.pem: expires in 29 days; renew it before" in own.words
    (later, _) = read_expiries(section, NOW + timedelta(days=31))
    assert "expired 2 days ago; renew it" in later.words


def test_the_certificate_that_the_broker_shows_counts_too(tmp_path: Path) -> None:
    own = tmp_path / "scope.pem"
    own.write_text(make_certificate(NOW + timedelta(days=29)))
    section = TlsSection(enabled=True, certificate_file=own, key_file=own)
    first, second = read_expiries(section, NOW, NOW + timedelta(days=3))
    assert (first.key, first.days_left, second.key) == ("broker", 3, "broker.tls.certificate_file")
    assert first.words == "the broker's certificate: expires in 3 days; renew it at the broker before"
    (later, *_) = read_expiries(section, NOW + timedelta(days=5), NOW + timedelta(days=3))
    assert later.words == "the broker's certificate: expired 2 days ago; renew it at the broker"


def test_files_that_cannot_be_read_and_a_connection_without_tls_have_no_expiry(tmp_path: Path) -> None:
    (tmp_path / "ca.pem").write_text("nothing")
    assert read_expiries(TlsSection(enabled=True, ca_file=tmp_path / "ca.pem"), NOW) == ()
    assert read_expiries(TlsSection(enabled=True, ca_file=tmp_path / "nowhere"), NOW) == ()
    assert read_expiries(TlsSection(), NOW) == ()


def test_an_alert_that_is_not_about_a_certificate_has_no_words_of_ours() -> None:
    assert refusal_of_ours(None) is None
    assert refusal_of_ours(ssl.SSLError(1, "wrong version number")) is None
