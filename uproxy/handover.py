"""How a new proxy takes over from the one that runs, without a connection refused or cut (docs/upgrades.md).

The one that runs listens on a SOCK_SEQPACKET socket in its identity directory; msgpack maps, with descriptors. The
first word of whoever connects says "secret", too: what a file beside the socket says. A process may reach the socket
that cannot read the directory (Landlock lets connect(2) pass): what stands beside a workload, or a filter.

    new  {"handover": 1, "version", "workload", "addresses", "capture"}
    old  {"welcome": version}                    what it knows is on disk
    new  {"ask": "sockets"}                      it is configured
    old  {"sockets": n, "more"} + n descriptors  it accepts no more; what comes waits in the kernel
    new  {"ask": "rest"}                         it accepts, and has proved capture
    old  {"direct": {…}}, {"connection": {…}} + 2 descriptors, any number of each, then {"done": true}
    new  {"ask": "leave"}                        it is ready
    old  {"left": true}                          it drains

An operator asks it for less, and waits for its successor:

    {"ask": "upgrade"}                           somebody start one
    old  {"pid": n}                              it has taken over

Until it is asked to leave, the old one goes on as before when the new one is gone, or slow. Instead of any answer it
may send {"refused": why}, and to a first word {"again": true}: another one has just taken over, who is to be asked.
Whoever hangs up without a word has died.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
import secrets
import select
import socket
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NoReturn, Protocol

import msgpack

from uproxy import linux

SOCKET_NAME: Final = "handover.sock"
SECRET_NAME: Final = "handover.secret"
PROTOCOL: Final = 1
HELLO_S: Final = 5.0
"""For a place in the old one's line, and for each of its answers."""
FIRST_WORD_S: Final = 1.0
"""For who has connected to say what is wanted, and show the secret."""
STRANGERS: Final = 16
"""Who may do so at the same time, and as many wait in line."""
CONFIGURED_S: Final = 60.0
"""For the new one to read its configuration."""
UPGRADE_S: Final = 90.0
"""For a successor that is started here, from its start to its readiness: above all that it is granted below."""
PATIENCE_S: Final = 15.0
"""From the first socket handed over until the old one leaves, or takes its place back: what comes waits so long."""
MAX_MESSAGE: Final = 192 << 10
"""Two reads of a connection that wait (plain_relay.READ_BYTES), and what is said of it."""
SOCKETS_AT_ONCE: Final = 64

_SEND_BUFFER: Final = 2 * MAX_MESSAGE
_PAUSE_S: Final = 1.0
_LINE_S: Final = 0.02  # between two looks whether there is a place in line

Message = Mapping[str, Any]

log = logging.getLogger(__name__)


class HandoverError(Exception):
    """The other one refuses, or is none of ours; the text says why."""


class GoneError(Exception):
    """The other one hung up without a word."""


@dataclass(frozen=True, slots=True)
class Hello:
    """Who wants to take over; all but `version` must be as it is at the one that runs."""

    version: str
    workload: str
    addresses: tuple[str, ...]
    capture: str
    """Of a uProxy; a waypoint says `waypoint`."""

    def pack(self) -> Message:
        return {
            "handover": PROTOCOL,
            "version": self.version,
            "workload": self.workload,
            "addresses": list(self.addresses),
            "capture": self.capture,
        }

    def wrong(self, said: Message) -> str:
        """Why whoever says this cannot take over from us; empty when it can."""
        if said.get("handover") != PROTOCOL:
            return f"it speaks hand-over protocol {said.get('handover')!r}, this one {PROTOCOL}: restart instead"
        ours = self.pack()
        for name in ("workload", "addresses", "capture"):
            if said.get(name) != ours[name]:
                return f"its {name} is {said.get(name)!r}, this one's {ours[name]!r}: restart instead"
        return ""


# -- the line between the two


