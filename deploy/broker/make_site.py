"""Make or extend the certificates and the broker's files of one site. Started by make-site.sh, which has what it needs.

    FOLDER/site.json                    names, addresses and paths given so far
    FOLDER/ca/          ca.pem ca.key   the authority of the site: the key signs everything below and stays at home
    FOLDER/broker/      mosquitto.conf acl ca.pem revoked.pem broker.pem broker.key
    FOLDER/devices/N/   ca.pem N.pem N.key config.yaml        a microscope: writes below its own topic
    FOLDER/receivers/N/ ca.pem N.pem N.key                    a collector: reads everything, acknowledges, asks again
    FOLDER/operators/N/ ca.pem N.pem N.key                    a person: reads everything, sends commands
    FOLDER/.../N/old/   certificates of N that were renewed, SERIAL.pem: good until they expire or N is removed
    FOLDER/removed/     what --remove took away; the broker refuses these certificates

The folders are the roster: who has one is in the broker's rights. Running it again keeps every certificate that is
there, whole and not expired; a private key may be taken away from here once it is on its machine.
"""

from __future__ import annotations

import argparse
import ipaddress
import json
import os
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

CA_DAYS = 3650
"""Ten years: before 2038, where boards with 32-bit clocks end, and longer than a microscope's computer lasts."""

LEAF_DAYS = 730
"""Two years. The agent warns 30 days before the end."""

BACKDATED_DAYS = 365
"""A board without a clock chip boots in the past, and its first connection must not wait for a time server."""

RENEW_SOON_DAYS = 60

KINDS = {"device": "devices", "receiver": "receivers", "operator": "operators"}
"""Kind of client -> its folder."""

DEVICE_WRITES = (
    *("state", "info", "health", "event", "audit"),
    *("sample/+", "field/+", "cell/+", "differential/+", "image/+/+", "alert/+", "reply/#"),
)
"""What a device says, below its own topic. Listed one by one: `#` would let it send commands to itself."""

DEVICE_READS = ("cmd/+", "ack/+")

CONFIG_TEMPLATE = """\
# mosquitto of the site {site}, written by make-site.sh: it is overwritten by the next run.

# Encrypted, with a certificate of our own authority on both sides; the name in a client's certificate is its user name.
listener {port}
cafile {at}/ca.pem
certfile {at}/broker.pem
keyfile {at}/broker.key
crlfile {at}/revoked.pem
require_certificate true
use_identity_as_username true
allow_anonymous false
tls_version tlsv1.2

# What each of them may do. Reloaded on SIGHUP; anything not named there is refused.
acl_file {at}/acl

# Sessions and what waits for absent receivers survive a restart. mosquitto acknowledges before it writes: what came
# in the last seconds before a kill or a power cut is lost here, and only here (see docs/brokers.md).
persistence true
persistence_location {data}/
autosave_interval 10

# By default everything beyond 1000 waiting messages is acknowledged and thrown away. 0 = no limit but memory.
max_queued_messages 0
max_queued_bytes 0
# In bytes; MQTT 5 clients are told, and set aside what is larger instead of being cut off.
max_packet_size 4194304
# A receiver that has been away for a month is not coming back; its queue must not fill the memory for ever.
persistent_client_expiration 1m

# Small messages leave at once.
set_tcp_nodelay true
"""

CA_NAME = "ca"
"""The name of the authority's certificate beside each client's own."""

_NAME = re.compile(r"[a-z0-9-]{1,63}")


class SiteError(Exception):
    """Something that the caller must mend; its words say what and how."""


@dataclass(frozen=True)
class Settings:
    """What site.json holds. at, data: where the broker's files and its database lie on the broker's computer."""

    site: str
    hosts: tuple[str, ...]
    port: int = 8883
    at: str = "/etc/mosquitto/hematovision"
    data: str = "/var/lib/mosquitto"


