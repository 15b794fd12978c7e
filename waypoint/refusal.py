"""What a waypoint answers by itself, instead of a backend."""

from __future__ import annotations

from typing import Final

from uproxy.hbone import ErrorCode
from waypoint import telemetry as flags
from waypoint.messages import Fields

REASONS: Final = {
    301: b"Moved Permanently",
    302: b"Found",
    303: b"See Other",
    307: b"Temporary Redirect",
    308: b"Permanent Redirect",
    400: b"Bad Request",
    401: b"Unauthorized",
    403: b"Forbidden",
    404: b"Not Found",
    408: b"Request Timeout",
    414: b"URI Too Long",
    417: b"Expectation Failed",
    429: b"Too Many Requests",
    431: b"Request Header Fields Too Large",
    500: b"Internal Server Error",
    501: b"Not Implemented",
    502: b"Bad Gateway",
    503: b"Service Unavailable",
    504: b"Gateway Timeout",
    505: b"HTTP Version Not Supported",
}


def retry_after(seconds: int) -> Fields:
    """For those who should ask again, and not sooner."""
    return ((b"retry-after", str(seconds).encode()),)


SOON: Final = retry_after(1)
"""Of what may well go through when it is asked for again: the least that the header can say."""


class RefusalError(Exception):
    """A request that this waypoint answers by itself.

    `reason` is for programs, `detail` for people; `flag` is Envoy's response flag; `policy` names the rule; `fields`:
    more of the answer's head; `close`: whoever asks again must connect anew for it; `code`: of the reset, if the
    response has begun; `retriable`: a backend may be asked again, as far as this failure goes; `body`: what is answered
    instead of `detail`, of `content_type`.
    """

    def __init__(
        self,
        status: int,
        reason: str,
        detail: str,
        *,
        flag: str = flags.NO_FLAG,
        policy: str = "",
        fields: Fields = (),
        close: bool = False,
        retriable: bool = False,
        code: ErrorCode = ErrorCode.INTERNAL_ERROR,
        body: bytes | None = None,
        content_type: bytes = b"text/plain",
    ) -> None:
        super().__init__(detail)
        self.status = status
        self.reason = reason
        self.detail = detail
        self.flag = flag
        self.policy = policy
        self.fields = fields
        self.close = close
        self.retriable = retriable
        self.code = code
        self.body = body
        self.content_type = content_type


# github.com/grpc/grpc, doc/http-grpc-status-mapping.md
_GRPC_STATUS: Final = {400: 13, 401: 16, 403: 7, 404: 12, 429: 14, 502: 14, 503: 14, 504: 14}
_GRPC_UNKNOWN: Final = 2


def grpc_status(status: int) -> int:
    """What a gRPC caller is told in place of an HTTP status."""
    return _GRPC_STATUS.get(status, _GRPC_UNKNOWN)
