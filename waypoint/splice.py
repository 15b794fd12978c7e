"""Opaque TCP through a waypoint: two streams joined, bytes and ends as they are."""

from __future__ import annotations

from uproxy.errors import Flag, RefusedError
from uproxy.plane import Plane, Waiter
from uproxy.relay import CLEAN, Outcome
from waypoint.byte_stream import ByteStream


class Splice:
    """The caller's stream and the backend's. `done` is settled once, when both directions are over.

    `sent` and `received` count from the backend's point of view, as a uProxy's does from its workload's.
    """

    def __init__(self, data_plane: Plane, caller: ByteStream, backend: ByteStream) -> None:
        self.done: Waiter[Outcome] = Waiter(data_plane)
        self.active = False
        self.sent = 0
        self.received = 0
        self._caller = caller
        self._backend = backend
        self._open = 2  # directions
        data_plane.spawn(self._copy(caller, backend))
        data_plane.spawn(self._copy(backend, caller))

    @property
    def half_closed(self) -> bool:
        return self._open == 1

    def cut(self, text: str) -> None:
        self._caller.abort(text)
        self._backend.abort(text)
        self.done.set(Outcome(Flag.RESET, text))

    async def _copy(self, source: ByteStream, target: ByteStream) -> None:
        try:
            # Without a timeout: silence is no fault of TCP, and `Connections.tick` ends what is half-closed and silent.
            while data := await source.receive(None):
                await target.send(data, None)
                if target.gone:
                    break  # it reads no more, and whoever sends without an end would send for ever
                self.active = True
                if source is self._caller:
                    self.received += len(data)
                else:
                    self.sent += len(data)
        except (OSError, RefusedError) as error:  # RefusedError: this proxy shuts down
            self.cut(str(error))
            return
        target.end()
        self._open -= 1
        if not self._open:
            self._caller.close()
            self._backend.close()
            self.done.set(CLEAN)