@dataclass(frozen=True)
class Pair:
    """A certificate and its key, as files; either may be missing."""

    certificate_file: Path
    key_file: Path

    def read_certificate(self) -> x509.Certificate | None:
        try:
            return x509.load_pem_x509_certificate(self.certificate_file.read_bytes())
        except FileNotFoundError:
            return None
        except ValueError as error:
            raise SiteError(
                f"{self.certificate_file}: is no certificate ({error}); delete it to have a new one made"
            ) from error

    def read_key(self) -> ec.EllipticCurvePrivateKey | None:
        try:
            key = serialization.load_pem_private_key(self.key_file.read_bytes(), None)
        except FileNotFoundError:
            return None
        except (ValueError, TypeError) as error:
            raise SiteError(
                f"{self.key_file}: is no private key without a passphrase; put the right one back, or delete it and"
                f" {self.certificate_file.name} to have new ones made"
            ) from error
        if not isinstance(key, ec.EllipticCurvePrivateKey):
            raise SiteError(f"{self.key_file}: was not made here (no elliptic curve key); put the right one back")
        return key

    def write(self, certificate: x509.Certificate, key: ec.EllipticCurvePrivateKey) -> None:
        """The key first: a certificate without its key counts as one whose key was carried away."""
        words = key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        write_file(self.key_file, words, mode=0o600)
        write_file(self.certificate_file, certificate.public_bytes(serialization.Encoding.PEM))

    def describes(self, authority: x509.Certificate, now: datetime) -> str | None:
        """Why a new one is needed, in words; None = it is good."""
        certificate = self.read_certificate()
        if certificate is None:
            return "made"
        key = self.read_key()
        if key is not None and key.public_key() != certificate.public_key():
            return "made again, its key was not the certificate's"
        try:
            certificate.verify_directly_issued_by(authority)
        except Exception:  # wrong issuer, wrong signature, wrong algorithm: all mean the same here
            return "made again, it was signed by another authority"
        return "made again, it had expired" if certificate.not_valid_after_utc <= now else None


@dataclass(frozen=True)
class Client:
    """Who may connect. kind: one of `KINDS`; name: its user name at the broker."""

    kind: str
    name: str

    def folder(self, top: Path) -> Path:
        return top / KINDS[self.kind] / self.name

    def pair(self, top: Path) -> Pair:
        folder = self.folder(top)
        return Pair(folder / f"{self.name}.pem", folder / f"{self.name}.key")


@dataclass(frozen=True)
class Outcome:
    """What became of one certificate."""

    kind: str
    name: str
    what: str
    expires: datetime


# ------------------------------------------------------------------------------------------------------- the whole


def make_site(
    top: Path,
    *,
    site: str | None = None,
    hosts: Sequence[str] = (),
    port: int | None = None,
    at: str | None = None,
    data: str | None = None,
    clients: Sequence[Client] = (),
    remove: Sequence[str] = (),
    is_renewal: bool = False,
    days: int = LEAF_DAYS,
    now: datetime | None = None,
) -> list[Outcome]:
    """Bring the folder to what is asked for, and keep all else; returns every certificate of the site.

    is_renewal: new keys and certificates for `clients`, or where none are named for the broker and everybody. The old
    ones stay valid until they expire, so the new ones can be carried out one by one.   Raises SiteError.
    """
    now = now or datetime.now(timezone.utc)
    settings = merge_settings(top, site, hosts, port, at, data)
    present = read_clients(top)
    for client in clients:
        if is_renewal and client not in present:
            raise SiteError(
                f"--renew --{client.kind} {client.name}: {top} has no such {client.kind}; leave --renew out to make one"
            )
    check_clients([*present, *clients])
    for client in clients:
        if client.name == CA_NAME:
            raise SiteError(
                f"--{client.kind} {client.name}: the authority's file in its folder is {CA_NAME}.pem; choose another"
            )
    unknown = sorted(set(remove) - {client.name for client in present})
    if unknown:
        raise SiteError(f"--remove {unknown[0]}: {top} has no such device, receiver or operator")
    top.mkdir(mode=0o700, parents=True, exist_ok=True)
    write_file(top / "site.json", json.dumps(settings.__dict__, indent=2).encode() + b"\n")

    is_new = not (top / "ca").exists()
    authority, authority_key = open_authority(top, now, settings.site)
    for client in [client for client in present if client.name in remove]:
        take_away(client, top, now)
    everybody = sorted(
        {*(client for client in present if client.name not in remove), *clients},
        key=lambda client: (list(KINDS).index(client.kind), client.name),
    )
    what = "made" if is_new else "kept"
    outcomes = [Outcome("authority", settings.site, what, authority.not_valid_after_utc)]

    broker = Pair(top / "broker" / "broker.pem", top / "broker" / "broker.key")
    is_due = is_renewal and not clients
    what = "renewed" if is_due else broker.describes(authority, now) or describe_names(broker, settings.hosts)
    if what is not None:
        issue(broker, authority, authority_key, settings.hosts[0], now, days, hosts=settings.hosts)
    outcomes.append(outcome("broker", settings.hosts[0], what, broker))

    for client in everybody:
        pair = client.pair(top)
        is_due = is_renewal and (not clients or client in clients)
        what = "renewed" if is_due else pair.describes(authority, now)
        if what is not None:
            keep_old(pair)
            issue(pair, authority, authority_key, client.name, now, days)
        write_client_files(client, top, settings, authority)
        outcomes.append(outcome(client.kind, client.name, what, pair))

    write_broker_files(top, settings, everybody, authority, authority_key, now)
    return outcomes