class Line:
    """One end. Every wait raises TimeoutError when it is over."""

    def __init__(self, sock: socket.socket, owner: int = 0) -> None:
        """`owner`: who else may be at the other end. Raises HandoverError when that is neither this user nor root."""
        sock.setblocking(False)
        uid = linux.peer_uid(sock)
        if uid not in (os.geteuid(), 0, owner):
            why = f"uid {uid} may not: only its own user and root hand over"
            with sock, contextlib.suppress(OSError):
                sock.send(msgpack.packb({"refused": why}))
            raise HandoverError(why)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER)
        self._sock = sock

    def close(self) -> None:
        self._sock.close()

    def is_cut(self) -> bool:
        """Whether the other one has hung up, also if what it said last is still here to be received."""
        poll = select.poll()
        poll.register(self._sock, 0)
        return bool(poll.poll(0))

    async def send(self, message: Message, descriptors: Sequence[int] = ()) -> None:
        await self.offer(lambda: (message, descriptors))

    async def offer(self, make: Callable[[], tuple[Message, Sequence[int]]]) -> bool:
        """Send what `make` gives in the very moment in which it can be sent. Whether it was."""
        loop = asyncio.get_running_loop()
        while True:
            message, descriptors = make()
            try:
                socket.send_fds(self._sock, [msgpack.packb(message)], descriptors)
                return True
            except BlockingIOError:
                await _ready(self._sock, loop.add_writer, loop.remove_writer)
            except ConnectionError:
                return False  # it is gone, but what it said last may still be here to be received

    async def receive(self, *, most: int = 0) -> tuple[dict[str, Any], list[int]]:
        """A message, with `most` descriptors at most, which are the caller's. Raises GoneError and HandoverError."""
        raw, descriptors, flags = await self._received(most)
        try:
            if not raw:
                raise GoneError
            message = msgpack.unpackb(raw)
            if flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC) or not isinstance(message, dict):
                raise HandoverError("a message is too large, or no map")
            if "refused" in message:
                raise HandoverError(str(message["refused"]))
        except (ValueError, msgpack.UnpackException) as error:
            _close_all(descriptors)
            raise HandoverError(f"a message is not msgpack: {error}") from None
        except BaseException:
            _close_all(descriptors)
            raise
        return message, descriptors

    async def _received(self, most: int) -> tuple[bytes, list[int], int]:
        loop = asyncio.get_running_loop()
        while True:
            try:
                return socket.recv_fds(self._sock, MAX_MESSAGE, most, socket.MSG_CMSG_CLOEXEC)[:3]
            except BlockingIOError:
                await _ready(self._sock, loop.add_reader, loop.remove_reader)
            except ConnectionResetError:
                continue  # told once, ahead of what it said last


async def _ready(
    sock: socket.socket,
    watch: Callable[[socket.socket, Callable[[], object]], None],
    unwatch: Callable[[socket.socket], object],
) -> None:
    ready = asyncio.Event()
    watch(sock, ready.set)
    try:
        await ready.wait()
    finally:
        unwatch(sock)


def _close_all(descriptors: Iterable[int]) -> None:
    for descriptor in descriptors:
        os.close(descriptor)


# -- the new one


@dataclass(frozen=True, slots=True)
class Rest:
    """What the old one had beside its listening sockets."""

    direct: tuple[Message, ...]
    connections: tuple[tuple[Message, socket.socket, socket.socket], ...]
    """What is said of each, its peer's socket and its application's."""


class Predecessor:
    """The one that runs, as its successor sees it. One that dies meanwhile counts as having given all it could."""

    def __init__(self, line: Line, version: str) -> None:
        self._line = line
        self.version = version

    @classmethod
    async def find(cls, directory: Path, hello: Hello) -> Predecessor | None:
        """The one that runs with this identity directory; None when none does. Raises HandoverError when it refuses."""
        try:
            async with asyncio.timeout(HELLO_S):
                answered = await _answered(directory, hello.pack())
        except GoneError:
            return None
        except TimeoutError:
            raise HandoverError(f"it does not answer within {HELLO_S:g} s") from None
        if answered is None:
            return None
        line, said = answered
        return cls(line, str(said.get("welcome", "")))

    async def sockets(self) -> list[socket.socket]:
        """All that it listens on. It accepts no more from here on. Raises HandoverError."""
        taken: list[socket.socket] = []
        try:
            with _told_in_time():
                async with asyncio.timeout(HELLO_S):
                    await self._line.send({"ask": "sockets"})
                    more = True
                    while more:
                        said, descriptors = await self._line.receive(most=SOCKETS_AT_ONCE)
                        taken += [socket.socket(fileno=descriptor) for descriptor in descriptors]
                        more = bool(said.get("more"))
        except BaseException:
            for one in taken:
                one.close()
            raise
        return taken

    async def rest(self) -> Rest:
        """What else it can give away. Raises HandoverError."""
        direct: list[Message] = []
        connections: list[tuple[Message, socket.socket, socket.socket]] = []
        with _told_in_time():
            async with asyncio.timeout(PATIENCE_S):
                await self._line.send({"ask": "rest"})
                while True:
                    said, descriptors = await self._line.receive(most=2)
                    if "direct" in said:
                        direct.append(said["direct"])
                    if "connection" in said and len(descriptors) == 2:
                        peer, app = (socket.socket(fileno=descriptor) for descriptor in descriptors)
                        connections.append((said["connection"], peer, app))
                    else:
                        _close_all(descriptors)
                    if said.get("done"):
                        break
        return Rest(tuple(direct), tuple(connections))

    async def leave(self) -> None:
        """Let it drain. Raises HandoverError when it has taken its place back."""
        with _told_in_time():
            async with asyncio.timeout(HELLO_S):
                await self._line.send({"ask": "leave"})
                await self._line.receive()

    def close(self) -> None:
        self._line.close()


