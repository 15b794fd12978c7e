"""What is left of labs that nobody has any more, while other tests have theirs."""

from __future__ import annotations

from benchmarks.lab import remains
from benchmarks.lab.remains import LabNames


def left() -> set[str]:
    """As `remains.left_of`. A lab that is made or removed this instant may be in it: ask again."""
    labs = [LabNames(directory.name) for directory in remains.LABS_DIR.glob("*")]
    living = [one for one in labs if (owner := one.owner()) is None or owner.lives()]
    return set(remains.left_of()).difference(*(remains.left_of(one.prefix) for one in living))
