"""Totals of questionnaires from their items, where a table has no total."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from data_prep.cohorts.tables import number
from g3n.config import G3nError

GDS_REVERSED = ("GDSSATIS", "GDSGSPIR", "GDSHAPPY", "GDSALIVE", "GDSENRGY")
GDS_ITEMS = (
    *GDS_REVERSED, "GDSDROPD", "GDSEMPTY", "GDSBORED", "GDSAFRAD", "GDSHLPLS", "GDSHOME", "GDSMEMRY", "GDSWRTLS", "GDSHOPLS",
    "GDSBETER",
)  # fmt: skip
SCOPA_ITEMS = tuple(f"SCAU{i}" for i in range(1, 26))
_MOCA_RIGHT = (
    "TRAILS", "CUBE", "CLOCKCON", "CLOCKNO", "CLOCKHAN", "LION", "RHINO", "CAMEL", "DIGFOR", "DIGBACK", "REPEAT1", "REPEAT2",
    "ABSTRAN", "ABSMEAS", "DATE", "MONTH", "YEAR", "DAY", "PLACE", "CITY",
)  # fmt: skip
_MOCA_SERIAL = tuple(f"SERIAL{i}" for i in range(1, 6))
_MOCA_WORDS = tuple(f"DELW{i}" for i in range(1, 6))


def cognition(row: Mapping[str, str], missing: Sequence[str]) -> float | None:
    """MoCA: the total, in old exports of ADNI the sum of its items (without the point for 12 or fewer years of school).

    LETTERS counts errors, FFLUENCY words; five subtractions give up to 3 points; of the recalled words 1 is without a cue.
    """
    total = number(row.get("MOCA", ""), missing, "MOCA MOCA")
    names = (*_MOCA_RIGHT, *_MOCA_SERIAL, *_MOCA_WORDS, "LETTERS", "FFLUENCY")
    absent = [name for name in names if name not in row]
    if total is not None or (absent and "MOCA" in row):
        return total
    if absent:
        raise G3nError(f"table MOCA has neither the total MOCA nor the item {absent[0]}; is it the right table?")
    items = _numbers(row, names, missing)
    if items is None:
        return None
    for name in (*_MOCA_RIGHT, *_MOCA_SERIAL):
        _check("MOCA", name, items[name], (0, 1))
    serial = sum(items[name] for name in _MOCA_SERIAL)
    points = (serial >= 1) + (serial >= 2) + (serial >= 4) + (items["LETTERS"] <= 1) + (items["FFLUENCY"] >= 11)
    return sum(items[name] for name in _MOCA_RIGHT) + points + sum(items[name] == 1 for name in _MOCA_WORDS)


def depression(row: Mapping[str, str]) -> float | None:
    """GDS-15: five items count when answered no. None unless all fifteen are answered."""
    items = _numbers(row, GDS_ITEMS)
    if items is None:
        return None
    for name, value in items.items():
        _check("Geriatric_Depression_Scale", name, value, (0, 1))
    return sum(1 - value if name in GDS_REVERSED else value for name, value in items.items())


def autonomic(row: Mapping[str, str]) -> float | None:
    """SCOPA-AUT: SCAU1 to 25; 9 counts 3 in SCAU8-13 (catheter) and 0 in SCAU22-25 (not applicable); 23A and 26 do not count.

    Of SCAU22-23 (men) and SCAU24-25 (women) one pair may be blank. None where another item is.
    """
    men, women = (all(row[f"SCAU{i}"] for i in pair) for pair in ((22, 23), (24, 25)))
    items = _numbers(row, SCOPA_ITEMS[:21])
    if items is None or not (men or women):
        return None
    total = 0.0
    for i in range(1, 26):
        value = items[f"SCAU{i}"] if i <= 21 else number(row[f"SCAU{i}"], (), f"SCOPA-AUT SCAU{i}") or 0.0
        _check("SCOPA-AUT", f"SCAU{i}", value, (0, 1, 2, 3, 9) if 8 <= i <= 13 or i >= 22 else (0, 1, 2, 3))
        total += value if value != 9 else 3.0 if i <= 13 else 0.0
    return total


def autonomic_as_published(row: Mapping[str, str]) -> float | None:
    """The sum of every SCAU column that holds numbers, which the published harmonization took; of at least ten answers."""
    answers = [number(value) for name, value in row.items() if re.fullmatch(r"SCAU\d+[A-D]?", name)]
    given = [value for value in answers if value is not None]
    return sum(given) if len(given) >= 10 else None


def _numbers(row: Mapping[str, str], names: Sequence[str], missing: Sequence[str] = ()) -> dict[str, float] | None:
    """Items by name; None where one is missing."""
    found = {name: number(row[name], missing, name) for name in names}
    given = {name: value for name, value in found.items() if value is not None}
    return given if len(given) == len(found) else None


def _check(table: str, name: str, value: float, known: Sequence[float]) -> None:
    if value not in known:
        raise G3nError(f"{table} {name} has the code '{value:g}'; known: {', '.join(map(str, known))}. Look it up")
