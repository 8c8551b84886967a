"""The configuration: every fault at once, in words, with its place; secrets never shown."""

from __future__ import annotations

import json
import logging
import os
import re
import stat
import time
from pathlib import Path

import jsonschema
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from agent.config import (
    BROKER_PASSWORD_VARIABLE,
    WEB_PASSWORD_VARIABLE,
    Config,
    ModelsSection,
    OutboxSection,
    WebSection,
    config_sha256,
    json_schema,
    load_config,
    load_reference_intervals,
    loads,
    models_folder,
    packaged_folder,
    read_secret,
    read_web_password,
    state_folder,
    template,
)
from agent.config_reader import Key, describe
from agent.errors import ConfigError

TOP = Path(__file__).resolve().parent.parent

FIVE_FAULTS = """\
site: lab
device: Microscope.1
camera:
  kind: usbb
  queue_frames: two
  queue_frame: 3
broker:
  host: localhost
  port: 70000
"""


def faults_of(text: str, **environment: str) -> tuple[str, ...]:
    """The faults of a text, without the surroundings of this process."""
    with pytest.raises(ConfigError) as caught:
        loads(text, "test.yaml", environment=environment)
    return caught.value.faults


def fault_of(text: str, **environment: str) -> str:
    (fault,) = faults_of(text, **environment)
    return fault


# The committed files --------------------------------------------------------------------------------------------------


def test_config_yaml_at_the_top_is_the_default_configuration():
    assert load_config(TOP / "config.yaml", {}) == Config()
    assert load_config(None, {}) == Config()


def test_config_yaml_names_every_key_once_with_its_default_and_a_comment():
    lines = (TOP / "config.yaml").read_text().splitlines()
    document = yaml.safe_load("\n".join(lines))
    for key in describe(Config).leaves():
        section = document
        for name in key.path[:-1]:
            section = section[name]
        assert key.path[-1] in section, f"{key.name} is missing"
        assert section[key.path[-1]] == key.default, f"{key.name} has not its default"
        assert comment_above(lines, key), f"{key.name} has no comment with unit, effect and default"


def comment_above(lines: list[str], key: Key) -> bool:
    indent = "  " * (len(key.path) - 1)
    pattern = re.compile(rf"{indent}{key.path[-1]}: .+")
    comments = [lines[number - 1] for number, line in enumerate(lines) if pattern.fullmatch(line)]
    return any(comment.startswith(f"{indent}# Default: ") for comment in comments) and len(key.description) > 10


def test_config_yaml_and_the_schema_are_what_the_sections_say():
    """To renew them: hematovision check-config --template > config.yaml; ... --schema > docs/config.schema.json."""
    assert (TOP / "config.yaml").read_text() == template()
    assert json.loads((TOP / "docs/config.schema.json").read_text()) == json_schema()


def test_editors_find_the_schema_at_the_head_of_config_yaml():
    first = (TOP / "config.yaml").read_text().splitlines()[0]
    assert (TOP / first.removeprefix("# yaml-language-server: $schema=")).is_file()


def test_the_schema_is_sound_and_takes_the_default_file_and_refuses_the_faulty_one():
    schema = json_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    validator = jsonschema.Draft202012Validator(schema)
    validator.validate(yaml.safe_load((TOP / "config.yaml").read_text()))
    assert len(list(validator.iter_errors(yaml.safe_load(FIVE_FAULTS)))) == 5


def test_every_key_has_a_description_and_says_what_it_allows():
    for key in describe(Config).leaves():
        assert key.description, key.name
        assert key.allowed, key.name


# Faults ---------------------------------------------------------------------------------------------------------------


def test_five_faults_come_in_one_message_in_the_order_of_the_file_with_place_and_remedy():
    faults = faults_of(FIVE_FAULTS)
    assert len(faults) == 5
    assert faults[0] == "device (line 2): found 'Microscope.1'; allowed: 1 to 63 of a-z, 0-9 and hyphen"
    assert faults[1].startswith("camera.kind (line 4): found 'usbb'; allowed: one of simulated, folder, video, ")
    assert faults[1].endswith("did you mean 'usb'?")
    assert faults[2] == "camera.queue_frames (line 5): found 'two'; allowed: whole number 1 to 64"
    assert faults[3].startswith("camera.queue_frame (line 6): unknown key; did you mean 'queue_frames'? allowed here: ")
    assert "max_megapixels" in faults[3]
    assert faults[4] == "broker.port (line 9): found 70000; allowed: whole number 1 to 65535"


