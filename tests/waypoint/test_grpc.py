"""gRPC's own interoperability cases, by grpcio, through a waypoint, between two uProxies or beside the workload: what
is seen is what is seen without it.
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from pathlib import Path

import pytest

from control.api.policy import Action, AuthorizationPolicy, Operation, Rule, Target
from control.server.ca import Authority
from tests.support import grpc_interop
from tests.support.beside_pair import Besides, running_beside
from tests.support.pair import DB_ADDRESS
from tests.support.through_waypoint import Through, running_waypoint, settled
from uproxy import plane

Seen = dict[str, object]
_LOCAL = "127.0.0.1"
_PEER = (sys.executable, "-m", "tests.support.grpc_interop")
MESSAGES = (("Unary", 1, 1), ("Collect", 4, 1), ("Pour", 1, 4), ("Converse", 4, 4))
"""Call, messages of its request and of its response."""

DENIED = AuthorizationPolicy(
    "shop",
    "no",
    Action.DENY,
    None,
    (Rule(operations=(Operation(paths=("/interop.Refused/*",)),)),),
    (Target("Gateway", "shop/wp"),),
)


async def called(address: str, port: int) -> Seen:
    caller = await asyncio.create_subprocess_exec(*_PEER, "call", address, str(port), stdout=asyncio.subprocess.PIPE)
    async with asyncio.timeout(60):
        told, _ = await caller.communicate()
    return json.loads(told)


async def both_ways(
    directory: Path, start: Callable[..., AbstractAsyncContextManager[Through | Besides]]
) -> tuple[Seen, Seen, list[tuple[str, str]]]:
    authority = Authority.create(directory / "ca", "cluster.local")
    server = await asyncio.create_subprocess_exec(
        *_PEER, "serve", DB_ADDRESS, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE
    )
    assert server.stdout is not None
    try:
        port = int(await server.stdout.readline())
        without = await called(DB_ADDRESS, port)
        async with start(directory, authority, port, "grpc") as through, through.door() as door:
            through.pair.apply(DENIED)
            seen = await called(_LOCAL, door)
            through.pair.plane.run(through.gateway.close_idle)
            through.pair.plane.run(through.upstream.close)
            await settled(through)
            logged = [(one.path, one.grpc_status) for one in through.telemetry.exchanges]
            sizes = [(one.received, one.sent) for one in through.telemetry.exchanges]
            messages = {
                (one.path, one.request_messages.count, one.response_messages.count)
                for one in through.telemetry.exchanges
                if one.request_messages is not None and one.response_messages is not None
            }
            assert messages >= {("/interop.Test/" + call, *counts) for call, *counts in MESSAGES}
            # Compressed messages stay so, one way and the other.
            assert any(received < 2000 and sent > 300_000 for received, sent in sizes)
            assert any(received < 2000 and 0 < sent < 2000 for received, sent in sizes)
    finally:
        server.terminate()
        await server.wait()
    return without, seen, logged


@pytest.fixture(scope="module", params=["between", "beside"])
def seen(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Seen, Seen, list[tuple[str, str]]]:
    start = running_waypoint if request.param == "between" else running_beside
    return plane.run(both_ways(tmp_path_factory.mktemp("grpc"), start))


@pytest.mark.parametrize("case", [case for case in grpc_interop.CASES if case != "refused"])
def test_interop(seen: tuple[Seen, Seen, object], case: str) -> None:
    without, through, _ = seen
    assert through[case] == without[case]


def test_a_refusal_is_a_grpc_status(seen: tuple[Seen, Seen, object]) -> None:
    without, through, _ = seen
    assert without["refused"] == ["StatusCode.UNIMPLEMENTED", "Method not found!"]
    assert through["refused"] == ["StatusCode.PERMISSION_DENIED", "RBAC: access denied"]


def test_statuses_are_recorded(seen: tuple[object, object, list[tuple[str, str]]]) -> None:
    _, _, logged = seen
    assert ("/interop.Test/Unary", "0") in logged
    assert ("/interop.Test/Unary", "16") in logged
    assert ("/interop.Test/Nothing", "12") in logged
    assert ("/interop.Refused/Unary", "7") in logged