@contextlib.contextmanager
def _told_in_time() -> Iterator[None]:
    """Raises HandoverError for one that does not answer; one that has died has no more to say."""
    try:
        yield
    except GoneError:
        log.warning("the one to take over from is gone")
    except TimeoutError:
        raise HandoverError("it does not answer in time") from None


async def ask_for_upgrade(directory: Path) -> int:
    """Have the one that runs with this identity directory start its successor; its pid. Raises HandoverError."""
    try:
        async with asyncio.timeout(UPGRADE_S + HELLO_S):
            answered = await _answered(directory, {"ask": "upgrade"})
        if answered is None:
            raise HandoverError(f"nobody runs with {directory}")
        line, said = answered
        line.close()
        return int(said["pid"])
    except (GoneError, TimeoutError, KeyError, ValueError):
        raise HandoverError("it does not say what has become of it: see its log") from None


def serves(directory: Path) -> bool:
    """Whether somebody who runs with this identity directory is ready, and no successor is. Raises OSError."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC) as sock:
        sock.setblocking(False)
        try:
            _connected(sock, directory)  # or others wait in line
        except (FileNotFoundError, ConnectionRefusedError):
            return False
        return True


async def _answered(directory: Path, first: Message) -> tuple[Line, Message] | None:
    """What the one that runs answers to a first word; None when none runs. Raises HandoverError and GoneError."""
    while True:
        line = await _dialled(directory)
        if line is None:
            return None
        try:
            await line.send({**first, "secret": _secret(directory)})
            said, _ = await line.receive()
        except BaseException:
            line.close()
            raise
        if "again" not in said:
            return line, said
        line.close()


async def _dialled(directory: Path) -> Line | None:
    """A line to the one that runs, as soon as there is a place; None when none does. Raises HandoverError."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
    try:
        owner = os.stat(directory).st_uid
        while not _connected(sock, directory):  # noqa: ASYNC110 - others wait in line
            await asyncio.sleep(_LINE_S)
    except (FileNotFoundError, ConnectionRefusedError):
        sock.close()
        return None
    except OSError as error:
        sock.close()
        raise HandoverError(f"{directory / SOCKET_NAME}: {error.strerror}") from None
    except BaseException:
        sock.close()
        raise
    # Root asks for the upgrade of a process that has a directory and a uid of its own.
    return Line(sock, owner)


def _connected(sock: socket.socket, directory: Path) -> bool:
    """False: there is no place in line. Raises OSError."""
    with linux.short_path(directory, SOCKET_NAME) as path:
        try:
            sock.connect(path)
        except BlockingIOError:
            return False
    return True


# -- the old one


class Movable(Protocol):
    """A connection that another process can go on with."""

    def describe(self) -> tuple[Message, Sequence[int]] | None:
        """How it stands, with the descriptors of its peer's socket and its application's; None: it has ended."""

    def let_go(self) -> None:
        """It is the other one's now."""


