"""Messages between the processes of a waypoint, over a real socket pair."""

import asyncio
import socket
import struct

import pytest

from uproxy import channel
from uproxy.channel import Channel


async def ends() -> tuple[Channel, list[list[object]], asyncio.Event, socket.socket]:
    """One end as it is used, what it got, whether it was lost; and the other end, bare."""
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    theirs.setblocking(False)
    got: list[list[object]] = []
    lost = asyncio.Event()
    end = Channel(got.append, lost.set)
    await end.attach(ours)
    return end, got, lost, theirs


def test_messages_arrive_whole_and_in_order_in_whatever_pieces():
    async def run():
        end, got, lost, theirs = await ends()
        loop = asyncio.get_running_loop()
        for byte in channel.encode("apply", 1, [("t", b"x" * 300)]) + channel.encode("listen"):
            await loop.sock_sendall(theirs, bytes([byte]))
        theirs.close()
        await lost.wait()
        end.send("applied", 1)  # nobody is there: dropped
        return got

    assert asyncio.run(run()) == [["apply", 1, [["t", b"x" * 300]]], ["listen"]]


@pytest.mark.parametrize("sent", [struct.pack("!I", channel.MAX_MESSAGE + 1), struct.pack("!I", 1) + b"\xc1"])
def test_what_is_no_message_ends_the_connection(sent, caplog):
    async def run():
        _, got, lost, theirs = await ends()
        with theirs:
            await asyncio.get_running_loop().sock_sendall(theirs, sent)
            await lost.wait()
        return got

    assert asyncio.run(run()) == []
    assert "was not understood" in caplog.text


def test_what_the_other_end_does_not_take_is_bounded(monkeypatch, caplog):
    monkeypatch.setattr(channel, "MAX_MESSAGE", 1024 * 1024)

    async def run():
        end, _, lost, theirs = await ends()
        with theirs:
            for _ in range(40):
                end.send("apply", b"x" * 65536)
            await lost.wait()

    asyncio.run(run())
    assert "wait for the other end" in caplog.text
