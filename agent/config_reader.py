"""From a YAML text to a validated section, with every fault in words that an operator understands.

It knows no key of the agent: the keys, what they mean and what they allow come from the section class (`config.py`),
by way of its JSON Schema. So the file, the message about a fault, the editor's schema and the commented default file
all tell the same.

    YAML text --compose--> nodes with line numbers --walk beside the keys--> values --pydantic--> section
                                        |                     |                    |
                                        +---------- faults, with their place ------+

Scalars are read by what the key expects, not by what YAML 1.1 guesses: a device called `no` stays `no`, the sample
`2026-11-23` is no date, `18:83` is no number in base 60, and `protocol: 5` needs no quotes.
"""

from __future__ import annotations

import difflib
import json
import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from agent.errors import ConfigError

KeyPath = tuple[str, ...]
SectionT = TypeVar("SectionT", bound=BaseModel)

DEEPEST_BRACKETS = 32
"""Sections lie three deep; two thousand open brackets keep the YAML scanner busy for eight seconds."""

LONGEST_FOUND = 60
"""Characters of a found value that a message repeats; more would hide the sentence around it."""

_NULL = frozenset({"", "~", "null", "Null", "NULL"})
_TRUE = frozenset({"true", "yes", "on"})
_FALSE = frozenset({"false", "no", "off"})
_WHOLE = re.compile(r"[-+]?(0|[1-9][0-9_]{0,40})")
_REAL = re.compile(r"[-+]?([0-9][0-9_]{0,30}(\.[0-9]*)?|\.[0-9]+)([eE][-+]?[0-9]{1,4})?")
_BRACKETS = re.compile(r"[\[\]{}]")
_CREDENTIALS = re.compile(r"(?<=://)[^/\s]*@")


@dataclass(frozen=True, slots=True)
class Key:
    """One key of the configuration, as its section class describes it.

    kinds: what a value may be: integer, number, boolean, string, path, null.   allowed: the same in words.
    keys: the keys below it, if it is a section; a leaf has none.
    """

    path: KeyPath
    description: str
    default: Any
    kinds: frozenset[str]
    allowed: str
    choices: tuple[str, ...] = ()
    keys: Mapping[str, Key] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return ".".join(self.path)

    @property
    def is_section(self) -> bool:
        return bool(self.keys)

    def leaves(self) -> Iterator[Key]:
        """Every key below this one that holds a value, in the order of the document."""
        for key in self.keys.values():
            yield from key.leaves() if key.is_section else (key,)