class Giver(Protocol):
    """What a proxy does when another one takes over."""

    async def prepare(self) -> None:
        """Have what it knows on disk."""

    def pause(self) -> list[int]:
        """Accept no more where only one of the two may. Returns the descriptors of all that it listens on, of which it
        closes none yet.
        """

    def resume(self) -> None:
        """It has its place back."""

    def direct(self) -> list[Message]:
        """What it has said of the direct path."""

    def connections(self) -> Sequence[Movable]:
        """Those in plaintext."""

    def leave(self) -> None:
        """Drain."""

    async def upgrade(self) -> int:
        """Start a successor, and return its pid when it has taken over. Raises HandoverError when it has not."""


def listen(directory: Path, inherited: socket.socket | None = None) -> socket.socket | None:
    """Where a successor finds us; None, and a line in the log, where none can. A dead process's socket is replaced.

    `inherited`: where one found our predecessor, if that handed it over; it had no secret if it was an older version.
    """
    if inherited is not None:
        inherited.listen(STRANGERS)  # an older version's line is shorter
        try:
            if not _secret(directory):
                _make_secret(directory)
        except OSError as error:
            log.warning("nobody can take over from this one: %s: %s", directory / SECRET_NAME, error.strerror)
        return inherited
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
    try:
        with linux.short_path(directory, SOCKET_NAME) as path:
            with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as probe:
                probe.setblocking(False)
                if probe.connect_ex(path) in (0, errno.EAGAIN):
                    raise OSError(0, "another one runs with this identity directory")
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)
            linux.bind_file(sock, path)
        _make_secret(directory)
        sock.listen(STRANGERS)
        return sock
    except OSError as error:
        sock.close()
        log.warning("nobody can take over from this one: %s: %s", directory / SOCKET_NAME, error.strerror)
        return None


def remove(directory: Path) -> None:
    """The one that ends without a successor takes its socket away."""
    for name in (SOCKET_NAME, SECRET_NAME):
        with contextlib.suppress(OSError):
            (directory / name).unlink()


def _secret(directory: Path) -> str:
    """Empty: there is none, or it is not ours to read."""
    try:
        return (directory / SECRET_NAME).read_text("ascii")
    except (OSError, ValueError):
        return ""


def _make_secret(directory: Path) -> None:
    """Raises OSError."""
    path = directory / SECRET_NAME
    path.unlink(missing_ok=True)
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600), "w", encoding="ascii") as file:
        file.write(secrets.token_hex(32))


async def serve(listener: socket.socket, directory: Path, own: Hello, giver: Giver) -> None:
    """Until somebody has taken over. `directory`: as of `listen`."""
    listener.setblocking(False)
    async with asyncio.TaskGroup() as group:
        await _Reception(listener, directory, own, giver, group).over.wait()


