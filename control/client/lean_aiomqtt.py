"""aiomqtt, imported without what paho needs for SOCKS proxies alone (urllib.request and all below it, 1.6 MB of each
sidecar) and to look for brokers in DNS, which we never ask of it. With PySocks and dnspython's resolver absent, or made
so here, paho asks for none of it.
"""

from __future__ import annotations

import contextlib
import sys
import types
from collections.abc import Iterator


@contextlib.contextmanager
def _without_extras() -> Iterator[None]:
    replaced = {"socks": None, "dns.resolver": None, "urllib.request": types.ModuleType("urllib.request")}
    absent = [name for name in replaced if name not in sys.modules]
    for name in absent:
        sys.modules[name] = replaced[name]  # type: ignore[assignment]  # None: an import fails
    try:
        yield
    finally:
        for name in absent:
            del sys.modules[name]


with _without_extras():
    import aiomqtt as aiomqtt
