"""Hosts for the agent's tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from bpf.loader import Loader
from tests.support import capture


@pytest.fixture(scope="session", autouse=True)
def swept() -> None:
    capture.sweep()


@pytest.fixture
def site() -> Iterator[capture.Site]:
    with capture.site() as made:
        yield made


@pytest.fixture
def pins():
    with capture.pins() as directory:
        yield directory


@pytest.fixture
def loader(pins) -> Iterator[Loader]:
    with Loader(pins / "maps") as loaded:
        capture.fill(loaded.maps)
        yield loaded
