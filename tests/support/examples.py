"""How many examples hypothesis tries, so that `make properties` deepens every property test alike."""

from __future__ import annotations

from typing import Final

from hypothesis import settings

FAST: Final = 100
"""Of a test that asks for nothing else, in every run."""
DEEP: Final = 20_000
"""Likewise, in `make properties`."""


def examples(number: int) -> int:
    """So many in every run, and as many times more as the profile tries more than the usual one."""
    return number * settings().max_examples // FAST