def outcome(kind: str, name: str, what: str | None, pair: Pair) -> Outcome:
    certificate = pair.read_certificate()
    assert certificate is not None
    return Outcome(kind, name, what or "kept", certificate.not_valid_after_utc)


def merge_settings(
    top: Path, site: str | None, hosts: Sequence[str], port: int | None, at: str | None, data: str | None
) -> Settings:
    """What the folder says and what is asked for now, in one."""
    file = top / "site.json"
    try:
        told = json.loads(file.read_text())
        before: Settings | None = Settings(**{**told, "hosts": tuple(told["hosts"])})
    except FileNotFoundError:
        before = None
    except (ValueError, TypeError, KeyError) as error:
        raise SiteError(f"{file}: cannot be understood ({error}); restore it from your copy") from error
    if before is None:
        if top.exists() and any(top.iterdir()):
            raise SiteError(f"{top}: is not empty and was not made by this program; name a new folder")
        if site is None or not hosts:
            raise SiteError(f"{top} is new: name the laboratory with --site and the broker's computer with --host")
        before = Settings(check_name("--site", site), ())
    elif site not in (None, before.site):
        raise SiteError(f"--site {site}: {top} belongs to the site {before.site}; one folder is one site")
    for host in hosts:
        check_host(host)
    for option, path in (("--at", at), ("--data", data)):
        if path is not None and not re.fullmatch(r"/[^\s#]*", path):
            raise SiteError(f"{option} {path}: must be an absolute path without spaces")
    return Settings(
        before.site,
        tuple(dict.fromkeys((*before.hosts, *hosts))),
        port or before.port,
        (at or before.at).rstrip("/"),
        (data or before.data).rstrip("/"),
    )


def read_clients(top: Path) -> list[Client]:
    return [
        Client(kind, folder.name)
        for kind, place in KINDS.items()
        for folder in sorted((top / place).glob("*"))
        if folder.is_dir()
    ]


def check_clients(clients: Iterable[Client]) -> None:
    """A name is one user at the broker, so it can be one thing only."""
    kinds: dict[str, str] = {}
    for client in clients:
        check_name(f"--{client.kind}", client.name)
        before = kinds.setdefault(client.name, client.kind)
        if before != client.kind:
            raise SiteError(f"--{client.kind} {client.name}: this name is the {before}'s already; choose another")


def check_name(option: str, name: str) -> str:
    if not _NAME.fullmatch(name):
        raise SiteError(f"{option} {name}: allowed are 1 to 63 of a-z, 0-9 and hyphen")
    return name


