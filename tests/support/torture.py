"""What applications do with a TCP connection: each scenario is two programs, and what they saw of each other.

What they saw must not depend on the way between them. Sockets block, as most applications' do; SO_RCVTIMEO and
SO_SNDTIMEO end a scenario that hangs (Python's own timeouts would make the sockets non-blocking).
"""

from __future__ import annotations

import array
import errno
import fcntl
import hashlib
import os
import random
import select
import socket
import struct
import termios
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass

HANG_S = 20
"""After this long without a byte a scenario has failed."""
_QUIET_S = 0.15
"""For how long what must not happen does not."""
_BASE = random.Random(4711).randbytes((1 << 20) + 12345)

Seen = dict[str, object]
Program = Callable[[socket.socket, int], Seen]


@dataclass(frozen=True, slots=True)
class Scenario:
    """`client` and `server` get their end of the connection, and how many bytes a transfer has."""

    name: str
    client: Program
    server: Program


@dataclass(frozen=True, slots=True)
class Way:
    """How the two reach each other."""

    name: str
    listen: Callable[[], socket.socket]
    dial: Callable[[], tuple[socket.socket, tuple[str, int]]]
    """A socket that is not connected yet, and what to connect it to."""


def play(scenario: Scenario, way: Way, volume: int) -> Seen:
    """What both saw, over one new connection."""
    with way.listen() as listener:
        listener.settimeout(HANG_S)
        client, address = way.dial()
        with client:
            client.settimeout(HANG_S)
            client.connect(address)
            server, _ = listener.accept()
            with server, ThreadPoolExecutor(2) as pool:
                for one in (client, server):
                    one.settimeout(None)
                    for option in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):
                        one.setsockopt(socket.SOL_SOCKET, option, struct.pack("ll", HANG_S, 0))
                ends = {"client": (scenario.client, client), "server": (scenario.server, server)}
                started = {end: pool.submit(_run, program, made, volume) for end, (program, made) in ends.items()}
                try:
                    return {
                        f"{end}: {what}": value for end, one in started.items() for what, value in one.result().items()
                    }
                except BaseException:
                    for one in (client, server):  # the other side must not wait for what will not come
                        _shut_down_if_open(one)
                    raise


def _run(program: Program, made: socket.socket, volume: int) -> Seen:
    """A program's end closes what it has open."""
    try:
        return program(made, volume)
    finally:
        made.close()


def _shut_down_if_open(one: socket.socket) -> None:
    with suppress(OSError):
        one.shutdown(socket.SHUT_RDWR)


# -- what the programs are made of


def pieces(seed: int, volume: int) -> Iterator[memoryview]:
    """Bytes that no other seed gives in that order, in pieces of all sizes."""
    sizes = random.Random(seed)
    base = memoryview(_BASE)
    left = volume
    while left:
        size = min(left, sizes.choice((1, 100, 1460, 16384, 16385, 65536, 262144)))
        start = sizes.randrange(len(_BASE) - size)
        yield base[start : start + size]
        left -= size


def send(one: socket.socket, seed: int, volume: int) -> str:
    digest = hashlib.sha256()
    for piece in pieces(seed, volume):
        one.sendall(piece)
        digest.update(piece)
    return digest.hexdigest()


def receive(one: socket.socket, volume: int | None = None) -> tuple[int, str]:
    """So many bytes, or to the end of them: how many came, and their digest."""
    digest = hashlib.sha256()
    buffer = memoryview(bytearray(262144))
    count = 0
    while volume is None or count < volume:
        room = len(buffer) if volume is None else min(len(buffer), volume - count)
        got = one.recv_into(buffer[:room])
        if not got:
            break
        digest.update(buffer[:got])
        count += got
    return count, digest.hexdigest()


def reset(one: socket.socket) -> None:
    """Close with RST."""
    one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    one.close()


def fate_of_reading(one: socket.socket) -> str:
    """How the bytes end."""
    try:
        receive(one)
    except OSError as error:
        return _fate(error)
    return "end"