def test_the_message_names_the_file_and_speaks_no_jargon():
    with pytest.raises(ConfigError) as caught:
        loads(FIVE_FAULTS, "/etc/lab.yaml", environment={})
    message = str(caught.value)
    assert message.startswith("/etc/lab.yaml: 5 faults\n")
    assert not re.search("pydantic|validation|input_value|type=|Traceback", message)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("um_per_px: 0.1", "did you mean camera.um_per_px?"),
        ("broker: {host: }", "found null; allowed: a name or address"),
        ("broker: {port: true}", "broker.port (line 1): found 'true'; allowed: whole number"),
        ("broker: {port: 1883.5}", "found 1883.5; allowed: whole number"),
        ("broker: {port: 18:83}", "found '18:83'; allowed: whole number"),
        ("broker: {port: '1883'}", "take the quotes away"),
        ("broker: {tls: {enabled: maybe}}", "found 'maybe'; allowed: true or false"),
        ("broker: {tls: true}", "broker.tls (line 1): found 'true'; allowed: the keys enabled, ca_file"),
        ("camera: [usb]", "camera (line 1): found a list; allowed: the keys kind"),
        ("site: {name: x}", "site (line 1): found keys below it; allowed: 1 to 63"),
        ("site: a\nsite: b", "site (line 2): given twice, first on line 1"),
        ("site: !python/object:os.system x", "found the tag !python/object:os.system"),
        ("site: !!python/object/apply:os.system [x]", "site (line 1)"),
        ("quality: {min_focus: .inf}", "found '.inf'; allowed: number 0 or more"),
        ("quality: {min_focus: .nan}", "found '.nan'; allowed: number 0 or more"),
        ("quality: {min_focus: 1e999}", "allowed: number 0 or more"),
        ("camera: {folder: {path: ''}}", "found ''; allowed: a path, or null"),
        ('camera: {folder: {path: "a\\0b"}}', "with control characters"),
        ('broker: {host: "\\ud800"}', "with control characters"),
        ("camera: {folder: {path: ~nobody-of-this-name/x}}", "no such user's home folder"),
        ("camera: {usb: {device: -1}}", "found -1; allowed: whole number 0 to 1023, or a path below /dev"),
        ("broker: {port: 99999999999999999999999999}", "found 99999999999999999999999999;"),
        ("- a\n- b", "line 1: found a list; allowed: the keys site, device"),
        ("just words", "line 1: found 'just words'; allowed: the keys site"),
        ("a: b: c", "line 1, column 5: this is not YAML"),
        ("camera:\n\tkind: usb", "indent with spaces, not with tabs"),
        ("site: a\n---\nsite: b", "line 2, column 1: this is not YAML"),
        ("site: a\x01b", "a character that YAML does not allow"),
        ("[" * 5000, "nested too deeply"),
        ("? {a: b}\n: c", "unknown key"),
        ("<<: {site: b}", "unknown key"),
    ],
)
def test_each_fault_is_told_with_its_place_and_what_is_allowed(text: str, expected: str):
    assert expected in fault_of(text)


def test_a_long_found_value_is_cut():
    assert len(fault_of(f"site: {'x' * 5000}")) < 200


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("camera: {kind: folder}", "camera.kind (line 1): found 'folder', which needs camera.folder.path"),
        ("camera: {kind: video}", "which needs camera.video.path"),
        ("camera: {kind: network}", "which needs camera.network.url"),
        ("camera: {network: {password_file: p}}", "set camera.network.username too"),
        ("broker: {password_file: p}", "set broker.username too"),
        ("broker: {tls: {enabled: true, key_file: k}}", "set broker.tls.certificate_file too"),
        ("broker: {tls: {ca_file: ca.pem}}", "broker.tls.enabled is false"),
    ],
)
def test_keys_that_do_not_go_together_are_a_fault(text: str, expected: str):
    assert expected in fault_of(text)


def test_keys_that_do_not_go_together_are_told_beside_other_faults_but_not_because_of_them():
    faults = faults_of("site: X\ncamera:\n  kind: folder\n  folder: {path: [1]}\nbroker: {tls: {ca_file: ca}}")
    assert [fault.split(" ")[0] for fault in faults] == ["site", "camera.folder.path", "broker.tls.ca_file"]


def test_a_password_in_an_address_is_refused_and_never_repeated():
    fault = fault_of("camera: {network: {url: 'http://user:hunter2@camera/'}}")
    assert "holds a password" in fault
    assert "hunter2" not in fault
    assert "hunter2" not in fault_of("camera: {network: {url: 'ftp://user:hunter2@camera/'}}")
    assert "hunter2" not in fault_of("camera: {kind: 'ftp://user:hunter2@camera/'}")


