"""Durations as Gateway API writes them (GEP-2257): `500ms`, `10s`, `1m30s`."""

from __future__ import annotations

import re
from typing import Final

from control.api.problems import shown

MAX_MS: Final = 86_400_000

_DURATION: Final = re.compile(r"([0-9]{1,5}(h|ms|m|s)){1,4}")
_PART: Final = re.compile(r"([0-9]+)(h|ms|m|s)")
_UNIT_MS: Final = {"h": 3_600_000, "m": 60_000, "s": 1000, "ms": 1}


def milliseconds(text: str) -> int:
    """Raises ValueError."""
    if not _DURATION.fullmatch(text):
        raise ValueError(f"{shown(text)} is no duration, such as 500ms, 10s or 1m30s")
    found = sum(int(number) * _UNIT_MS[unit] for number, unit in _PART.findall(text))
    if found > MAX_MS:
        raise ValueError(f"{shown(text)} is longer than a day, which is the most")
    return found
