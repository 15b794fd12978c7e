"""What was made of a head is remembered, should the same come again: most heads come more than once.

What is remembered follows from the bytes alone, so that it holds for whoever sends them. A head that does not come
again costs a look-up more.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any, Final, ParamSpec, TypeVar, cast

MAX_REMEMBERED: Final = 256
"""Heads, for each function."""
MAX_KNOWN: Final = 1024
"""Bytes of a head that is remembered: in longer ones there is something of their own, mostly."""


class Known(list[tuple[bytes, bytes]]):
    """Fields of a head that is remembered: the same object each time, by which it is found again. Nobody changes it."""

    __slots__ = ()
    __hash__ = object.__hash__  # type: ignore[assignment]  # a list's says that there is none


P = ParamSpec("P")
T = TypeVar("T")


def remembered(function: Callable[P, T]) -> Callable[P, T]:
    """Of a function without effects whose first argument is a head: its bytes, the headers of a block that is
    remembered, which are a tuple, or `Known` fields. Nobody changes what it returns."""
    known = cast("Callable[P, T]", lru_cache(maxsize=MAX_REMEMBERED)(function))

    def recall(*args: P.args, **kwargs: P.kwargs) -> T:
        head: Any = args[0]
        kind = type(head)
        if kind is Known or kind is tuple or (kind is bytes and len(head) <= MAX_KNOWN):
            return known(*args, **kwargs)
        return function(*args, **kwargs)

    return recall