@given(
    st.text() | st.lists(st.sampled_from([*":-[]{}#&*!|>'\"%@ \n\t", "site", "camera", "kind", "~", "1"])).map("".join)
)
@settings(max_examples=150, deadline=None)
def test_any_text_gives_a_configuration_or_a_config_error(text: str):
    try:
        loads(text, "random", environment={})
    except ConfigError as error:
        assert error.faults  # noqa: PT017 - raising is allowed here, not asked for


# What is read ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["", "\n# only a comment\n", "null", "camera:\nbroker:\n", "\ufeffsite: site"])
def test_a_file_that_says_nothing_gives_the_defaults(text: str, tmp_path: Path):
    file = tmp_path / "c.yaml"
    file.write_text(text, encoding="utf-8")
    assert load_config(file, {}) == Config()


def test_scalars_are_read_as_the_key_means_them():
    config = loads(
        "site: no\nsample: {id: 2026-11-23}\nquality: {min_focus: 1e2}\n"
        "broker: {protocol: 5, username: 007, tls: {enabled: yes}}\ncamera: {usb: {device: /dev/video0}}",
        "test",
        environment={},
    )
    assert (config.site, config.sample.id, config.quality.min_focus) == ("no", "2026-11-23", 100.0)
    assert (config.broker.protocol, config.broker.username, config.broker.tls.enabled) == ("5", "007", True)
    assert config.camera.usb.device == "/dev/video0"
    assert loads("camera: {usb: {device: 2}}", "test", environment={}).camera.usb.device == 2


def test_relative_paths_start_at_the_folder_of_the_file_and_tilde_is_home(tmp_path: Path):
    file = tmp_path / "c.yaml"
    file.write_text("camera: {folder: {path: images}, video: {path: ~/film.mp4}}\noutbox: {folder: /var/x}")
    config = load_config(file, {})
    assert config.camera.folder.path == tmp_path / "images"
    assert config.camera.video.path == Path.home() / "film.mp4"
    assert config.outbox.folder == Path("/var/x")


def test_a_configuration_cannot_change():
    with pytest.raises(Exception, match="frozen"):
        Config().broker.host = "other"  # type: ignore[misc]


# Files that are none --------------------------------------------------------------------------------------------------


def test_a_missing_file_a_folder_and_a_picture_are_told_apart(tmp_path: Path):
    def fault(path: Path) -> str:
        with pytest.raises(ConfigError) as caught:
            load_config(path, {})
        return str(caught.value)

    assert "there is no such file" in fault(tmp_path / "absent.yaml")
    assert "this is a folder" in fault(tmp_path)
    (tmp_path / "latin.yaml").write_bytes("site: a\ndevice: m\u00fcnchen".encode("latin-1"))
    assert "line 2: byte 0xfc is not UTF-8" in fault(tmp_path / "latin.yaml")
    (tmp_path / "large.yaml").write_bytes(b"#" * 1_000_001)
    assert "this is no configuration file" in fault(tmp_path / "large.yaml")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_without_the_right_to_read_is_told(tmp_path: Path):
    file = tmp_path / "c.yaml"
    file.touch(mode=0o000)
    with pytest.raises(ConfigError, match="cannot be read: Permission denied"):
        load_config(file, {})


# Environment ----------------------------------------------------------------------------------------------------------


def test_a_variable_goes_before_the_file_with_the_same_validation():
    environment = {
        "HEMATOVISION_BROKER__HOST": "b",
        "HEMATOVISION_BROKER__TLS__ENABLED": "true",
        "HEMATOVISION_SITE": "s",
    }
    config = loads("broker: {host: a}", "test", environment=environment)
    assert (config.broker.host, config.broker.tls.enabled, config.site) == ("b", True, "s")
    fault = fault_of("broker: {port: 1}", HEMATOVISION_BROKER__PORT="many")
    assert fault == "broker.port (variable HEMATOVISION_BROKER__PORT): found 'many'; allowed: whole number 1 to 65535"


def test_an_empty_variable_is_not_set():
    assert loads("", "test", environment={"HEMATOVISION_BROKER__HOST": ""}) == Config()


def test_a_variable_that_sets_nothing_is_a_fault_with_the_nearest_one():
    assert fault_of("", HEMATOVISION_BROKER__HOTS="x").endswith("did you mean HEMATOVISION_BROKER__HOST?")
    assert fault_of("", HEMATOVISION_BROKER_HOST="x").endswith("did you mean HEMATOVISION_BROKER__HOST?")
    assert "HEMATOVISION_SECTION__KEY" in fault_of("", HEMATOVISION_X__Y="x")


