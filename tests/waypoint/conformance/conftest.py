"""One waypoint for the cases of a module."""

from collections.abc import Iterator

import pytest

from tests.support.conformance import Suite, running_suite


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Suite]:
    with running_suite(tmp_path_factory.mktemp("conformance")) as found:
        yield found


@pytest.fixture
def suite(running: Suite) -> Suite:
    """Without what an earlier case has applied."""
    running.apply()
    for echo in running.echoes.values():
        echo.seen.clear()
    return running
