"""At what level this process logs: `info`, or with parts that differ from it, as in `info,access:debug`.

A part is a logger: a module's name, or `access`, which at `debug` has the access log tell of connections when they
open, too.
"""

from __future__ import annotations

import logging
from typing import Final

LEVELS: Final = ("debug", "info", "warning", "error", "critical")
_PACKAGES: Final = ("access", "control", "uproxy", "waypoint")


def levels() -> str:
    """The levels that are in force."""
    own = (f"{name}:{_name(logger.level)}" for name, logger in sorted(_parts().items()) if logger.level)
    return ",".join([_name(logging.getLogger().level), *own])


def set_levels(text: str, *, of_others: bool = False) -> None:
    """Puts levels in force; parts that are not named follow the whole again. ValueError, and then nothing changes.

    `of_others`: another process said so, which may have parts that this one has not.
    """
    whole = None
    wanted: dict[str, str] = {}
    for word in text.lower().split(","):
        part, _, level = word.rpartition(":")
        if level not in LEVELS:
            raise ValueError(f"{level[:40]!r} is no level; there are {', '.join(LEVELS)}")
        if part:
            wanted[part] = level
        elif whole is None:
            whole = level
        else:
            raise ValueError("two levels for everything: name a part, as in info,access:debug")
    parts = _parts()
    unknown = [part for part in wanted if part not in parts]
    if unknown and not of_others:
        raise ValueError(f"{unknown[0][:100]!r} is no part of this process; there are {', '.join(sorted(parts))}")
    if whole is not None:
        logging.getLogger().setLevel(whole.upper())
    for part, logger in parts.items():
        logger.setLevel(wanted[part].upper() if part in wanted else logging.NOTSET)


def _parts() -> dict[str, logging.Logger]:
    return {
        name: logger
        for name, logger in logging.getLogger().manager.loggerDict.items()
        if isinstance(logger, logging.Logger)
        and name.partition(".")[0] in _PACKAGES
        and logger.level <= logging.CRITICAL  # what is silenced in the code stays silent
    }


def _name(level: int) -> str:
    name: str = logging.getLevelName(level)
    return name.lower()