def test_secrets_and_other_programs_variables_are_left_alone():
    environment = {BROKER_PASSWORD_VARIABLE: "hunter2", "HEMATOVISION_TEST_FIELDS": "/x", "HOME": "/home/me"}
    assert loads("", "test", environment=environment) == Config()


def test_a_relative_path_in_a_variable_starts_at_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    config = loads("", "t", folder=Path("/etc"), environment={"HEMATOVISION_CAMERA__FOLDER__PATH": "images"})
    assert config.camera.folder.path == tmp_path / "images"


def test_a_configuration_in_a_folder_whose_name_is_not_utf_8_is_told(tmp_path: Path):
    """As on a stick from an old computer: only paths that start there are in the way."""
    folder = tmp_path / os.fsdecode(b"caf\xe9")
    folder.mkdir()
    file = folder / "c.yaml"
    file.write_text("site: lab\n")
    assert load_config(file, {}).site == "lab"
    file.write_text("site: lab\ncamera: {folder: {path: fields}}\n")
    with pytest.raises(ConfigError) as caught:
        load_config(file, {})
    (fault,) = caught.value.faults
    assert "camera.folder.path (line 2): lies in a folder whose name is not UTF-8" in fault
    assert r"caf\udce9" in fault


# Secrets --------------------------------------------------------------------------------------------------------------


def secret_file(folder: Path, content: bytes, mode: int = 0o600) -> Path:
    file = folder / "password"
    file.write_bytes(content)
    file.chmod(mode)
    return file


@pytest.mark.parametrize("content", [b"hunter2", b"hunter2\n", b"hunter2\r\n"])
def test_one_line_break_at_the_end_of_a_secret_does_not_count(content: bytes, tmp_path: Path):
    assert read_secret(secret_file(tmp_path, content), "X", {}) == "hunter2"


def test_the_mark_that_windows_editors_put_before_utf_8_is_no_part_of_a_secret(tmp_path: Path):
    """The broker would refuse it, and nobody sees the mark."""
    assert read_secret(secret_file(tmp_path, b"\xef\xbb\xbfhunter2\r\n"), "X", {}) == "hunter2"


def test_spaces_belong_to_a_secret(tmp_path: Path):
    assert read_secret(secret_file(tmp_path, b" a b \n"), "X", {}) == " a b "


def test_without_a_file_the_variable_is_taken_and_neither_is_none(tmp_path: Path):
    assert read_secret(secret_file(tmp_path, b"file"), "X", {"X": "variable"}) == "file"
    assert read_secret(None, "X", {"X": "variable"}) == "variable"
    assert read_secret(None, "X", {"X": ""}) is None
    assert read_secret(None, "X", {}) is None


@pytest.mark.parametrize("content", [b"", b"\n", b"hunter2\nmore\n", b"hunter2\xff", b"hunter2" * 1000])
def test_a_file_that_is_no_password_is_refused_without_showing_it(content: bytes, tmp_path: Path):
    with pytest.raises(ConfigError) as caught:
        read_secret(secret_file(tmp_path, content), "X", {})
    assert "password" in str(caught.value)
    assert "hunter2" not in str(caught.value)
    assert caught.value.__cause__ is None


def test_a_missing_password_file_is_told_with_the_variable_that_does_instead(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"cannot be read: No such file.*X is taken"):
        read_secret(tmp_path / "absent", "X", {})


