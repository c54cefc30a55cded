"""What may stand in the files of data_prep's outputs: every key and the form of its value. Anything else is a finding."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from data_prep.manifest import COLUMNS, MODALITIES, SPLITS
from data_prep.quality import FLAGS
from data_prep.schema import LICENSES, PHENOTYPES, SPACES, VALUES, Number, is_plain

HASH = re.compile(r"[0-9a-f]{16}")
SAMPLE_KEY = re.compile(rf"sub-[0-9a-f]{{16}}(_ses-\d{{2,4}}(_run-\d{{1,3}})?)?_({'|'.join(MODALITIES)})")
DERIVATIVE = re.compile(
    rf"sub-([0-9a-f]{{16}})/ses-(\d{{2,4}})/anat/sub-\1_ses-\2(_run-\d{{1,3}})?_({'|'.join(MODALITIES)})\.(nii\.gz|json)"
)
SHARD = re.compile(rf"({'|'.join(SPLITS)})-\d{{5}}\.tar")
_VERSION = re.compile(r"[0-9A-Za-z][0-9A-Za-z.+_-]{0,40}")
_NAME = re.compile(r"[a-z][a-z0-9_]{0,40}")
_ALIGN = re.compile(r"header|center|affine|registered")
_STRIP = re.compile(r"none|deepbet|robex|command|as it came")
_BIAS = re.compile(r"none|n4")
_FLAG = re.compile("|".join(FLAGS))
_MODALITY = re.compile("|".join(MODALITIES))
_SPLIT = re.compile("|".join(SPLITS))
_PATH_LIKE = re.compile(r"(?<![\w.])(/|[A-Za-z]:\\)[^\s]+")


@dataclass(frozen=True)
class Of:
    """A mapping with any keys of one form, or (without ``keys``) a list, of one schema."""

    schema: Any
    keys: re.Pattern[str] | None = None


NUMBER, LEVEL, TEXT = "a number", "a level", "a reason"
_GRID = {"shape": Of(NUMBER), "affine": Of(Of(NUMBER))}
_QUALITY = {
    **dict.fromkeys(("brain_ml", "stripped", "dice_atlas", "dice_header", "correlation_atlas", "background_share", "atlas_covered"), NUMBER),
    **dict.fromkeys(("p1", "p50", "p99", "p99_9"), NUMBER),
    "extent_mm": Of(NUMBER),
    "spacing_mm": Of(NUMBER),
}  # fmt: skip
_ATLAS = {"name": _NAME, "checksum": HASH}
RECIPE = {
    "preprocess": NUMBER, "align": _ALIGN, "strip": _STRIP, "strip_command": HASH, "bias": _BIAS, "atlas": _ATLAS,
    "grid": _GRID, "fingerprint": HASH, "versions": Of(_VERSION, _NAME),
}  # fmt: skip
SIDECAR = {
    "recipe": HASH, "source": HASH, "versions": Of(_VERSION, _NAME), "modality": _MODALITY, "align": _ALIGN,
    "strip": _STRIP, "bias": _BIAS, "center": NUMBER, "scan_to_atlas": Of(Of(NUMBER)), "quality": _QUALITY,
    "flags": Of(_FLAG), "bytes": NUMBER,
}  # fmt: skip
MANIFEST_ABOUT = {"root": re.compile(r"\."), "recipe": HASH}
_VARIABLES = {
    **dict.fromkeys(("modality", "sex", "diagnosis", "cohort"), LEVEL),
    **dict.fromkeys(("age_years", "field_strength_t"), NUMBER),
}
_PHENOTYPES = {name: NUMBER if isinstance(VALUES[name], Number) else LEVEL for name in PHENOTYPES}
_VISIT = {"days_from_baseline": NUMBER, "variables": _VARIABLES}
SAMPLE = {
    "shape": Of(NUMBER), "scale": NUMBER, "max_error": NUMBER, "cropped": NUMBER, "brain_mean": NUMBER,
    "brain_std": NUMBER, "affine": Of(Of(NUMBER)), **_VISIT, "phenotypes": _PHENOTYPES, "group": HASH, "xxh3": HASH,
    "visits": Of(_VISIT),
}  # fmt: skip
_ENTRY = {
    "key": SAMPLE_KEY, "members": Of(Of(NUMBER), re.compile(r"npy\.zst|json")), "subject": HASH, "modality": _MODALITY,
    "visits": NUMBER, "xxh3": HASH, "variables": Of(_VARIABLES),
}  # fmt: skip
INDEX = {
    "format": re.compile(r"g3n-shards-\d+"), "fingerprint": HASH, "plan": HASH, "kind": re.compile("volume|latent"),
    "recipe": {
        "pack": NUMBER, "level": NUMBER, "preprocess": HASH, "latents": re.compile("z P, float16"),
        "statistics": _SPLIT, "device": re.compile("cpu|cuda"),
    },
    "grid": _GRID, "variables": Of(Of(LEVEL), _NAME), "licenses": Of(NUMBER, re.compile("|".join(LICENSES))),
    "statistics": Of({"scans": NUMBER, "mean": NUMBER, "std": NUMBER}, _MODALITY), "tokenizer": {"fingerprint": HASH},
    "volumes": HASH,
    "splits": Of(Of({"name": SHARD, "bytes": NUMBER, "xxh3": HASH, "samples": Of(_ENTRY)}), _SPLIT),
}  # fmt: skip
_FAILURE = {
    "subject": HASH, "session": re.compile(r"\d{2,4}"), "modality": _MODALITY, "run": re.compile(r"\d{1,3}"),
    "reason": TEXT,
}  # fmt: skip
PAGE = {
    "rows": Of({
        "name": SAMPLE_KEY, "subject": HASH, "session": re.compile(r"\d{2,4}"), "cohort": LEVEL, "modality": _MODALITY,
        "split": _SPLIT, "route": _ALIGN, "strip": _STRIP, "flags": Of(_FLAG), "q": Of(NUMBER), "z": NUMBER,
    }),
    "numbers": Of(re.compile(r"[\w ,().]{1,60}"), _NAME), "flags": Of(re.compile(r"[\w ,:().]{1,100}"), _FLAG),
    "failures": Of(_FAILURE),
    "recipe": {key: RECIPE[key] for key in ("atlas", "align", "strip", "bias", "versions")} | {"shape": Of(NUMBER)},
}  # fmt: skip
TABLES: Mapping[str, Mapping[str, Any]] = {
    "failures.tsv": _FAILURE,
    "manifest.tsv": {
        **dict.fromkeys(COLUMNS, NUMBER), "subject": HASH, "session": re.compile(r"\d{2,4}"), "modality": _MODALITY,
        "path": DERIVATIVE, "sex": LEVEL, "diagnosis": LEVEL, "cohort": LEVEL, "split": _SPLIT, "group": HASH,
        "license": re.compile("|".join(LICENSES)), "space": re.compile("|".join(SPACES)), "mask": re.compile("(?!)"),
        "axes": re.compile("(?!)"), "spacing_mm": re.compile("(?!)"), "flag": re.compile(rf"({_FLAG.pattern})(,({_FLAG.pattern}))*"),
        **_PHENOTYPES,
    },
}  # fmt: skip
"""Cells of the tables; n/a is always allowed."""


def findings(tree: Any, schema: Any, where: str) -> Iterator[str]:
    """A line for each key or value of ``tree`` that ``schema`` does not allow; null is allowed everywhere."""
    if tree is None:
        return
    if isinstance(schema, Of):
        if isinstance(tree, list) and schema.keys is None:
            for i, item in enumerate(tree):
                yield from findings(item, schema.schema, f"{where}[{i}]")
        elif isinstance(tree, dict) and schema.keys is not None:
            for key, item in tree.items():
                if not schema.keys.fullmatch(key):
                    yield f"{where} has the key '{key[:60]}', which is not allowed"
                yield from findings(item, schema.schema, f"{where}.{key[:40]}")
        else:
            yield f"{where} is a {type(tree).__name__}, which is not allowed"
    elif isinstance(schema, dict):
        if not isinstance(tree, dict):
            yield f"{where} is a {type(tree).__name__}; expected an object"
            return
        for key, item in tree.items():
            if key not in schema:
                yield f"{where} has the key '{key[:60]}', which is not allowed"
            else:
                yield from findings(item, schema[key], f"{where}.{key}" if where else key)
    elif not _allowed(tree, schema):
        yield f"{where} is {str(tree)[:60]!r}; expected {schema.pattern if isinstance(schema, re.Pattern) else schema}"


def _allowed(value: Any, schema: Any) -> bool:
    if schema == NUMBER:
        return isinstance(value, int | float)
    if schema == LEVEL:
        return isinstance(value, int | float) or (isinstance(value, str) and (not value or is_plain(value)))
    if schema == TEXT:
        return isinstance(value, str) and len(value) <= 300 and not _PATH_LIKE.search(value)
    return isinstance(value, str) and schema.fullmatch(value) is not None


def table_findings(name: str, rows: list[dict[str, str]]) -> Iterator[str]:
    """As ``findings``, for the cells of manifest.tsv or failures.tsv."""
    schema = TABLES[name]
    for line, row in enumerate(rows, 2):
        for column, cell in row.items():
            where = f"line {line} {column[:60]}"
            if column not in schema:
                yield f"{where} is not an allowed column"
            elif cell != "n/a":
                yield from findings(_number(cell) if schema[column] == NUMBER else cell, schema[column], where)


def _number(cell: str) -> float | str:
    try:
        return float(cell)
    except ValueError:
        return cell
