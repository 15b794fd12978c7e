"""The captured workload that the kernel tests share: making one takes longer than most tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support import capture
from tests.support.capture import Rig


@pytest.fixture(scope="session")
def shared_rig() -> Iterator[Rig]:
    capture.sweep()
    with capture.rig() as made:
        yield made


@pytest.fixture
def rig(shared_rig: Rig) -> Rig:
    """With the maps as `capture.fill` makes them."""
    capture.fill(shared_rig.maps)
    return shared_rig


@pytest.fixture
def counted(rig: Rig):
    """How much each counter has risen since the test began."""
    before = rig.maps.counters.read()

    def risen() -> dict[str, int]:
        after = rig.maps.counters.read()
        return {name: after[name] - before[name] for name in after if after[name] != before[name]}

    return risen