def check_host(host: str) -> None:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        if len(host) > 64 or not re.fullmatch(r"[A-Za-z0-9]([A-Za-z0-9-]*[A-Za-z0-9])?(\.[A-Za-z0-9-]+)*", host):
            raise SiteError(
                f"--host {host}: must be the name or the address by which clients reach the broker, without a port"
            ) from None


# ------------------------------------------------------------------------------------------------- the certificates


def open_authority(top: Path, now: datetime, site: str = "") -> tuple[x509.Certificate, ec.EllipticCurvePrivateKey]:
    """The site's authority; made when the folder is new, never replaced."""
    pair = Pair(top / "ca" / "ca.pem", top / "ca" / "ca.key")
    certificate, key = pair.read_certificate(), pair.read_key()
    if certificate is None and key is None and not read_clients(top):
        (top / "ca").mkdir(mode=0o700, exist_ok=True)
        key = ec.generate_private_key(ec.SECP256R1())
        name = subject(f"{site} authority")
        usage = key_usage(is_authority=True)
        certificate = (
            builder(name, key.public_key(), now, CA_DAYS)
            .issuer_name(name)
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(usage, critical=True)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(key.public_key()), critical=False)
            .sign(key, hashes.SHA256())
        )
        pair.write(certificate, key)
        return certificate, key
    if certificate is None or key is None:
        missing = pair.certificate_file if certificate is None else pair.key_file
        raise SiteError(f"{missing}: is missing; put it back from where you keep it: without it nothing can be signed")
    if key.public_key() != certificate.public_key():
        raise SiteError(f"{pair.key_file}: is not the key of {pair.certificate_file}; put the right one back")
    if certificate.not_valid_after_utc <= now:
        raise SiteError(f"{pair.certificate_file}: the authority has expired; make the site anew in another folder")
    return certificate, key


def issue(
    pair: Pair,
    authority: x509.Certificate,
    authority_key: ec.EllipticCurvePrivateKey,
    name: str,
    now: datetime,
    days: int,
    hosts: Sequence[str] = (),
) -> None:
    """A new key and its certificate: for a broker when it has hosts, else for a client; good for nothing else."""
    pair.key_file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    key = ec.generate_private_key(ec.SECP256R1())
    purpose = ExtendedKeyUsageOID.SERVER_AUTH if hosts else ExtendedKeyUsageOID.CLIENT_AUTH
    request = (
        builder(subject(name), key.public_key(), now, days, latest=authority.not_valid_after_utc)
        .issuer_name(authority.subject)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(key_usage(is_authority=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage([purpose]), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(authority_key.public_key()), critical=False)
    )
    if hosts:
        request = request.add_extension(x509.SubjectAlternativeName(general_names(hosts)), critical=False)
    pair.write(request.sign(authority_key, hashes.SHA256()), key)


def keep_old(pair: Pair) -> None:
    """A client's certificate before it is replaced, where `take_away` finds it: who is removed is refused with all."""
    certificate = pair.read_certificate()
    if certificate is not None:
        content = certificate.public_bytes(serialization.Encoding.PEM)
        write_file(pair.certificate_file.parent / "old" / f"{certificate.serial_number:x}.pem", content)


def builder(
    name: x509.Name, key: ec.EllipticCurvePublicKey, now: datetime, days: int, latest: datetime | None = None
) -> x509.CertificateBuilder:
    end = now + timedelta(days=days)
    return (
        x509.CertificateBuilder()
        .subject_name(name)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(days=BACKDATED_DAYS))
        .not_valid_after(end if latest is None else min(end, latest))
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
    )


def subject(name: str) -> x509.Name:
    return x509.Name(
        [
            x509.NameAttribute(NameOID.ORGANIZATION_NAME, "HematoVision"),
            x509.NameAttribute(NameOID.COMMON_NAME, name[:64]),
        ]
    )


