"""Which code a class of cells has in an export: read from a YAML that a laboratory checks and replaces."""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from agent.config import read_text
from agent.errors import ConfigError

Line = Annotated[str, Field(min_length=1, max_length=200, pattern=r"^\S(.*\S)?$")]


class Code(BaseModel):
    """One code. system: the address that names the vocabulary."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    code: Line
    display: Line
    system: Line = "http://loinc.org"


class ReportCode(BaseModel):
    """What the report is called; its code is the laboratory's, if it has one."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    text: Line = "Leukocyte differential by image analysis"
    code: Line | None = None
    display: Line | None = None
    system: Line = "http://loinc.org"


class Codes(BaseModel):
    """All of them, by class. signed_off_by: who has checked them; null = an example that nobody has."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    signed_off_by: Line | None = None
    report: ReportCode = ReportCode()
    shares: dict[str, Code] = {}
    per_100_leukocytes: dict[str, Code] = {}


def load_codes(path: Path | None) -> Codes:
    """From a file; None = the example that comes with the package. Raises ConfigError with all faults."""
    if path is None:
        text, source = (resources.files("agent.central") / "loinc.yaml").read_text("utf-8"), "loinc.yaml"
    else:
        text, source = read_text(path), str(path)
    try:
        spoken: Any = yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError) as error:
        raise ConfigError(source, (f"this is not YAML: {' '.join(str(error).split())[:300]}",)) from error
    try:
        return Codes.model_validate({} if spoken is None else spoken)
    except ValidationError as error:
        faults = tuple(f"{'.'.join(map(str, fault['loc'])) or 'all'}: {fault['msg']}" for fault in error.errors())
        raise ConfigError(source, faults) from error