class _Reception:
    """Whoever connects is listened to, some at a time; one of them at a time takes over."""

    def __init__(
        self, listener: socket.socket, directory: Path, own: Hello, giver: Giver, group: asyncio.TaskGroup
    ) -> None:
        self._listener = listener
        self._directory = directory
        self._own = own
        self._giver = giver
        self._group = group
        self._places = asyncio.Semaphore(STRANGERS)
        self._turn = asyncio.Lock()
        self.over = asyncio.Event()
        """Somebody has taken over."""
        self._accepting = group.create_task(self._accept())

    async def _accept(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await self._places.acquire()
            try:
                # Whoever is accepted is served, also when this is cancelled: with loop.sock_accept he might be lost.
                sock = self._listener.accept()[0]
            except BlockingIOError:
                self._places.release()
                await _ready(self._listener, loop.add_reader, loop.remove_reader)
            except OSError as error:  # no descriptor is left
                self._places.release()
                log.warning("nobody takes over: %s", error)
                await asyncio.sleep(_PAUSE_S)
            else:
                self._group.create_task(self._receive(sock))

    async def _receive(self, sock: socket.socket) -> None:
        """Raises nothing."""
        try:
            try:
                line = Line(sock)
                said = await _first_word(line, self._directory)
            finally:
                self._places.release()
            if said is None:
                return  # who wanted to know whether anybody is here (`serves`)
            async with self._turn:
                if self.over.is_set():
                    await _say_last(line, {"again": True})
                    return
                if said.get("ask") != "upgrade":
                    if await _converse(line, said, self._own, self._giver):
                        await self._end()
                    return
            await _upgrade(line, self._giver)
        except HandoverError as error:
            log.warning("nobody takes over: %s", error)
        except Exception:
            log.exception("a hand-over failed as none should; this one goes on")

    async def _end(self) -> None:
        """The successor's alone from now on: should it die, this one must not seem to be in its place."""
        self._accepting.cancel()
        await asyncio.wait([self._accepting])
        self._listener.close()
        self.over.set()


async def _first_word(line: Line, directory: Path) -> Message | None:
    """Of one that shows the secret. None: the other one hung up; the line is closed then. Raises HandoverError, after
    which it is closed too.
    """
    try:
        async with asyncio.timeout(FIRST_WORD_S):
            said, _ = await line.receive()
    except GoneError:
        line.close()
        return None
    except TimeoutError:
        await _refuse(line, f"it says nothing for {FIRST_WORD_S:g} s")
    except BaseException:
        line.close()
        raise
    shown, ours = said.get("secret"), _secret(directory)
    if not (ours and isinstance(shown, str) and secrets.compare_digest(shown.encode(), ours.encode())):
        why = f"it does not show what {directory / SECRET_NAME} says, as older versions do not: restart instead"
        await _refuse(line, why)
    return said


async def _refuse(line: Line, why: str) -> NoReturn:
    """Raises HandoverError, after which the line is closed."""
    await _say_last(line, {"refused": why})
    raise HandoverError(why)


async def _say_last(line: Line, message: Message) -> None:
    """And close the line, heard or not."""
    try:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(FIRST_WORD_S):
                await line.send(message)
    finally:
        line.close()


async def _upgrade(line: Line, giver: Giver) -> None:
    """What an operator asks for. Raises nothing."""
    try:
        try:
            answer: Message = {"pid": await giver.upgrade()}
        except HandoverError as error:
            answer = {"refused": str(error)}
        async with asyncio.timeout(HELLO_S):
            await line.send(answer)
    except (OSError, TimeoutError) as error:
        log.warning("whoever asked for an upgrade is not told of it: %s", error)
    finally:
        line.close()


async def _converse(line: Line, said: Message, own: Hello, giver: Giver) -> bool:
    """Whether it has taken over; `said` was its first word. Raises HandoverError."""
    paused = False
    try:
        async with asyncio.timeout(HELLO_S):
            if wrong := own.wrong(said):
                await line.send({"refused": wrong})
                raise HandoverError(wrong)
            await giver.prepare()
            await line.send({"welcome": own.version})
        async with asyncio.timeout(CONFIGURED_S):
            await _asked(line, "sockets")
        async with asyncio.timeout(PATIENCE_S):
            paused = True
            listening = giver.pause()
            log.info("version %s takes over from this one, %s", said.get("version"), own.version)
            for at in range(0, len(listening), SOCKETS_AT_ONCE):
                some = listening[at : at + SOCKETS_AT_ONCE]
                await line.send({"sockets": len(some), "more": at + len(some) < len(listening)}, some)
            await _asked(line, "rest")
            await _give_rest(line, giver)
            await _asked(line, "leave")
            if line.is_cut():  # it has waited for too long, and ended
                raise GoneError
            paused = False
            giver.leave()
            await line.send({"left": True})
        return True
    except GoneError:
        raise HandoverError("the other one is gone; this one goes on") from None
    except TimeoutError:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(HELLO_S):
                await line.send({"refused": "it took too long"})
        raise HandoverError("the other one takes too long; this one goes on") from None
    except OSError as error:
        raise HandoverError(f"{error}; this one goes on") from None
    finally:
        line.close()
        if paused:
            giver.resume()


async def _asked(line: Line, what: str) -> None:
    said, _ = await line.receive()
    if said.get("ask") != what:
        raise HandoverError(f"{what!r} is what may be asked for now, not {said.get('ask')!r}")


async def _give_rest(line: Line, giver: Giver) -> None:
    for said in giver.direct():
        await line.send({"direct": said})
    for connection in giver.connections():
        await _give(line, connection)
    await line.send({"done": True})


async def _give(line: Line, connection: Movable) -> None:
    """As it stands in the moment in which it is sent."""
    described: tuple[Message, Sequence[int]] | None = None

    def make() -> tuple[Message, Sequence[int]]:
        nonlocal described
        described = connection.describe()
        return ({}, ()) if described is None else ({"connection": described[0]}, described[1])

    if await line.offer(make) and described is not None:
        connection.let_go()
