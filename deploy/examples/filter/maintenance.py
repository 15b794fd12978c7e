"""Keeps a part of a service closed for maintenance, but for testers, and marks what testers get."""

from __future__ import annotations

from collections.abc import Mapping

from waypoint.extending import Answer, Request, Response


class Maintenance:
    """Settings: `prefix`, of the paths that are closed; `testers`, SPIFFE IDs with commas between."""

    def __init__(self, settings: Mapping[str, str]) -> None:
        self._prefix = settings.get("prefix", "/")
        self._testers = frozenset(settings.get("testers", "").split(","))

    def on_request(self, request: Request) -> Answer | None:
        """Testers go on."""
        if request.caller in self._testers:
            request.headers.append(("x-tester", "yes"))
        elif request.target.startswith(self._prefix):
            return Answer(503, [("content-type", "text/plain"), ("retry-after", "600")], b"closed for maintenance\n")
        return None

    def on_response(self, request: Request, response: Response) -> None:
        """Nobody keeps what a tester has seen."""
        if request.caller in self._testers:
            response.headers = [(name, value) for name, value in response.headers if name != "cache-control"]
            response.headers.append(("cache-control", "no-store"))