def key_usage(*, is_authority: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not is_authority,
        key_cert_sign=is_authority,
        crl_sign=is_authority,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def general_names(hosts: Sequence[str]) -> Iterator[x509.GeneralName]:
    for host in hosts:
        try:
            yield x509.IPAddress(ipaddress.ip_address(host))
        except ValueError:
            yield x509.DNSName(host)


def describe_names(broker: Pair, hosts: Sequence[str]) -> str | None:
    """Why the broker needs a new certificate although its own is good: it answers to more names now."""
    certificate = broker.read_certificate()
    assert certificate is not None
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    return None if set(names) == set(general_names(hosts)) else "made again, it has new names"


def take_away(client: Client, top: Path, now: datetime) -> None:
    """Into removed/, where the list of revoked certificates is made from."""
    place = top / "removed" / f"{now:%Y%m%dT%H%M%S%f}-{client.kind}-{client.name}"
    place.parent.mkdir(mode=0o700, exist_ok=True)
    client.folder(top).rename(place)


# -------------------------------------------------------------------------------------------------------- the files


def write_client_files(client: Client, top: Path, settings: Settings, authority: x509.Certificate) -> None:
    folder, name = client.folder(top), client.name
    write_file(folder / "ca.pem", authority.public_bytes(serialization.Encoding.PEM))
    if client.kind == "device":
        words = (
            f"# For the agent on {name}: put these lines into its config.yaml and the other files beside it.\n"
            f"site: {settings.site}\n"
            f"device: {name}\n"
            "broker:\n"
            f"  host: {settings.hosts[0]}\n"
            f"  port: {settings.port}\n"
            f"  tls: {{enabled: true, ca_file: ca.pem, certificate_file: {name}.pem, key_file: {name}.key}}\n"
            "commands:\n"
            "  operator: broker  # the acl beside this lets operators alone write to cmd/reload and cmd/model.*\n"
        )
        write_file(folder / "config.yaml", words.encode())


def write_broker_files(
    top: Path,
    settings: Settings,
    clients: Sequence[Client],
    authority: x509.Certificate,
    authority_key: ec.EllipticCurvePrivateKey,
    now: datetime,
) -> None:
    folder = top / "broker"
    config = CONFIG_TEMPLATE.format(site=settings.site, port=settings.port, at=settings.at, data=settings.data)
    write_file(folder / "mosquitto.conf", config.encode())
    write_file(folder / "acl", acl(settings.site, clients).encode())
    write_file(folder / "ca.pem", authority.public_bytes(serialization.Encoding.PEM))
    revoked = [
        Pair(file, file).read_certificate()
        for file in sorted((top / "removed").glob("**/*.pem"))
        if file.stem != CA_NAME
    ]
    write_revoked(
        folder / "revoked.pem", {one.serial_number for one in revoked if one is not None}, authority, authority_key, now
    )


def write_revoked(
    file: Path, serials: set[int], authority: x509.Certificate, key: ec.EllipticCurvePrivateKey, now: datetime
) -> None:
    """The list of refused certificates. It ends with the authority: a broker whose list is over refuses everybody."""
    if file.exists():
        before = x509.load_pem_x509_crl(file.read_bytes())
        if {one.serial_number for one in before} == serials and before.is_signature_valid(key.public_key()):
            return
    made = now - timedelta(days=BACKDATED_DAYS)
    revoked = x509.CertificateRevocationListBuilder().issuer_name(authority.subject)
    revoked = revoked.last_update(made).next_update(authority.not_valid_after_utc)
    for serial in sorted(serials):
        entry = x509.RevokedCertificateBuilder().serial_number(serial).revocation_date(made).build()
        revoked = revoked.add_revoked_certificate(entry)
    write_file(file, revoked.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM))


def acl(site: str, clients: Sequence[Client]) -> str:
    """The rights for mosquitto, one user after the other; what is not here is refused."""
    base = f"hv/1/{site}"
    rights = {
        "device": lambda name: (
            *(f"write {base}/{name}/{topic}" for topic in DEVICE_WRITES),
            *(f"read {base}/{name}/{topic}" for topic in DEVICE_READS),
        ),
        "receiver": lambda name: (
            f"read {base}/#",
            *(f"write {base}/+/{words}" for words in (f"ack/{name}", "cmd/replay", f"fleet/{name}")),
        ),
        "operator": lambda _name: (f"read {base}/#", f"write {base}/+/cmd/+"),
    }
    lines = ["# Written by make-site.sh from the folders devices, receivers, operators: the next run overwrites it."]
    for client in clients:
        lines += ["", f"# {client.kind}", f"user {client.name}"]
        lines += [f"topic {right}" for right in rights[client.kind](client.name)]
    return "\n".join(lines) + "\n"