def test_a_password_file_that_all_can_read_is_warned_about(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    file = secret_file(tmp_path, b"hunter2", 0o644)
    assert stat.S_IMODE(file.stat().st_mode) == 0o644
    with caplog.at_level(logging.WARNING):
        assert read_secret(file, "X", {}) == "hunter2"
    assert "readable for all" in caplog.text
    assert "hunter2" not in caplog.text
    caplog.clear()
    read_secret(secret_file(tmp_path, b"hunter2", 0o600), "X", {})
    assert not caplog.text


# Derived facts --------------------------------------------------------------------------------------------------------


def test_the_digest_names_the_effective_configuration():
    digest = config_sha256(Config())
    assert re.fullmatch("[0-9a-f]{64}", digest)
    assert digest == config_sha256(loads("site: site  # the default, written out", "test", environment={}))
    assert digest != config_sha256(loads("site: other", "test", environment={}))


def test_the_digest_does_not_depend_on_whether_a_number_was_written_whole():
    assert config_sha256(loads("quality: {min_brightness: 25.0}", "a", environment={})) == config_sha256(Config())


def test_the_state_folder_is_the_configured_one_or_systemds_or_the_users():
    section = OutboxSection()
    assert state_folder(OutboxSection(folder=Path("/x")), {"STATE_DIRECTORY": "/y"}) == Path("/x")
    assert state_folder(section, {"STATE_DIRECTORY": "/y:/z", "XDG_STATE_HOME": "/w"}) == Path("/y")
    assert state_folder(section, {"XDG_STATE_HOME": "/w"}) == Path("/w/hematovision")
    assert state_folder(section, {"XDG_STATE_HOME": "w"}) == Path.home() / ".local/state/hematovision"
    assert state_folder(section, {}) == Path.home() / ".local/state/hematovision"


def test_in_a_checkout_the_packaged_folder_is_its_top():
    if (TOP / "agent" / "_packaged").is_dir():
        pytest.skip("this is an installed package")
    assert packaged_folder() == TOP
    assert models_folder(ModelsSection()) == TOP / "models"
    assert models_folder(ModelsSection(folder=Path("/m"))) == Path("/m")


# ------------------------------------------------------------------------------------------- reference intervals


def test_the_packaged_reference_table_is_sound():
    table = load_reference_intervals()
    assert all(0 <= row.low_pct <= row.high_pct <= 100 for row in table)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("- {class: x, age_band: adult, low_pct: 9, high_pct: 2, source: s}", "row 1, the whole: .*low_pct is above"),
        ("- {class: x, age_band: old, low_pct: 1, high_pct: 2, source: s}", "row 1, age_band: "),
        ("- {class: x, age_band: adult, low_pct: 1, high_pct: 2}", "row 1, source: "),
        (
            "- &r {class: x, age_band: adult, low_pct: 1, high_pct: 2, source: s}\n- *r",
            "row 2: x, adult stands there twice",
        ),
        ("class: x", "row ?"),
        ("- [", "not YAML"),
    ],
)
def test_a_faulty_reference_table_is_told_by_its_row(text: str, expected: str, tmp_path: Path):
    path = tmp_path / "reference.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=expected.replace("?", "[?]")):
        load_reference_intervals(path)


@pytest.mark.parametrize("text", ["a: " + "[" * 5000, "a: " + "{b: " * 5000, "[" * 5000 + "]" * 5000, "- " * 3000])
def test_a_text_that_is_nested_without_end_is_refused_at_once(text: str):
    begun_s = time.monotonic()
    with pytest.raises(ConfigError, match=r"nested too deeply|found a list"):
        loads(text, "a text")
    assert time.monotonic() - begun_s < 2


@pytest.mark.parametrize("key", ["id: s-1", "accession: A-7"])
def test_what_names_one_sample_does_not_go_with_a_sample_for_each_slide(key: str):
    with pytest.raises(ConfigError, match="each-slide"):
        loads(f"sample: {{start: each-slide, {key}}}", "a text")
    assert loads(f"sample: {{start: auto, {key}}}", "a text").sample.start == "auto"


def test_a_dilution_needs_a_chamber():
    with pytest.raises(ConfigError, match="chamber_depth_mm"):
        loads("differential: {dilution: 20}", "a text")


# The page's password --------------------------------------------------------------------------------------------------


def test_a_page_that_other_computers_reach_needs_a_password_and_one_for_this_computer_does_not(tmp_path: Path):
    assert read_web_password(WebSection(), {}) is None
    for host in ("0.0.0.0", "::", "192.168.1.7", "scope.lab"):
        with pytest.raises(ConfigError, match="needs a password"):
            read_web_password(WebSection(host=host), {})
        assert read_web_password(WebSection(host=host), {WEB_PASSWORD_VARIABLE: "long enough"}) == "long enough"
    section = WebSection(host="0.0.0.0", password_file=secret_file(tmp_path, b"from the file"))
    assert read_web_password(section, {WEB_PASSWORD_VARIABLE: "long enough"}) == "from the file"


def test_a_short_password_of_the_page_is_refused_without_showing_it(tmp_path: Path):
    for section, environment in (
        (WebSection(), {WEB_PASSWORD_VARIABLE: "hunter2"}),
        (WebSection(password_file=secret_file(tmp_path, b"hunter2")), {}),
    ):
        with pytest.raises(ConfigError, match="8 characters or more") as caught:
            read_web_password(section, environment)
        assert "hunter2" not in str(caught.value)


def test_a_key_of_the_page_without_its_certificate_is_a_clash():
    assert "web.certificate_file" in fault_of("web: {key_file: page.key}")
