"""Which trailers go on: fields behind a body come too late for whoever has judged the head, so few may. No I/O."""

from __future__ import annotations

from typing import Final

from waypoint.messages import Fields
from waypoint.remembered import remembered

# RFC 9110 section 6.5.1: what frames, routes, authenticates or changes the meaning of a message is no trailer; some
# applications merge what comes here into the head.
_REFUSED: Final = frozenset(
    b"age authorization cache-control connection content-encoding content-length content-range content-type cookie "
    b"date expect expires forwarded host http2-settings keep-alive location max-forwards origin pragma "
    b"proxy-authenticate proxy-authorization proxy-connection range retry-after set-cookie te traceparent tracestate "
    b"trailer transfer-encoding upgrade vary via warning www-authenticate".split()
)
_REFUSED_PREFIXES: Final = (b":", b"if-", b"x-forwarded-", b"x-request-id", b"x-uproxy-", b"access-control-")


@remembered
def kept(trailers: Fields) -> Fields:
    """Those of a peer that go on, mostly all of them; names are in lower case."""
    if not any(_refused(name.replace(b"_", b"-")) for name, _ in trailers):
        return trailers
    return [(name, value) for name, value in trailers if not _refused(name.replace(b"_", b"-"))]


def _refused(name: bytes) -> bool:
    return name in _REFUSED or name.startswith(_REFUSED_PREFIXES)