@dataclass(frozen=True, slots=True)
class Clash:
    """Two keys, each allowed for itself, that do not go together. `key` is blamed, `others` take part."""

    key: KeyPath
    others: tuple[KeyPath, ...]
    message: str


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a value was written: a line of the document (from 1) or a variable of the environment."""

    words: str
    order: tuple[int, str]

    @classmethod
    def line(cls, number: int) -> _Place:
        return cls(f"line {number}", (number, ""))

    @classmethod
    def variable(cls, name: str) -> _Place:
        return cls(f"variable {name}", (1_000_000_000, name))


@dataclass(slots=True)
class _Reading:
    """What has been read so far: values as nested dicts, the place of each key, the faults."""

    root: Key
    folder: Path
    values: dict[str, Any] = field(default_factory=dict)
    places: dict[KeyPath, _Place] = field(default_factory=dict)
    faults: list[tuple[tuple[int, str], str]] = field(default_factory=list)
    faulty: set[KeyPath] = field(default_factory=set)

    def blame(self, path: KeyPath, text: str, place: _Place | None = None) -> None:
        place = place or self.place_of(path)
        self.faults.append((place.order, f"{'.'.join(path)} ({place.words}): {text}"))
        self.faulty.add(path)

    def place_of(self, path: KeyPath) -> _Place:
        """The place of a key, or of the nearest section around it that stands in the document."""
        for length in range(len(path), 0, -1):
            if place := self.places.get(path[:length]):
                return place
        return _Place("not in the file", (0, ""))


# Describing -----------------------------------------------------------------------------------------------------------


def describe(section_class: type[BaseModel]) -> Key:
    """The tree of keys of a section class."""
    schema = section_class.model_json_schema()
    return _describe(schema, schema.get("$defs", {}), (), {})


def _describe(
    schema: Mapping[str, Any], definitions: Mapping[str, Any], path: KeyPath, outer: Mapping[str, Any]
) -> Key:
    # Pydantic before 2.9 wraps a reference that has a default in `allOf`.
    reference = schema.get("$ref") or next((part["$ref"] for part in schema.get("allOf", ())), None)
    if reference:
        return _describe(definitions[reference.rsplit("/", 1)[-1]], definitions, path, schema)
    keys = {
        name: _describe(part, definitions, (*path, name), {}) for name, part in schema.get("properties", {}).items()
    }
    parts = schema.get("anyOf", [schema])
    return Key(
        path=path,
        description=str(outer.get("description") or schema.get("description", "")),
        default=outer.get("default", schema.get("default")),
        kinds=frozenset(_kind(part) for part in parts),
        allowed=", or ".join(_allowed(part) for part in parts),
        choices=tuple(choice for part in parts for choice in part.get("enum", ())),
        keys=keys,
    )


def _kind(part: Mapping[str, Any]) -> str:
    return "path" if part.get("format") == "path" else str(part.get("type", "object"))


def _allowed(part: Mapping[str, Any]) -> str:
    """What a value may be, in words, from its JSON Schema."""
    if "x-allowed" in part:
        return str(part["x-allowed"])
    if "enum" in part:
        return "one of " + ", ".join(part["enum"])
    kind = _kind(part)
    if kind in ("integer", "number"):
        return ("whole number" if kind == "integer" else "number") + _limits(part)
    if kind == "object":
        return "the keys " + ", ".join(part.get("properties", {}))
    return {"boolean": "true or false", "path": "a path", "string": "text", "null": "null"}[kind]


def _limits(part: Mapping[str, Any]) -> str:
    low, above, high = (part.get(name) for name in ("minimum", "exclusiveMinimum", "maximum"))
    if above is not None:
        return f" above {_number(above)}" + (f" up to {_number(high)}" if high is not None else "")
    if low is not None:
        return f" {_number(low)} to {_number(high)}" if high is not None else f" {_number(low)} or more"
    return ""


def _number(value: float) -> str:
    return f"{int(value)}" if value == int(value) else f"{value:g}"


def default_yaml(section_class: type[BaseModel], head: str) -> str:
    """The configuration file that says all defaults: each key with its comment (unit, effect, default, allowed)."""
    lines = [f"# {line}".rstrip() if not line.startswith("#") else line for line in head.splitlines()]
    return "\n".join([*lines, *_yaml_lines(describe(section_class), depth=0), ""])


def _yaml_lines(section: Key, depth: int) -> Iterator[str]:
    indent = "  " * depth
    for name, key in section.keys.items():
        yield ""
        for line in key.description.splitlines():
            yield f"{indent}# {line}".rstrip()
        if key.is_section:
            yield f"{indent}{name}:"
            yield from _yaml_lines(key, depth + 1)
        else:
            # JSON's scalars are YAML's; text needs quotes only where a reader would take it for something else.
            default = key.default if isinstance(key.default, str) else json.dumps(key.default)
            yield f"{indent}# Default: {default}. Allowed: {key.allowed}."
            yield f"{indent}{name}: {default}"


# Reading --------------------------------------------------------------------------------------------------------------


def read_section(
    section_class: type[SectionT],
    text: str,
    source: str,
    *,
    folder: Path,
    environment: Mapping[str, str],
    prefix: str,
    other_variables: Iterable[str] = (),
    find_clashes: Callable[[SectionT], Iterable[Clash]] = lambda _section: (),
) -> SectionT:
    """A validated section from a YAML text and the environment; raises `ConfigError` with all faults at once.

    source: names the document in the message.   folder: relative paths of the document start here.
    prefix: variables `{prefix}SECTION__KEY` override the document (relative paths in them start at the working
    directory); other_variables with the prefix are somebody else's.
    """
    reading = _Reading(root=describe(section_class), folder=folder)
    node = _compose(text, source)
    if node is not None:
        _read_document(reading, node, source)
    _read_environment(reading, environment, prefix, frozenset(other_variables))
    section = _validate(reading, section_class)
    for clash in find_clashes(section):
        if not reading.faulty & {clash.key, *clash.others}:
            reading.blame(clash.key, clash.message)
    if reading.faults:
        raise ConfigError(source, tuple(text for _, text in sorted(reading.faults)))
    return section


def read_plain(text: str, source: str) -> object:
    """A YAML text as plain lists, mappings and scalars; for tables that are validated elsewhere. Raises ConfigError."""
    node = _compose(text, source)
    loader = yaml.SafeLoader("")
    try:
        return None if node is None else loader.construct_document(node)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(source, (f"cannot be read: {error}",)) from error
    finally:
        loader.dispose()


def _compose(text: str, source: str) -> yaml.Node | None:
    if _bracket_depth(text) > DEEPEST_BRACKETS:
        raise ConfigError(source, ("nested too deeply to be a configuration; is this the right file?",))
    try:
        return yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"line {mark.line + 1}, column {mark.column + 1}" if mark else "somewhere"
        reason = ", ".join(part for part in (error.context, error.problem) if part)
        hint = "; indent with spaces, not with tabs" if "'\\t'" in reason else ""
        raise ConfigError(source, (f"{place}: this is not YAML: {reason}{hint}",)) from error
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        fault = f"line {line}: a character that YAML does not allow (code {error.character!r}); is this a text file?"
        raise ConfigError(source, (fault,)) from error
    except RecursionError as error:
        raise ConfigError(source, ("nested too deeply to be a configuration; is this the right file?",)) from error


def _bracket_depth(text: str) -> int:
    """How many brackets are open at most; the YAML scanner's time grows with the cube of it."""
    depth = deepest = 0
    for mark in _BRACKETS.findall(text):
        depth = depth + 1 if mark in "[{" else max(0, depth - 1)
        deepest = max(deepest, depth)
    return deepest


