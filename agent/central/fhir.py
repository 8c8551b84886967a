"""A differential as FHIR R4 (4.0.1): a Bundle with a DiagnosticReport, its Observations and the Device.

Checked by the classes of `fhirclient`, which are generated from the FHIR 4.0.1 definitions. No patient stands in it:
the specimen carries the laboratory's accession token, by which a LIS finds the patient. Everything says that it is for
research use only. Identifiers are made from site, device, sample and report, so the same export gives the same Bundle.
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from datetime import datetime
from typing import Any

from fhirclient.models.bundle import Bundle
from fhirclient.models.fhirabstractbase import FHIRValidationError

from agent import RESEARCH_USE_ONLY
from agent.central.codes import Code, Codes
from agent.errors import MessageRejected

Resource = dict[str, Any]

NAMESPACE = uuid.UUID("6b0a3e52-7d3c-5a0e-9a0e-5d0f3c2b1a48")
"""Ours, fixed for ever: names of resources are made from it."""

UCUM = "http://unitsofmeasure.org"
INTERPRETATION = "http://terminology.hl7.org/CodeSystem/v3-ObservationInterpretation"
TAG = {"system": "urn:hematovision:use", "code": "research-use-only", "display": "Research use only"}
CATEGORY = {"system": "http://terminology.hl7.org/CodeSystem/v2-0074", "code": "HM", "display": "Hematology"}
LABORATORY = {
    "system": "http://terminology.hl7.org/CodeSystem/observation-category",
    "code": "laboratory",
    "display": "Laboratory",
}
NOT_SIGNED_OFF = "The codes are an example; no laboratory has signed them off."

STATUS = {"preliminary": "preliminary", "final": "final", "amended": "amended"}

FLAGS = {"low": ("L", "Low"), "high": ("H", "High"), "within": ("N", "Normal")}
"""`perhaps-low` and `perhaps-high` are no interpretation: the share lies outside, its interval does not."""


def differential_bundle(body: Mapping[str, Any], received_at: datetime, codes: Codes) -> Resource:
    """The Bundle of one `differential` message.

    Raises MessageRejected for a message that FHIR cannot say, with what its library found.
    """
    name = f"{body['site']}/{body['device']}/{body['sample']}/{body.get('report') or 'preliminary'}"
    status = STATUS.get(str(body["status"]), "unknown")
    device, specimen = _device(body), _specimen(body)
    observations = [_observation(name, body, one, status, codes) for one in _measured(body, codes)]
    report = _report(name, body, status, received_at, codes, observations)
    resources = (report, *observations, device, specimen)
    bundle = {
        "resourceType": "Bundle",
        "id": _id(name, "bundle"),
        "meta": {"tag": [TAG]},
        "type": "collection",
        "timestamp": body["at"],
        "entry": [{"fullUrl": f"urn:uuid:{one['id']}", "resource": one} for one in resources],
    }
    try:
        checked: Resource = Bundle(bundle).as_json()
    except FHIRValidationError as error:
        raise MessageRejected(f"differential of {name}", f"FHIR cannot say it: {error}") from error
    return checked


def _report(
    name: str, body: Mapping[str, Any], status: str, received_at: datetime, codes: Codes, observations: list[Resource]
) -> Resource:
    words = [RESEARCH_USE_ONLY]
    if codes.signed_off_by is None:
        words.append(NOT_SIGNED_OFF)
    words.append(f"{body.get('leukocytes', 0)} leukocytes in {body.get('fields', 0)} fields.")
    if body.get("unidentified"):
        words.append(f"{body['unidentified']} cells were looked at and could not be named.")
    return {
        "resourceType": "DiagnosticReport",
        "id": _id(name, "report"),
        "meta": {"tag": [TAG]},
        "identifier": [{"system": "urn:hematovision:report", "value": name}],
        "status": status,
        "category": [{"coding": [CATEGORY]}],
        "code": _report_code(codes),
        "effectiveDateTime": body["at"],
        "issued": received_at.isoformat(timespec="milliseconds"),
        "specimen": [_reference(_specimen(body))],
        "result": [_reference(one) for one in observations],
        "conclusion": " ".join(words),
    }


def _measured(body: Mapping[str, Any], codes: Codes) -> list[tuple[Resource, Code | None, str]]:
    """What is observed: the entry of the message, its code if it has one, its unit."""
    shares = [(one, codes.shares.get(one["class"]), "%") for one in body.get("shares", ())]
    ratios = [
        (one, codes.per_100_leukocytes.get(one["name"]), "/100{WBCs}") for one in body.get("per_100_leukocytes", ())
    ]
    return shares + ratios


def _observation(
    name: str, body: Mapping[str, Any], measured: tuple[Resource, Code | None, str], status: str, codes: Codes
) -> Resource:
    entry, code, unit = measured
    what = str(entry.get("class") or entry["name"])
    value, low, high = (
        (entry.get("pct"), entry.get("low_pct"), entry.get("high_pct"))
        if "pct" in entry
        else (entry.get("ratio"), entry.get("low"), entry.get("high"))
    )
    bounds = (("95 % interval, lower bound", low), ("95 % interval, upper bound", high))
    observation: Resource = {
        "resourceType": "Observation",
        "id": _id(name, what, unit),
        "meta": {"tag": [TAG]},
        "status": status,
        "category": [{"coding": [LABORATORY]}],
        "code": {"text": what} if code is None else {**_coded(code), "text": what},
        "effectiveDateTime": body["at"],
        "device": _reference(_device(body)),
        "specimen": _reference(_specimen(body)),
        "note": [{"text": RESEARCH_USE_ONLY if codes.signed_off_by else f"{RESEARCH_USE_ONLY} {NOT_SIGNED_OFF}"}],
        "component": [
            {
                "code": {"text": "Cells counted"},
                "valueQuantity": {"value": entry["count"], "unit": "cells", "system": UCUM, "code": "{cells}"},
            },
            *(
                {"code": {"text": words}, "valueQuantity": _quantity(bound, unit)}
                for words, bound in bounds
                if bound is not None
            ),
        ],
    }
    if value is None:
        observation["dataAbsentReason"] = {
            "coding": [{"system": "http://terminology.hl7.org/CodeSystem/data-absent-reason", "code": "not-performed"}]
        }
    else:
        observation["valueQuantity"] = _quantity(value, unit)
    if flag := FLAGS.get(str(entry.get("flag"))):
        coding = {"system": INTERPRETATION, "code": flag[0], "display": flag[1]}
        observation["interpretation"] = [{"coding": [coding]}]
    if reference := entry.get("reference"):
        observation["referenceRange"] = [
            {
                "low": _quantity(reference["low_pct"], "%"),
                "high": _quantity(reference["high_pct"], "%"),
                "text": reference["source"],
            }
        ]
    return observation


def _device(body: Mapping[str, Any]) -> Resource:
    place = f"{body['site']}/{body['device']}"
    provenance = body.get("provenance") or {}
    versions = [
        {"type": {"text": words}, "value": value}
        for words, value in (
            ("agent", provenance.get("agent")),
            *((role, _model(provenance.get(role))) for role in ("detector", "classifier")),
        )
        if value
    ]
    device: Resource = {
        "resourceType": "Device",
        "id": _id(place, "device"),
        "identifier": [{"system": "urn:hematovision:device", "value": place}],
        "deviceName": [{"name": f"HematoVision agent {place}", "type": "user-friendly-name"}],
        "note": [{"text": RESEARCH_USE_ONLY}],
    }
    if versions:
        device["version"] = versions
    return device


def _specimen(body: Mapping[str, Any]) -> Resource:
    place = f"{body['site']}/{body['device']}/{body['sample']}"
    specimen: Resource = {
        "resourceType": "Specimen",
        "id": _id(place, "specimen"),
        "identifier": [{"system": "urn:hematovision:sample", "value": place}],
        "type": {"text": "Blood smear"},
    }
    if body.get("accession"):
        specimen["accessionIdentifier"] = {"system": "urn:hematovision:accession", "value": body["accession"]}
    return specimen


def _report_code(codes: Codes) -> Resource:
    report = codes.report
    if report.code is None:
        return {"text": report.text}
    coding = {"system": report.system, "code": report.code, "display": report.display or report.text}
    return {"coding": [coding], "text": report.text}


def _coded(code: Code) -> Resource:
    return {"coding": [{"system": code.system, "code": code.code, "display": code.display}]}


def _quantity(value: float, unit: str) -> Resource:
    return {"value": value, "unit": unit, "system": UCUM, "code": unit}


def _model(model: Mapping[str, Any] | None) -> str:
    return "" if not model else f"{model.get('name', '')} {model.get('version', '')}".strip()


def _reference(resource: Resource) -> Resource:
    return {"reference": f"urn:uuid:{resource['id']}", "type": resource["resourceType"]}


def _id(*parts: str) -> str:
    return str(uuid.uuid5(NAMESPACE, "\n".join(parts)))
