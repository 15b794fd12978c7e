"""Where something runs: region, zone and subzone."""

from __future__ import annotations

import re
from typing import Final

_PART: Final = r"[A-Za-z0-9](?:[A-Za-z0-9._-]{0,61}[A-Za-z0-9])?"
_REGION: Final = re.compile(_PART)
_LOCALITY: Final = re.compile(rf"{_PART}(?:/{_PART}){{0,2}}")

BEYOND: Final = 3


def wrong_locality(text: str) -> str:
    """What is wrong with a locality as Istio writes it, `region/zone/subzone`, of which the end may be missing."""
    if _LOCALITY.fullmatch(text):
        return ""
    return "must be a region, region/zone or region/zone/subzone, each as a label's value, such as eu/eu-1/rack-7"


def wrong_region(text: str) -> str:
    """What is wrong with a region."""
    return "" if _REGION.fullmatch(text) else "must be a region alone, as a label's value, such as eu"


def distance(own: str, other: str) -> int:
    """How far apart: 0 in the same subzone, 1 in the same zone, 2 in the same region, BEYOND outside of it.

    What both leave out is the same, as in Istio.
    """
    ours, theirs = (text.split("/") + [""] * (2 - text.count("/")) for text in (own, other))
    for common, (here, there) in enumerate(zip(ours, theirs, strict=True)):
        if here != there:
            return BEYOND - common
    return 0


def zone_distance(own: str, other: str) -> int:
    """Likewise, but all of a zone is equally near; without a locality of one's own, everything is."""
    return max(1, distance(own, other)) if own else 1