def _read_document(reading: _Reading, node: yaml.Node, source: str) -> None:
    if isinstance(node, yaml.ScalarNode) and node.style is None and node.value in _NULL:
        return
    if not isinstance(node, yaml.MappingNode):
        fault = f"line {node.start_mark.line + 1}: found {_node_words(node)}; allowed: {reading.root.allowed}"
        raise ConfigError(source, (fault,))
    reading.values = _read_mapping(reading, node, reading.root)


def _read_mapping(reading: _Reading, node: yaml.MappingNode, section: Key) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for name_node, value_node in node.value:
        place = _Place.line(name_node.start_mark.line + 1)
        name = str(name_node.value) if isinstance(name_node, yaml.ScalarNode) else "?"
        name = name if name.isprintable() else repr(name)
        path = (*section.path, name)
        key = section.keys.get(name)
        if key is None:
            reading.blame(path, _unknown_key_words(reading.root, section, name), place)
        elif path in reading.places:
            reading.blame(path, f"given twice, first on {reading.places[path].words}; keep one", place)
        else:
            reading.places[path] = place
            _read_value(reading, value_node, key, values)
    return values


def _read_value(reading: _Reading, node: yaml.Node, key: Key, values: dict[str, Any]) -> None:
    """Store a key's value in `values`, or blame it. An empty section is a section of defaults."""
    is_plain_null = isinstance(node, yaml.ScalarNode) and node.style is None and node.value in _NULL
    if not node.tag.startswith("tag:yaml.org,2002:"):
        reading.blame(key.path, f"found the tag {node.tag}; tags have no meaning here, take it away")
    elif key.is_section and isinstance(node, yaml.MappingNode):
        values[key.path[-1]] = _read_mapping(reading, node, key)
    elif key.is_section and is_plain_null:
        values[key.path[-1]] = {}
    elif key.is_section or not isinstance(node, yaml.ScalarNode):
        reading.blame(key.path, _refusal(key, _node_words(node)))
    else:
        value = _scalar(str(node.value), node.style is None, key)
        _store(reading, key, value, reading.folder, values)


def _scalar(text: str, is_plain: bool, key: Key) -> str | int | float | bool | None:
    """A scalar as the key means it; text that does not fit stays text, for the message."""
    if not is_plain:
        return text
    if text in _NULL:
        return None
    if "boolean" in key.kinds and text.casefold() in _TRUE | _FALSE:
        return text.casefold() in _TRUE
    if key.kinds & {"integer", "number"}:
        if _WHOLE.fullmatch(text):
            return int(text)
        if _REAL.fullmatch(text):
            return float(text)
    return text


def _store(reading: _Reading, key: Key, value: Any, folder: Path, values: dict[str, Any]) -> None:
    if isinstance(value, str):
        if any(unicodedata.category(letter) in ("Cc", "Cs") for letter in value):
            reading.blame(key.path, f"found {found_words(value)} with control characters; allowed: {key.allowed}")
            return
        if "path" in key.kinds:
            if not value:
                reading.blame(key.path, _refusal(key, "''"))
                return
            try:
                value = str(folder / Path(value).expanduser())
            except RuntimeError:
                reading.blame(key.path, f"found {found_words(value)}; there is no such user's home folder here")
                return
            if not _is_utf_8(value):
                reading.blame(key.path, f"lies in a folder whose name is not UTF-8: {value!r}; rename that folder")
                return
    values[key.path[-1]] = value


