"""JSON schema of the manifest of a distilled set: every key that a command reads. Further keys are allowed."""

from __future__ import annotations

from typing import Any

from condense.hdf5 import CLASSES_SCHEMA, IMAGE_SHAPE_SCHEMA, NAME_SCHEMA, SHA256_SCHEMA

_LARGEST = 1e15
"""Limit for numbers whose meaning gives none."""


def _or_null(schema: dict[str, Any]) -> dict[str, Any]:
    return {**schema, "type": [schema["type"], "null"]}


_TEXT = {"type": "string"}
_NAMES = {"type": "array", "items": NAME_SCHEMA}
_COUNT = {"type": "integer", "minimum": 0, "maximum": 10**9}
_AMOUNT = {"type": "number", "minimum": 0, "maximum": _LARGEST}
_AMOUNTS = {"type": "array", "items": _AMOUNT}

_STAGE = {
    "type": "object",
    "required": ["stage"],
    "properties": {"stage": NAME_SCHEMA},
    "allOf": [
        {
            "if": {"properties": {"stage": {"const": "formation"}}},
            "then": {
                "required": ["factor"],
                "properties": {
                    "factor": {"type": "integer", "minimum": 1, "maximum": 65536},
                    "pad": {"type": "number", "minimum": -1e6, "maximum": 1e6},
                },
            },
        },
        {
            "if": {"properties": {"stage": {"const": "compensated"}}},
            "then": {
                "required": ["classes", "indices", "teachers"],
                "properties": {
                    key: {"type": "integer", "minimum": 1, "maximum": 10**9}
                    for key in ("classes", "indices", "teachers")
                },
            },
        },
    ],
}

_DATA = {
    "type": "object",
    "properties": {
        "fingerprint": _or_null(NAME_SCHEMA),
        "options": {
            "type": "object",
            "properties": {
                "resize": _or_null({"type": "integer", "minimum": 1, "maximum": 65536}),
                "grey": {"type": ["boolean", "null"]},
                "mirror": {"type": ["boolean", "null"]},
                "zca": {"type": "boolean"},
            },
            "additionalProperties": {"type": ["string", "number", "boolean", "null"]},
        },
    },
}

_LABEL_SOURCE = {
    "type": "object",
    "properties": {
        "experts": {
            "type": "object",
            "properties": {
                "count": {"type": "integer", "minimum": 1, "maximum": 10**9},
                "epochs": _COUNT,
                "content": _TEXT,
                "path": {"type": ["string", "null"]},
            },
            "dependentRequired": {"content": ["count", "epochs"]},
        },
        "teachers": _or_null(
            {
                "type": "object",
                "properties": {
                    "path": {"type": ["string", "null"]},
                    "content": _TEXT,
                    "networks": _NAMES,
                    "sha256": {"type": "array", "items": SHA256_SCHEMA},
                    "bytes": _AMOUNT,
                },
            }
        ),
        "weights": _or_null(_AMOUNTS),
        "epoch": {"type": "integer", "minimum": -1, "maximum": 10**9},
    },
}

_COST = {
    "type": "object",
    "properties": {
        "seconds": _or_null(_AMOUNT),
        "preparation_seconds": _or_null(_AMOUNT),
        "device": {"type": ["string", "null"]},
        "peak_memory": {"type": ["object", "null"], "additionalProperties": _AMOUNT},
    },
}

_CLAIM = {
    "type": "object",
    "properties": {
        "mean": {"type": "number", "minimum": 0, "maximum": 1},
        "std": _or_null(_AMOUNT),
        "network": NAME_SCHEMA,
        "protocol": NAME_SCHEMA,
        "runs": _COUNT,
    },
}

SET_SCHEMA: dict[str, Any] = {
    "type": "object",
    "required": [
        "name",
        "dataset",
        "method",
        "network",
        "classes",
        "ipc",
        "space",
        "decode",
        "label_kind",
        "transform",
        "checksums",
    ],
    "properties": {
        "name": NAME_SCHEMA,
        "dataset": NAME_SCHEMA,
        "method": NAME_SCHEMA,
        "network": NAME_SCHEMA,
        "classes": CLASSES_SCHEMA,
        "ipc": _COUNT,
        "space": {"enum": ["pixel", "training"]},
        "decode": {"type": "array", "items": _STAGE},
        "distill_decode": {"type": "array", "items": _STAGE},
        "label_kind": NAME_SCHEMA,
        "transform": NAME_SCHEMA,
        "checksums": {"type": "object", "additionalProperties": SHA256_SCHEMA},
        "image_shape": IMAGE_SHAPE_SCHEMA,
        "seed": {"type": ["integer", "null"]},
        "mirror": {"type": "boolean"},
        "protocol": _or_null(NAME_SCHEMA),
        "learned_lr": _or_null({"type": "number", "exclusiveMinimum": 0, "maximum": _LARGEST}),
        "paper": {"type": ["string", "null"]},
        "command": {"type": ["string", "null"]},
        "settings": {"type": "object"},
        "steps_done": _COUNT,
        "stopped_early": {"type": "boolean"},
        "preparation": {"type": "object"},
        "data": _DATA,
        "cost": _COST,
        "bytes": {"type": "object", "additionalProperties": _AMOUNT},
        "label_source": _LABEL_SOURCE,
        "lightened": {
            "type": "object",
            "properties": {"bytes": {"type": "object", "additionalProperties": _AMOUNT}},
        },
        "claim": _CLAIM,
        "resampling": {
            "type": "object",
            "required": ["share", "counts"],
            "properties": {
                "share": {"type": "number", "exclusiveMinimum": 0, "maximum": 1},
                "counts": {"type": "array", "items": _COUNT},
            },
            "additionalProperties": False,
        },
        "imported": {"type": "object"},
    },
}
