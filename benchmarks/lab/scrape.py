"""What a program of the lab says on its metrics port."""

from __future__ import annotations

import http.client
from contextlib import AbstractContextManager, closing

from benchmarks.lab.sources import LabError

_ASK_S = 10.0


def scrape(entered: AbstractContextManager[None], port: int, address: str = "127.0.0.1") -> dict[str, float]:
    """Each sample by its name with its labels, asked from within a network namespace. Raises LabError."""
    try:
        with entered:
            connection = http.client.HTTPConnection(address, port, timeout=_ASK_S)
            connection.connect()
        with closing(connection):
            connection.request("GET", "/metrics")
            text = connection.getresponse().read().decode()
    except (OSError, http.client.HTTPException) as error:
        raise LabError(f"nobody tells metrics at {address}:{port}: {error}") from error
    samples = (line.rpartition(" ") for line in text.splitlines() if line and not line.startswith("#"))
    return {name: float(value) for name, _, value in samples}