def fate_of_writing(one: socket.socket) -> str:
    """How writing ends, with a peer that takes nothing more."""
    deadline = time.monotonic() + HANG_S
    try:
        while time.monotonic() < deadline:
            one.send(b"x" * 65536)
    except OSError as error:
        return _fate(error)
    return "never"


def _fate(error: OSError) -> str:
    # Whichever call comes first after an RST gets ECONNRESET, later ones EPIPE.
    return "reset" if error.errno in (errno.ECONNRESET, errno.EPIPE) else errno.errorcode[error.errno or 0]


def readable(one: socket.socket, timeout_s: float) -> bool:
    return bool(select.select([one], [], [], timeout_s)[0])


def unread(one: socket.socket) -> int:
    found = array.array("i", [0])
    fcntl.ioctl(one.fileno(), termios.FIONREAD, found)
    return found[0]


def await_unread(one: socket.socket, count: int) -> None:
    deadline = time.monotonic() + HANG_S
    while unread(one) < count:
        assert time.monotonic() < deadline, f"{unread(one)} of {count} bytes came"
        time.sleep(0.002)


# -- half-close


def _ask(one: socket.socket, volume: int) -> Seen:
    sent = send(one, 1, volume)
    one.shutdown(socket.SHUT_WR)
    return {"sent": sent, "received": receive(one)}


def _answer_at_the_end(one: socket.socket, volume: int) -> Seen:
    received = receive(one)
    return {"received": received, "sent": send(one, 2, volume), "closed": one.close()}


def _read_then_write(one: socket.socket, volume: int) -> Seen:
    received = receive(one)
    sent = send(one, 1, volume)
    one.shutdown(socket.SHUT_WR)
    return {"received": received, "sent": sent}


def _write_shut_read(one: socket.socket, volume: int) -> Seen:
    sent = send(one, 2, volume)
    one.shutdown(socket.SHUT_WR)
    return {"sent": sent, "received": receive(one), "writes": fate_of_writing(one)}


# -- a slow reader


def _write_against_a_wall(one: socket.socket, volume: int) -> Seen:
    """Send 24 MB, more than all buffers on the way hold; whether the reader's sleep was felt."""
    volume = max(volume // 8, 24_000_000)
    digest = hashlib.sha256()
    stalled = False
    for piece in pieces(3, volume):
        digest.update(piece)
        rest = piece
        while rest:
            if not select.select([], [one], [], _QUIET_S)[1]:
                stalled = True
                continue
            with suppress(BlockingIOError):
                rest = rest[one.send(rest, socket.MSG_DONTWAIT) :]
    one.shutdown(socket.SHUT_WR)
    return {"sent": digest.hexdigest(), "stalled": stalled, "end": one.recv(1)}


def _read_slowly(one: socket.socket, volume: int) -> Seen:
    one.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 32768)
    time.sleep(1.0)
    digest = hashlib.sha256()
    count = 0
    while piece := one.recv(8192 if count < 500_000 else 262144):
        digest.update(piece)
        count += len(piece)
        if count < 500_000:
            time.sleep(0.002)
    return {"received": (count, digest.hexdigest())}


# -- both ways at once


def _duplex(own: int) -> Program:
    def program(one: socket.socket, volume: int) -> Seen:
        with ThreadPoolExecutor(1) as pool:

            def write() -> str:
                sent = send(one, own, volume)
                one.shutdown(socket.SHUT_WR)
                return sent

            writing = pool.submit(write)
            return {"received": receive(one), "sent": writing.result()}

    return program


def _edge_triggered(own: int) -> Program:
    """One thread, which sleeps until an edge, and must see every one of them."""

    def program(one: socket.socket, volume: int) -> Seen:
        one.setblocking(False)
        todo = pieces(own, volume)
        rest = memoryview(b"")
        sent, received = hashlib.sha256(), hashlib.sha256()
        count, writes, reads = 0, True, True
        with select.epoll() as epoll:
            epoll.register(one.fileno(), select.EPOLLIN | select.EPOLLOUT | select.EPOLLRDHUP | select.EPOLLET)
            while writes or reads:
                events = epoll.poll(HANG_S)
                assert events, f"no edge in {HANG_S} s: {count} bytes came, writes {writes}"
                while writes:
                    if not rest:
                        piece = next(todo, None)
                        if piece is None:
                            one.shutdown(socket.SHUT_WR)
                            writes = False
                            break
                        sent.update(piece)
                        rest = piece
                    try:
                        rest = rest[one.send(rest) :]
                    except BlockingIOError:
                        break
                while reads:
                    try:
                        got = one.recv(65536)
                    except BlockingIOError:
                        break
                    received.update(got)
                    count += len(got)
                    reads = bool(got)
        return {"sent": sent.hexdigest(), "received": (count, received.hexdigest())}

    return program


