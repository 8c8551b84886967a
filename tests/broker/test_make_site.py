"""What make-site.sh makes, keeps, renews and refuses; whether a broker likes it is test_rights.py's question."""

from __future__ import annotations

import shutil
import stat
import subprocess
from collections.abc import Callable
from datetime import datetime, timedelta, timezone
from pathlib import Path

import pytest
import yaml
from cryptography import x509

from agent.config import loads
from deploy.broker.make_site import Client, SiteError, main, make_site

ROOT = Path(__file__).resolve().parents[2]
NOW = datetime(2026, 11, 25, tzinfo=timezone.utc)

CLIENTS = (
    Client("device", "microscope-1"),
    Client("device", "microscope-2"),
    Client("receiver", "collector"),
    Client("operator", "anna"),
)


@pytest.fixture
def top(tmp_path: Path) -> Path:
    """A site with two microscopes, a collector and an operator."""
    make_site(tmp_path / "site", site="lab", hosts=["broker.lan", "10.0.0.7"], clients=CLIENTS, now=NOW)
    return tmp_path / "site"


def contents(top: Path) -> dict[str, bytes]:
    return {str(file.relative_to(top)): file.read_bytes() for file in sorted(top.rglob("*")) if file.is_file()}


def certificate(file: Path) -> x509.Certificate:
    return x509.load_pem_x509_certificate(file.read_bytes())


def changed(before: dict[str, bytes], after: dict[str, bytes]) -> set[str]:
    return {name for name in before.keys() | after.keys() if before.get(name) != after.get(name)}


def old_file(top: Path, place: str, name: str) -> str:
    """Where the certificate that is there now is kept when it is renewed."""
    return f"{place}/{name}/old/{certificate(top / place / name / f'{name}.pem').serial_number:x}.pem"


def refused(top: Path) -> list[int]:
    """Serial numbers on the broker's list."""
    revoked = x509.load_pem_x509_crl((top / "broker/revoked.pem").read_bytes())
    return sorted(one.serial_number for one in revoked)


def test_a_second_run_changes_nothing(top: Path) -> None:
    before = contents(top)
    outcomes = make_site(top, now=NOW + timedelta(days=1))
    assert {one.what for one in outcomes} == {"kept"}
    assert [one.name for one in outcomes] == ["lab", "broker.lan", "microscope-1", "microscope-2", "collector", "anna"]
    assert contents(top) == before


def test_a_device_is_added_later_without_touching_the_others(top: Path) -> None:
    before = contents(top)
    make_site(top, clients=[Client("device", "microscope-3")], now=NOW)
    folder = "devices/microscope-3"
    new = {f"{folder}/{name}" for name in ("ca.pem", "config.yaml", "microscope-3.pem", "microscope-3.key")}
    assert changed(before, contents(top)) == {*new, "broker/acl"}


def test_private_keys_are_for_their_owner_alone_and_so_is_the_folder(top: Path) -> None:
    keys = list(top.rglob("*.key"))
    assert len(keys) == 6
    assert {stat.S_IMODE(key.stat().st_mode) for key in keys} == {0o600}
    assert stat.S_IMODE(top.stat().st_mode) == 0o700


def test_renewing_gives_new_keys_to_everybody_and_keeps_the_authority(top: Path) -> None:
    before = contents(top)
    kept = {old_file(top, f"{c.kind}s", c.name) for c in CLIENTS}
    make_site(top, is_renewal=True, now=NOW + timedelta(days=700))
    pairs = ("broker/broker", *(f"{c.kind}s/{c.name}/{c.name}" for c in CLIENTS))
    new = {f"{pair}.{ending}" for pair in pairs for ending in ("pem", "key")}
    assert changed(before, contents(top)) == new | kept
    assert certificate(top / "broker/broker.pem").not_valid_after_utc == NOW + timedelta(days=700 + 730)