def write_file(file: Path, content: bytes, mode: int = 0o644) -> None:
    """Whole or not at all, with its rights from the first byte on; an equal file is left as it is."""
    if file.exists() and file.read_bytes() == content and file.stat().st_mode & 0o777 == mode:
        return
    file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    fresh = file.with_name(f".{file.name}.new")
    fresh.unlink(missing_ok=True)
    with os.fdopen(os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as stream:
        os.fchmod(stream.fileno(), mode)  # whatever the umask
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())
    fresh.replace(file)


# ------------------------------------------------------------------------------------------------- the command line


def read_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="make-site.sh",
        description="Make, or extend, the certificates, the rights and the mosquitto configuration of one site. Run it"
        " again with a new --device to add one: nothing that is there changes.",
    )
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="where everything is kept; guard it like a key")
    parser.add_argument("--site", metavar="NAME", help="the laboratory's name in topics; for a new folder")
    parser.add_argument(
        "--host", action="append", default=[], help="name or address by which clients reach the broker; the first one"
        " goes into the devices' configuration"
    )  # fmt: skip
    for kind, meaning in (
        ("device", "a microscope: its name in topics"),
        ("receiver", "a collector: reads everything, acknowledges, asks for replay"),
        ("operator", "a person or program that may send commands"),
    ):
        parser.add_argument(
            f"--{kind}", action="append", default=[], metavar="NAME", help=f"{meaning}; may be repeated"
        )
    parser.add_argument(
        "--remove", action="append", default=[], metavar="NAME", help="take away the rights of this one"
    )
    parser.add_argument(
        "--renew",
        action="store_true",
        help="new keys and certificates: of those named, who are there, else of the broker and everybody",
    )
    parser.add_argument("--days", type=int, default=LEAF_DAYS, help="life of new certificates (default: %(default)s)")
    parser.add_argument("--port", type=int, help="port of the broker (default: 8883)")
    parser.add_argument("--at", metavar="PATH", help="place of the folder broker/ there (/etc/mosquitto/hematovision)")
    parser.add_argument("--data", metavar="PATH", help="place of mosquitto's database there (/var/lib/mosquitto)")
    options = parser.parse_args(arguments)
    if not 1 <= options.days <= CA_DAYS:
        parser.error(f"--days {options.days}: allowed are 1 to {CA_DAYS}")
    if options.port is not None and not 1 <= options.port <= 65535:
        parser.error(f"--port {options.port}: allowed are 1 to 65535")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    options = read_arguments(arguments)
    now = datetime.now(timezone.utc)
    try:
        outcomes = make_site(
            options.folder,
            site=options.site,
            hosts=options.host,
            port=options.port,
            at=options.at,
            data=options.data,
            clients=[Client(kind, name) for kind in KINDS for name in getattr(options, kind)],
            remove=options.remove,
            is_renewal=options.renew,
            days=options.days,
            now=now,
        )
    except SiteError as error:
        print(f"make-site.sh: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"make-site.sh: {error.filename or options.folder}: {error.strerror}", file=sys.stderr)
        return 1
    for one in outcomes:
        left = (one.expires - now).days
        soon = "   <- renew soon, with --renew" if left < RENEW_SOON_DAYS else ""
        print(f"{one.kind:<10}{one.name:<32}{one.what}, good until {one.expires:%Y-%m-%d} ({left} days){soon}")
    for name in options.remove:
        print(f"{'removed':<10}{name:<32}the certificates that it had are on the list of refused ones")
    print(
        f"Now carry {options.folder / 'broker'} to the broker and the others' folders to their owners: docs/security.md"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
