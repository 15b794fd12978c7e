"""What a launcher asks of the fork server (`uproxy.fork_client.Order`)."""

from __future__ import annotations

import signal
from collections.abc import Iterable
from pathlib import Path

import msgpack

from uproxy.entrance import Account, Entrance, Exposure
from uproxy.fork_client import ForkServerError, Order

MAX_BYTES = 2048
WORDS = (
    b"\xa8protocol\x01", b"\xa9arguments", b"\xa6cgroup", b"\xa7account", b"\xaarestricted", b"\xa9exposures",
    b"\xa7signals", b"\xc0", b"\xc2", b"\xc3", b"\xcf\xff\xff\xff\xff\xff\xff\xff\xff", b"\xca\x7f\x80\x00\x00",
)  # fmt: skip


def _orders() -> Iterable[Order]:
    whole = Entrance(
        Path("/sys/fs/cgroup/web/proxy"),
        3,
        account=Account(61184, 61184, (100,)),
        restricted=True,
        exposures=(Exposure(Path("/run/web"), (Path("/run"), Path("/run/web/identity"))),),
        signal_mask=(signal.SIGTERM, signal.SIGINT),
    )
    yield Order(("--identity", "/run/web/identity"), whole, 4, 5, 6, (7, 8))
    yield Order((), Entrance(Path("/x"), 3), 4, 5, 6, ())


def seeds() -> Iterable[bytes]:
    for order in _orders():
        yield bytes((len(order.descriptors),)) + order.pack()


def check(data: bytes) -> None:
    """How many descriptors came, and the message."""
    descriptors = list(range(3, 3 + data[0] % 16)) if data else []
    try:
        order = Order.unpack(data[1:], descriptors)
    except ForkServerError:
        return
    assert order.descriptors == descriptors
    # What it starts is what was asked for: nothing is read into another shape.
    assert Order.unpack(order.pack(), descriptors) == order
    asked = msgpack.unpackb(data[1:])
    assert repr(order.entrance.restricted) == repr(asked["restricted"])
    assert not isinstance(asked["arguments"], list) or repr(list(order.arguments)) == repr(asked["arguments"])