def test_renewing_one_by_name_leaves_the_others(top: Path) -> None:
    before = contents(top)
    kept = old_file(top, "operators", "anna")
    make_site(top, clients=[Client("operator", "anna")], is_renewal=True, now=NOW)
    assert changed(before, contents(top)) == {"operators/anna/anna.pem", "operators/anna/anna.key", kept}
    assert contents(top)[kept] == before["operators/anna/anna.pem"]


@pytest.mark.parametrize(("kind", "name"), [("device", "microscop-1"), ("device", "anna")])
def test_a_name_that_is_not_there_is_not_renewed_but_told(kind: str, name: str, top: Path) -> None:
    """A slip would give rights to somebody new, and the certificate that was meant would run out."""
    before = contents(top)
    with pytest.raises(SiteError, match=f"--renew --{kind} {name}: {top} has no such {kind}"):
        make_site(top, clients=[Client(kind, name)], is_renewal=True, now=NOW)
    assert contents(top) == before


def test_what_has_expired_is_made_again_by_any_run(top: Path) -> None:
    make_site(top, clients=[Client("device", "short")], days=2, now=NOW)
    outcomes = make_site(top, now=NOW + timedelta(days=3))
    assert {one.name: one.what for one in outcomes if one.what != "kept"} == {"short": "made again, it had expired"}


def test_a_key_that_was_carried_away_is_not_missed(top: Path) -> None:
    (top / "devices/microscope-1/microscope-1.key").unlink()
    before = contents(top)
    make_site(top, now=NOW)
    assert contents(top) == before


def test_a_run_that_died_between_key_and_certificate_is_made_good(top: Path) -> None:
    folder = top / "devices/microscope-1"
    shutil.copy(top / "devices/microscope-2/microscope-2.key", folder / "microscope-1.key")
    outcomes = {one.name: one.what for one in make_site(top, now=NOW)}
    assert outcomes["microscope-1"] == "made again, its key was not the certificate's"
    (folder / "microscope-1.pem").unlink()
    assert {one.name: one.what for one in make_site(top, now=NOW)}["microscope-1"] == "made"


def test_another_name_of_the_broker_gives_it_a_new_certificate_and_nobody_else(top: Path) -> None:
    before = contents(top)
    make_site(top, hosts=["broker.example"], now=NOW)
    assert changed(before, contents(top)) == {"site.json", "broker/broker.pem", "broker/broker.key"}
    names = certificate(top / "broker/broker.pem").extensions.get_extension_for_class(x509.SubjectAlternativeName)
    assert names.value.get_values_for_type(x509.DNSName) == ["broker.lan", "broker.example"]


def test_who_is_removed_loses_the_rights_and_stands_on_the_list_of_the_refused(top: Path) -> None:
    serial = certificate(top / "devices/microscope-2/microscope-2.pem").serial_number
    make_site(top, remove=["microscope-2"], now=NOW)
    assert refused(top) == [serial]
    assert "microscope-2" not in (top / "broker/acl").read_text()
    assert not (top / "devices/microscope-2").exists()
    before = contents(top)
    make_site(top, now=NOW)
    assert contents(top) == before


def test_who_is_removed_and_given_in_one_run_gets_a_new_certificate_and_the_old_one_is_refused(top: Path) -> None:
    """As for a microscope whose computer was stolen."""
    old = certificate(top / "devices/microscope-1/microscope-1.pem").serial_number
    outcomes = make_site(top, remove=["microscope-1"], clients=[Client("device", "microscope-1")], now=NOW)
    assert ("microscope-1", "made") in {(one.name, one.what) for one in outcomes}
    assert certificate(top / "devices/microscope-1/microscope-1.pem").serial_number != old
    assert refused(top) == [old]
    assert "user microscope-1\n" in (top / "broker/acl").read_text()