# -- flags of recv


def _peek(one: socket.socket, volume: int) -> Seen:
    same = []
    for piece in pieces(5, 300_000):
        size = min(len(piece), 65536)
        while len(peeked := one.recv(size, socket.MSG_PEEK)) < size:  # grows, and never loses
            assert bytes(piece[: len(peeked)]) == peeked
            time.sleep(0.001)
        again = one.recv(size, socket.MSG_PEEK | socket.MSG_WAITALL)
        taken = one.recv(size, socket.MSG_WAITALL)
        same.append(bytes(piece[:size]) == peeked == again == taken)
        one.sendall(b"n")
    seen: Seen = {"same": all(same), "rounds": len(same), "peek at the end": one.recv(1, socket.MSG_PEEK)}
    return {**seen, "end": one.recv(1)}


def _serve_peek(one: socket.socket, volume: int) -> Seen:
    asked = b""
    for piece in pieces(5, 300_000):
        part = piece[: min(len(piece), 65536)]
        one.sendall(part[: len(part) // 2])
        one.sendall(part[len(part) // 2 :])
        asked += one.recv(1, socket.MSG_WAITALL)
    one.shutdown(socket.SHUT_WR)
    return {"asked": len(asked), "end": one.recv(1)}


_WAITS = (1, 3, 1460, 16384, 65536, 1_000_000, 7)


def _wait_for_all(one: socket.socket, volume: int) -> Seen:
    taken = [one.recv(size, socket.MSG_WAITALL) for size in _WAITS]
    short = one.recv(5000, socket.MSG_WAITALL)  # the end comes first
    digest = hashlib.sha256(b"".join(taken) + short).hexdigest()
    return {"lengths": [len(part) for part in taken], "short": len(short), "digest": digest, "end": one.recv(1)}


def _send_in_crumbs(one: socket.socket, volume: int) -> Seen:
    digest = hashlib.sha256()
    for number, piece in enumerate(pieces(6, sum(_WAITS) + 1234)):
        for at in range(0, len(piece), 50_000):
            one.sendall(piece[at : at + 50_000])
            if number < 40:
                time.sleep(0.001)
        digest.update(piece)
    one.shutdown(socket.SHUT_WR)
    return {"digest": digest.hexdigest(), "end": one.recv(1)}


_LOW_WATER = 40_000


def _low_water(one: socket.socket, volume: int) -> Seen:
    one.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, _LOW_WATER)
    await_unread(one, 1000)
    below = readable(one, _QUIET_S)
    one.sendall(b"m")
    above = readable(one, HANG_S)
    held = len(one.recv(_LOW_WATER, socket.MSG_WAITALL))
    one.sendall(b"e")
    at_end = readable(one, HANG_S)  # less than the mark, but nothing more will come
    return {"below": below, "above": above, "held": held, "at the end": at_end, "rest": len(one.recv(9999))}


def _serve_low_water(one: socket.socket, volume: int) -> Seen:
    one.sendall(bytes(1000))
    asked = one.recv(1)
    one.sendall(bytes(_LOW_WATER - 1000))
    asked += one.recv(1)
    one.sendall(b"tail")
    one.shutdown(socket.SHUT_WR)
    return {"asked": asked, "end": one.recv(1)}


def _not_there_yet(one: socket.socket, volume: int) -> Seen:
    """What a socket with nothing in it says, by each way to ask."""
    seen: Seen = {}
    for name, flags in (("MSG_DONTWAIT", socket.MSG_DONTWAIT), ("and MSG_PEEK", socket.MSG_DONTWAIT | socket.MSG_PEEK)):
        try:
            one.recv(1, flags)
        except OSError as error:
            seen[name] = errno.errorcode[error.errno or 0]
    one.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("ll", 0, 50_000))
    try:
        one.recv(1)
    except OSError as error:
        seen["SO_RCVTIMEO"] = errno.errorcode[error.errno or 0]
    one.sendall(b"g")
    one.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("ll", HANG_S, 0))
    return {**seen, "then": one.recv(2, socket.MSG_WAITALL)}


def _wait_then_write(one: socket.socket, volume: int) -> Seen:
    return {"asked": one.recv(1), "sent": one.send(b"ok"), "end": one.recv(1)}


# -- splice, sendfile, vectors


def _sendfile_and_read(one: socket.socket, volume: int) -> Seen:
    digest = hashlib.sha256()

    def write() -> None:
        for number in range(max(1, volume // len(_BASE))):
            file = os.memfd_create("payload")
            try:
                os.write(file, _BASE[number % 1000 :])
                size = os.fstat(file).st_size
                digest.update(_BASE[number % 1000 :])
                at = 0
                while at < size:
                    at += os.sendfile(one.fileno(), file, at, size - at)
            finally:
                os.close(file)
        one.shutdown(socket.SHUT_WR)

    with ThreadPoolExecutor(1) as pool:
        writing = pool.submit(write)
        received = receive(one)
        writing.result()
    return {"received": received, "sent": digest.hexdigest()}


def _splice_back(one: socket.socket, volume: int) -> Seen:
    """An echo that never sees a byte. splice(2) gives 0 at the end and only there."""
    source, sink = os.pipe()
    count = 0
    try:
        while moved := os.splice(one.fileno(), sink, 65536):
            count += moved
            while moved:
                moved -= os.splice(source, one.fileno(), moved)
    finally:
        os.close(source)
        os.close(sink)
    one.shutdown(socket.SHUT_WR)
    return {"count": count, "end": one.recv(1)}


def _vectors(one: socket.socket, volume: int) -> Seen:
    sizes = (1, 0, 17, 4096, 65536, 3)
    one.setsockopt(socket.IPPROTO_TCP, socket.TCP_CORK, 1)
    digest = hashlib.sha256()
    for _ in range(20):
        parts = [_BASE[size : 2 * size] for size in sizes]
        digest.update(b"".join(parts))
        whole, sent = b"".join(parts), 0
        sent = one.sendmsg(parts, [], socket.MSG_MORE)
        one.sendall(whole[sent:])
    one.setsockopt(socket.IPPROTO_TCP, socket.TCP_CORK, 0)
    one.shutdown(socket.SHUT_WR)
    return {"sent": digest.hexdigest(), "received": receive(one)}


def _scatter_and_echo(one: socket.socket, volume: int) -> Seen:
    buffers = [bytearray(size) for size in (1, 100, 5000, 30000)]
    whole = bytearray()
    while got := one.recvmsg_into(buffers)[0]:
        whole += b"".join(buffers)[:got]
    one.sendall(whole)
    return {"received": (len(whole), hashlib.sha256(whole).hexdigest()), "closed": one.close()}


# -- small exchanges

_SIZES = (1, 2, 9, 1459, 1460, 1461, 16383, 16384, 16385, 65535, 65536, 65537, 200_001)


def _call(one: socket.socket, volume: int) -> Seen:
    one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    good = 0
    for number in range(300):
        size = _SIZES[number % len(_SIZES)] if number >= 200 else 1
        asked = struct.pack("!I", size) + _BASE[number : number + size]
        one.sendall(asked)
        good += one.recv(size, socket.MSG_WAITALL) == asked[4:]
    one.close()
    return {"good": good}


def _answer_each(one: socket.socket, volume: int) -> Seen:
    one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    calls = 0
    while head := one.recv(4, socket.MSG_WAITALL):
        one.sendall(one.recv(struct.unpack("!I", head)[0], socket.MSG_WAITALL))
        calls += 1
    return {"calls": calls}


# -- the ways in which connections end


def _shut_reading(one: socket.socket, volume: int) -> Seen:
    one.shutdown(socket.SHUT_RD)
    at_once = one.recv(1)
    one.sendall(b"1")
    await_unread(one, 5)
    return {"at once": at_once, "later": one.recv(5), "then": one.recv(1), "sent": one.send(b"2")}


def _write_to_the_deaf(one: socket.socket, volume: int) -> Seen:
    return {"first": one.recv(1), "sent": one.send(b"later"), "second": one.recv(1)}


def _shut_both(one: socket.socket, volume: int) -> Seen:
    one.sendall(b"last")
    one.shutdown(socket.SHUT_RDWR)
    time.sleep(_QUIET_S)  # the peer writes meanwhile
    return {"reads": fate_of_reading(one), "writes": fate_of_writing(one)}


def _read_to_the_end_and_write(one: socket.socket, volume: int) -> Seen:
    return {"received": receive(one), "writes": fate_of_writing(one)}


def _meet_at_the_end(seed: int) -> Program:
    def program(one: socket.socket, volume: int) -> Seen:
        sent = send(one, seed, 1000)
        one.shutdown(socket.SHUT_WR)
        received = receive(one)
        deadline = time.monotonic() + HANG_S
        again = ""
        while not again and time.monotonic() < deadline:  # until the last ACK is there
            try:
                one.shutdown(socket.SHUT_RDWR)
                time.sleep(0.002)
            except OSError as error:
                again = errno.errorcode[error.errno or 0]
        return {"sent": sent, "received": received, "again": again, "end": one.recv(1)}

    return program


def _close_with_unread(one: socket.socket, volume: int) -> Seen:
    await_unread(one, 1000)
    one.close()
    return {}


def _write_then_read(one: socket.socket, volume: int) -> Seen:
    one.sendall(bytes(1000))
    return {"reads": fate_of_reading(one), "writes": fate_of_writing(one)}


def _reset_after_reading(one: socket.socket, volume: int) -> Seen:
    received = receive(one, 1000)
    reset(one)
    return {"received": received}


def _reset_when_full(one: socket.socket, volume: int) -> Seen:
    await_unread(one, 10_000)
    time.sleep(_QUIET_S)
    reset(one)
    return {}


def _write_without_end(one: socket.socket, volume: int) -> Seen:
    return {"writes": fate_of_writing(one), "reads": fate_of_reading(one)}


def _shut_then_reset(one: socket.socket, volume: int) -> Seen:
    one.sendall(b"bye")
    one.shutdown(socket.SHUT_WR)
    heard = one.recv(1)
    reset(one)
    return {"heard": heard}


def _hear_the_end_then_the_reset(one: socket.socket, volume: int) -> Seen:
    received = receive(one)
    one.sendall(b"h")
    return {"received": received, "writes": fate_of_writing(one)}


def _close_at_once(one: socket.socket, volume: int) -> Seen:
    sent = send(one, 7, volume)
    one.close()
    return {"sent": sent}


def _read_to_the_end(one: socket.socket, volume: int) -> Seen:
    return {"received": receive(one)}


def _two_descriptors(one: socket.socket, volume: int) -> Seen:
    """Closing one of two descriptors closes nothing."""
    other = one.dup()
    one.close()
    with other:
        other.sendall(b"x")
        return {"answer": other.recv(1)}


def _answer_once(one: socket.socket, volume: int) -> Seen:
    return {"asked": one.recv(1), "sent": one.send(b"y"), "end": one.recv(1)}


# -- what poll says


def _events(one: socket.socket, wanted: int) -> int:
    """What epoll says once all of these are there, level-triggered. EPOLLERR and EPOLLHUP are always told."""
    with select.epoll() as epoll:
        epoll.register(one.fileno(), select.EPOLLIN | select.EPOLLRDHUP)
        deadline = time.monotonic() + HANG_S
        while time.monotonic() < deadline:
            for _, events in epoll.poll(0.1):
                if events & wanted == wanted:
                    return events
            time.sleep(0.002)
    raise AssertionError(f"events {wanted:#x} did not come")


def _watch_an_orderly_end(one: socket.socket, volume: int) -> Seen:
    half = _events(one, select.EPOLLRDHUP)
    data = one.recv(10)
    one.shutdown(socket.SHUT_WR)
    return {"half": half, "data": data, "whole": _events(one, select.EPOLLHUP), "end": one.recv(1)}


def _end_in_order(one: socket.socket, volume: int) -> Seen:
    one.sendall(b"data")
    one.shutdown(socket.SHUT_WR)
    return {"end": one.recv(1)}


def _watch_a_reset(one: socket.socket, volume: int) -> Seen:
    one.sendall(b"r")
    events = _events(one, select.EPOLLERR)
    error = one.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
    cleared = one.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
    try:
        one.shutdown(socket.SHUT_WR)
        shut = ""
    except OSError as failed:
        shut = errno.errorcode[failed.errno or 0]
    return {"events": events, "error": errno.errorcode[error], "cleared": cleared, "shutdown": shut, "end": one.recv(1)}


def _reset_when_asked(one: socket.socket, volume: int) -> Seen:
    asked = one.recv(1)
    reset(one)
    return {"asked": asked}


SCENARIOS = {
    scenario.name: scenario
    for scenario in (
        Scenario("half-close-by-the-client", _ask, _answer_at_the_end),
        Scenario("half-close-by-the-server", _read_then_write, _write_shut_read),
        Scenario("slow-reader", _read_slowly, _write_against_a_wall),
        Scenario("slow-server", _write_against_a_wall, _read_slowly),
        Scenario("full-duplex-threads", _duplex(11), _duplex(12)),
        Scenario("edge-triggered-epoll", _edge_triggered(13), _edge_triggered(14)),
        Scenario("edge-triggered-against-threads", _edge_triggered(15), _duplex(16)),
        Scenario("msg-peek", _peek, _serve_peek),
        Scenario("msg-waitall", _wait_for_all, _send_in_crumbs),
        Scenario("so-rcvlowat", _low_water, _serve_low_water),
        Scenario("nothing-there-yet", _not_there_yet, _wait_then_write),
        Scenario("sendfile-and-splice", _sendfile_and_read, _splice_back),
        Scenario("vectors-and-cork", _vectors, _scatter_and_echo),
        Scenario("small-exchanges", _call, _answer_each),
        Scenario("shut-reading", _shut_reading, _write_to_the_deaf),
        Scenario("shut-both", _shut_both, _read_to_the_end_and_write),
        Scenario("shut-both-by-the-server", _read_to_the_end_and_write, _shut_both),
        Scenario("both-shut-writing", _meet_at_the_end(21), _meet_at_the_end(22)),
        Scenario("close-with-unread-bytes", _close_with_unread, _write_then_read),
        Scenario("close-with-unread-bytes-by-the-server", _write_then_read, _close_with_unread),
        Scenario("reset", _reset_after_reading, _write_then_read),
        Scenario("reset-by-the-server", _write_then_read, _reset_after_reading),
        Scenario("reset-while-the-peer-writes", _reset_when_full, _write_without_end),
        Scenario("reset-while-the-client-writes", _write_without_end, _reset_when_full),
        Scenario("reset-after-half-close", _shut_then_reset, _hear_the_end_then_the_reset),
        Scenario("close-behind-the-last-byte", _close_at_once, _read_to_the_end),
        Scenario("close-behind-the-last-byte-by-the-server", _read_to_the_end, _close_at_once),
        Scenario("two-descriptors", _two_descriptors, _answer_once),
        Scenario("events-of-an-orderly-end", _watch_an_orderly_end, _end_in_order),
        Scenario("events-of-a-reset", _watch_a_reset, _reset_when_asked),
        Scenario("events-of-a-reset-by-the-client", _reset_when_asked, _watch_a_reset),
    )
}


def bytes_of(seen: Seen) -> int:
    """How many bytes were received and digested."""
    return sum(value[0] for what, value in seen.items() if what.endswith("received") and isinstance(value, tuple))