def _is_utf_8(text: str) -> bool:
    """Whether it can be written: names of files that are no UTF-8 come with surrogates (PEP 383)."""
    return not any(unicodedata.category(letter) == "Cs" for letter in text)


def _read_environment(
    reading: _Reading, environment: Mapping[str, str], prefix: str, other_variables: frozenset[str]
) -> None:
    leaves = {variable_name(prefix, key.path): key for key in reading.root.leaves()}
    # A single underscore where two belong is the usual slip; other programs' variables with our prefix are left alone.
    slips = {name.replace("__", "_"): name for name in leaves}
    for variable in sorted(environment):
        if not variable.startswith(prefix) or variable in other_variables or not environment[variable]:
            continue
        if key := leaves.get(variable):
            _override(reading, key, variable, environment[variable])
        elif "__" in variable or variable.replace("__", "_") in slips:
            # Without the prefix, which would make every variable look like every other.
            bare = {name.removeprefix(prefix): name for name in leaves}
            guesses = [bare[guess] for guess in _nearest(variable.removeprefix(prefix), bare)]
            near = slips.get(variable.replace("__", "_")) or next(iter(guesses), None)
            hint = f"; did you mean {near}?" if near else f"; name a key as {prefix}SECTION__KEY"
            order = _Place.variable(variable).order
            reading.faults.append((order, f"variable {variable}: sets no key of the configuration{hint}"))


def variable_name(prefix: str, path: KeyPath) -> str:
    """The variable of the environment that overrides a key."""
    return prefix + "__".join(path).upper()


def _override(reading: _Reading, key: Key, variable: str, text: str) -> None:
    section = reading.values
    for name in key.path[:-1]:
        section = section.setdefault(name, {})
    reading.places[key.path] = _Place.variable(variable)
    _store(reading, key, _scalar(text, True, key), Path.cwd(), section)


def _validate(reading: _Reading, section_class: type[SectionT]) -> SectionT:
    """The section from the values read; faulty values are blamed and their defaults taken, to go on to the clashes.

    JSON, because pydantic's strict mode then takes exactly the kinds that the schema names: no `true` for 1, no "3".
    """
    try:
        return section_class.model_validate_json(json.dumps(reading.values), strict=True)
    except ValidationError as error:
        # A union reports each of its branches; one line for the key is enough.
        keys = {key.path: key for key in (_key_at(reading.root, detail["loc"]) for detail in error.errors())}
        for path, key in keys.items():
            value = _pop(reading.values, path)
            reading.blame(path, _refusal(key, found_words(value), value))
        return section_class.model_validate_json(json.dumps(reading.values), strict=True)


def _key_at(root: Key, location: Iterable[str | int]) -> Key:
    key = root
    for name in location:
        if not key.is_section:
            break
        key = key.keys[str(name)]
    return key


def _pop(values: dict[str, Any], path: KeyPath) -> Any:
    for name in path[:-1]:
        values = values[name]
    return values.pop(path[-1])


# Words ----------------------------------------------------------------------------------------------------------------


def found_words(value: Any) -> str:
    """A found value for a message: quoted where it is text, short, without a password from an address."""
    if isinstance(value, str):
        text = _CREDENTIALS.sub("***@", value)
        return repr(text if len(text) <= LONGEST_FOUND else text[:LONGEST_FOUND] + "...")
    return json.dumps(value)


def _node_words(node: yaml.Node) -> str:
    if isinstance(node, yaml.ScalarNode):
        return found_words(str(node.value))
    return "a list" if isinstance(node, yaml.SequenceNode) else "keys below it"


def _refusal(key: Key, found: str, value: Any = None) -> str:
    """The sentence about a value that the key does not allow, with a guess at what was meant."""
    text = f"found {found}; allowed: {key.allowed}"
    if isinstance(value, str) and key.kinds & {"integer", "number"} and _REAL.fullmatch(value):
        text += "; take the quotes away"
    elif isinstance(value, str) and (near := _nearest(value, key.choices)):
        text += f"; did you mean {near[0]!r}?"
    return text


def _unknown_key_words(root: Key, section: Key, name: str) -> str:
    near = _nearest(name, section.keys)
    elsewhere = [key.name for key in root.leaves() if key.path[-1] == name]
    names = ", ".join(section.keys)
    hint = f"did you mean '{near[0]}'? " if near else f"did you mean {elsewhere[0]}? " if elsewhere else ""
    return f"unknown key; {hint}allowed here: {names}"


def _nearest(word: str, choices: Iterable[str]) -> list[str]:
    return difflib.get_close_matches(word, list(choices), n=1, cutoff=0.6)
