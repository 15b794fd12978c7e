"""What a filter of requests is given and gives back: the interface for those who write one.

A filter is an entry point of group `uproxy.waypoint.filters`: a class, or a function, that is called with the settings
of its Extension and returns an object with one or both of these methods:

    def on_request(self, request: Request) -> Answer | None
    def on_response(self, request: Request, response: Response) -> None

Either may change the `headers` it is given. What it raises fails the request or response that it was called for. It
runs in a process that holds no key and sees one request or response at a time; there are several of them, and any may
be killed at any time: what a filter keeps in memory is a cache.
"""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(slots=True)
class Request:
    """As policy has judged it; bodies are not shown."""

    method: str
    target: str
    """The path with its query, normalised."""
    authority: str
    """The Host header."""
    caller: str
    """The SPIFFE ID that mTLS has proved."""
    caller_address: str
    id: str
    """Of the request, `x-request-id`."""
    headers: list[tuple[str, str]]
    """Names are in lower case. In `on_response` they are only to be read."""

    def header(self, name: str) -> str | None:
        """The first value of a header; `name` in lower case."""
        return next((value for found, value in self.headers if found == name), None)


@dataclass(slots=True)
class Response:
    """The head of a backend's response."""

    status: int
    headers: list[tuple[str, str]]


@dataclass(slots=True)
class Answer:
    """What the caller gets instead of a backend's response."""

    status: int
    headers: list[tuple[str, str]] = field(default_factory=list)
    body: bytes = b""
