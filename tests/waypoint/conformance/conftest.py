"""One waypoint for the cases of a module, of each engine."""

from collections.abc import Iterator

import pytest

from tests.support.conformance import ENGINES, Suite, running_suite


@pytest.fixture(scope="module", params=ENGINES)
def running(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Suite]:
    with running_suite(tmp_path_factory.mktemp("conformance"), request.param) as found:
        yield found


@pytest.fixture
def suite(running: Suite) -> Suite:
    """Without what an earlier case has applied."""
    running.apply()
    for echo in running.echoes.values():
        echo.seen.clear()
    running.judged.clear()
    return running