def test_who_is_removed_is_refused_with_the_certificates_before_the_renewal_too(top: Path) -> None:
    file = top / "devices/microscope-2/microscope-2.pem"
    device = Client("device", "microscope-2")
    serials = [certificate(file).serial_number]
    for _ in range(2):
        make_site(top, clients=[device], is_renewal=True, now=NOW)
        serials.append(certificate(file).serial_number)
    assert refused(top) == [], "a renewed one works on until it expires"
    make_site(top, remove=["microscope-2"], now=NOW)
    assert refused(top) == sorted(serials)
    make_site(top, clients=[device], now=NOW)  # another computer under the same name
    assert refused(top) == sorted(serials)
    assert certificate(file).serial_number not in serials


def test_the_lines_for_a_device_are_a_valid_configuration_of_the_agent(top: Path) -> None:
    folder = top / "devices/microscope-1"
    config = loads((folder / "config.yaml").read_text(), "config.yaml", folder=folder, environment={})
    assert (config.site, config.device, config.broker.host, config.broker.port) == (
        *("lab", "microscope-1", "broker.lan", 8883),
    )
    assert config.broker.tls.key_file is not None
    assert config.broker.tls.key_file.exists()


def test_openssl_finds_nothing_wrong_with_the_certificates(top: Path) -> None:
    if shutil.which("openssl") is None:
        pytest.skip("openssl is not installed")
    for file, purpose in ((top / "broker/broker.pem", "sslserver"), (top / "operators/anna/anna.pem", "sslclient")):
        words = ["openssl", "verify", "-x509_strict", "-purpose", purpose, "-attime", str(int(NOW.timestamp()))]
        done = subprocess.run([*words, "-CAfile", top / "ca/ca.pem", file], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("spoil", "arguments", "words"),
    [
        (None, {"clients": [Client("device", "Big.Name")]}, "allowed are 1 to 63 of a-z, 0-9 and hyphen"),
        (None, {"clients": [Client("operator", "collector")]}, "this name is the receiver's already"),
        (None, {"clients": [Client("device", "ca")]}, r"the authority's file in its folder is ca\.pem; choose another"),
        (None, {"site": "other"}, "belongs to the site lab"),
        (None, {"hosts": ["broker.lan:8883"]}, "without a port"),
        (None, {"at": "etc/mosquitto"}, "must be an absolute path"),
        (None, {"remove": ["nobody"]}, "has no such device, receiver or operator"),
        (lambda top: (top / "ca/ca.key").unlink(), {}, r"ca\.key: is missing; put it back"),
        (lambda top: shutil.rmtree(top / "ca"), {}, r"is missing; put it back"),
        (lambda top: (top / "site.json").write_text("{}"), {}, "cannot be understood"),
        (lambda top: (top / "site.json").unlink(), {}, "was not made by this program"),
        (lambda top: (top / "broker/broker.pem").write_text("x"), {}, "is no certificate"),
        (lambda top: (top / "broker/broker.key").write_text("x"), {}, "is no private key"),
        (
            lambda top: shutil.copy(top / "broker/broker.key", top / "ca/ca.key"),
            {},
            "is not the key of",
        ),
    ],
)
def test_what_cannot_be_done_is_refused_in_words_before_anything_is_changed(
    top: Path, spoil: Callable[[Path], object] | None, arguments: dict[str, object], words: str
) -> None:
    if spoil is not None:
        spoil(top)
    before = contents(top)
    with pytest.raises(SiteError, match=words):
        make_site(top, now=NOW, **arguments)
    assert contents(top) == before


def test_a_new_folder_needs_a_site_and_a_host(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--device", "scope", str(tmp_path / "new")]) == 1
    assert "name the laboratory with --site and the broker's computer with --host" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_the_script_says_what_it_made_and_warns_of_what_ends_soon(tmp_path: Path) -> None:
    arguments = ["--site", "lab", "--host", "localhost", "--device", "scope", "--days", "40", str(tmp_path / "a site")]
    done = subprocess.run(
        [ROOT / "deploy/broker/make-site.sh", *arguments], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "device    scope" in done.stdout
    assert "renew soon" in done.stdout
    assert "PRIVATE KEY" not in done.stdout + done.stderr
    assert yaml.safe_load((tmp_path / "a site/devices/scope/config.yaml").read_text())["device"] == "scope"
