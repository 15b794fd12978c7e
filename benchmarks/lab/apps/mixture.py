"""An application, and its callers, of whom each connection behaves otherwise: what wears a proxy out in minutes.

    mixture.py serve ADDRESS PORT                        the first byte of a connection says how it behaves
    mixture.py call ADDRESS PORT CALLERS SECONDS SEED    prints how many connections there were

Connections are reset, half closed, left unread and given up; echoes are checked.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import socket
import struct
import sys
import time

RESET = struct.pack("ii", 1, 0)
BULK = 2 << 20
PATIENCE_S = 20


async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError, asyncio.IncompleteReadError):
        match await reader.readexactly(1):
            case b"b":  # bulk out
                writer.write(bytes(BULK))
                writer.write_eof()
                await reader.read()
            case b"r":
                writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
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


async def small(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, _: random.Random) -> None:
    writer.write(b"e" + bytes(100))
    check(len(await reader.readexactly(100)), 100)


async def chat(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, rng: random.Random) -> None:
    writer.write(b"e")
    for _ in range(rng.randrange(50)):
        size = rng.choice((1, 1000, 100_000))
        writer.write(bytes(size))
        await reader.readexactly(size)


async def bulk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, _: random.Random) -> None:
    writer.write(b"b")
    check(len(await reader.read(-1)), BULK)


async def slow(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, rng: random.Random) -> None:
    writer.write(b"b")
    await asyncio.sleep(rng.random())  # the answer waits in windows and sockets, and most of it is never read


async def reset(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, rng: random.Random) -> None:
    writer.write(rng.choice((b"r", b"e", b"q")) + bytes(rng.choice((1, 300_000))))
    if rng.random() < 0.5:
        await reader.read(1)
    writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
    writer.transport.abort()


async def half(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, _: random.Random) -> None:
    writer.write(b"f" + bytes(100_000))
    check(len(await reader.read()), 0)
    writer.write(bytes(100_000))
    writer.write_eof()


def check(found: int, wanted: int) -> None:
    if found != wanted:
        sys.exit(f"{found} bytes came, {wanted} were sent")


async def work(address: str, port: int, rng: random.Random, until: float, done: dict[str, int]) -> None:
    while time.monotonic() < until:
        behave = rng.choice((small, small, small, chat, bulk, slow, reset, half))
        # A configuration or certificate that changes amid it, and a reset, are part of the load.
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            async with asyncio.timeout(PATIENCE_S):
                reader, writer = await asyncio.open_connection(address, port)
                try:
                    await behave(reader, writer, rng)
                finally:
                    writer.close()
                done[behave.__name__] = done.get(behave.__name__, 0) + 1


async def main(role: str, address: str, port: str, *more: str) -> None:
    if role == "serve":
        await (await asyncio.start_server(serve, address, int(port))).serve_forever()
    callers, seconds, seed = more
    done: dict[str, int] = {}
    until = time.monotonic() + float(seconds)
    async with asyncio.TaskGroup() as group:
        for number in range(int(callers)):
            rng = random.Random(int(seed) * 1000 + number)
            group.create_task(work(address, int(port), rng, until, done))
    print(sum(done.values()))


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
