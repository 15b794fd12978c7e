"""The captured workload that the kernel tests share: making one takes longer than most tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support import capture, neighbours
from tests.support.capture import Rig
from tests.support.neighbours import Host


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


@pytest.fixture(scope="session")
def shared_host() -> Iterator[Host]:
    capture.sweep()
    with neighbours.host() as made:
        yield made


@pytest.fixture
def host(shared_host: Host) -> Host:
    """With nothing granted."""
    shared_host.reset()
    return shared_host


@pytest.fixture
def counted(request):
    """How much each counter has risen since the test began; of the host, if the test has one.

    `dropped_syn` only if a test asks for it: a late packet of a connection that is over counts there too.
    """
    maps = request.getfixturevalue("host" if "host" in request.fixturenames else "rig").maps
    before = maps.counters.read()

    def risen(*, drops: bool = False) -> dict[str, int]:
        after = maps.counters.read()
        differences = {name: after[name] - before[name] for name in after if drops or name != "dropped_syn"}
        return {name: difference for name, difference in differences.items() if difference}

    return risen
