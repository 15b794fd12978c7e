"""Minutes of everything at once through two uProxy processes: what they hold must not grow.

`make soak`; SOAK_SECONDS (default 600) says for how long. The load stops between rounds, so that what is measured is
what stays: memory, descriptors, tasks, connections.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import socket
import struct
import subprocess
import time
import urllib.request
from dataclasses import dataclass
from pathlib import Path

import pytest

from control.server.ca import write_identity
from tests.support.certificates import DB, WEB
from tests.support.site import Site
from uproxy import plane

NETWORK = "127.0.81"
SECONDS = float(os.environ.get("SOAK_SECONDS", "600"))
ROUNDS = 6
WORKERS = 24
# The allocator's free lists settle in the first round; what is kept per label set and per peer does, too.
MAX_GROWTH_KIB = 3 << 10
_RESET = struct.pack("ii", 1, 0)

Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]


@dataclass(frozen=True)
class Held:
    """What one process holds while nothing happens."""

    resident_kib: int
    descriptors: int
    tasks: int
    live: int


@pytest.mark.soak
@pytest.mark.timeout(SECONDS + 300)
def test_memory_descriptors_and_tasks_stay_flat(tmp_path: Path) -> None:
    site = Site.create(tmp_path, NETWORK)
    # Files, not pipes: the access log is part of the load.
    with site.running("db") as db, site.running("web") as web:
        samples = plane.run(soak(site, {"web": web, "db": db}))
        for name, seen in samples.items():
            print(name, *seen, sep="\n  ")
        for seen in samples.values():
            first, last = seen[0], seen[-1]
            assert last.resident_kib - first.resident_kib < MAX_GROWTH_KIB
            assert last.descriptors <= first.descriptors + 4
            assert (last.tasks, last.live) == (0, 0)
        assert "Traceback" not in site.log("web") + site.log("db")


async def soak(site: Site, processes: dict[str, subprocess.Popen[str]]) -> dict[str, list[Held]]:
    server = await asyncio.start_server(serve, *site.application)
    samples: dict[str, list[Held]] = {name: [] for name in processes}
    done = [0]
    try:
        for number in range(ROUNDS):
            until = time.monotonic() + SECONDS / ROUNDS
            async with asyncio.TaskGroup() as group:
                for worker in range(WORKERS):
                    group.create_task(work(site, random.Random(number * 1000 + worker), until, done))
                group.create_task(disturb(site, until))
            await asyncio.sleep(3)  # half-open and lingering ends go away
            for name, process in processes.items():
                samples[name].append(await asyncio.to_thread(held, site, name, process))
    finally:
        server.close()
    print(f"{done[0]} connections")
    assert done[0] > 20 * SECONDS, "too little was done to learn anything"
    return samples


def held(site: Site, name: str, process: subprocess.Popen[str]) -> Held:
    address = f"{site.network}.{('web', 'db').index(name) + 1}"
    status = Path(f"/proc/{process.pid}/status").read_text()
    resident = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmRSS"))

    with urllib.request.urlopen(f"http://{address}:15020/metrics", timeout=5) as answer:
        lines = answer.read().decode().splitlines()
    metrics = {k: float(v) for k, _, v in (line.rpartition(" ") for line in lines if not line.startswith("#"))}
    return Held(
        resident,
        len(os.listdir(f"/proc/{process.pid}/fd")),
        int(metrics["uproxy_tasks"]),
        int(metrics["uproxy_live_connections"]),
    )


async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """db's application: the first byte says how it behaves."""
    with contextlib.suppress(OSError, asyncio.IncompleteReadError):
        match await reader.readexactly(1):
            case b"b":  # bulk out
                writer.write(bytes(2 << 20))
                writer.write_eof()
                await reader.read()
            case b"r":
                sock = writer.get_extra_info("socket")
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
            case b"f":  # ends first, and reads on
                writer.write_eof()
                await reader.read()
            case b"q":  # goes away without reading
                pass
            case _:
                while data := await reader.read(65536):
                    writer.write(data)
                    await writer.drain()
    writer.close()


async def work(site: Site, rng: random.Random, until: float, done: list[int]) -> None:
    while time.monotonic() < until:
        behaviour = rng.choice((small, small, small, chat, bulk, slow, reset, half, refused))
        # A configuration or certificate that changes amid it, a refusal and a reset are part of the load.
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            async with asyncio.timeout(20):
                reader, writer = await asyncio.open_connection(*site.forward)
                try:
                    await behaviour(reader, writer, rng)
                finally:
                    writer.close()
        done[0] += 1


async def small(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, _: random.Random) -> None:
    writer.write(b"e" + bytes(100))
    assert len(await reader.readexactly(100)) == 100


async def chat(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, rng: random.Random) -> None:
    writer.write(b"e")
    for _ in range(rng.randrange(50)):
        size = rng.choice((1, 1000, 100_000))
        writer.write(bytes(size))
        await reader.readexactly(size)


async def bulk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, _: random.Random) -> None:
    writer.write(b"b")
    assert len(await reader.read(-1)) == 2 << 20


async def slow(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, rng: random.Random) -> None:
    writer.write(b"b")
    await asyncio.sleep(rng.random())  # the answer waits in windows and sockets, and most of it is never read


async def reset(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, rng: random.Random) -> None:
    writer.write(rng.choice((b"r", b"e", b"q")) + bytes(rng.choice((1, 300_000))))
    if rng.random() < 0.5:
        await reader.read(1)
    writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
    writer.transport.abort()


async def half(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, _: random.Random) -> None:
    writer.write(b"f" + bytes(100_000))
    assert await reader.read() == b""
    writer.write(bytes(100_000))
    writer.write_eof()


async def refused(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, _: random.Random) -> None:
    """Strangers at the tunnel's door, who say nothing or nonsense."""
    stranger_reads, stranger = await asyncio.open_connection(f"{NETWORK}.2", 15008)
    stranger.write(b"GET / HTTP/1.1\r\n\r\n")
    with contextlib.suppress(OSError):
        await stranger_reads.read()
    stranger.close()


async def disturb(site: Site, until: float) -> None:
    """New certificates, and configurations that change something or nothing."""
    turn = 0
    while time.monotonic() < until - 2:
        turn += 1
        name, identity = (("web", WEB), ("db", DB))[turn % 2]
        csr = (site.path / name / "csr.pem").read_bytes()
        write_identity(site.path / name, site.authority.issue(csr, identity), site.authority.bundle_pem)
        extra = f"""---
apiVersion: networking.istio.io/v1
kind: WorkloadEntry
metadata: {{name: passer-by, namespace: shop}}
spec: {{address: {site.network}.{100 + turn % 50}, serviceAccount: db, labels: {{app: other}}}}
"""
        site.mesh.write_text(site.resources + extra * (turn % 2))
        await asyncio.sleep(2)
