"""The way in for plaintext, where a PeerAuthentication is PERMISSIVE: what the kernel is told, and who gets it.

eBPF gives the uProxy's listener on 15006 what is dialled from outside at ports that take plaintext, and drops the rest
at the SYN. The kernel is always told first: a port that is open in the one place alone is closed.
"""

from __future__ import annotations

import contextlib
import logging
import socket
import struct
from typing import Final

from control.api.plaintext import MAX_PORTS, Plaintext
from uproxy.listener import Inherited, Listeners, Serve
from uproxy.plane import Plane

PLAINTEXT_PORT: Final = 15006

# A socket option that an eBPF hook on our cgroup answers, and struct mesh_plaintext: others, count, ports
# (bpf/mesh.h; tests compare it).
SOL_MESH: Final = 0x75505859
SO_PLAINTEXT: Final = 1
PLAINTEXT: Final = struct.Struct(f"=HH{MAX_PORTS}H")

_CLOSED: Final = Plaintext(False, ())

log = logging.getLogger(__name__)


class Door:
    """Opens and closes it, as the configuration says."""

    def __init__(self, data_plane: Plane, serve: Serve, inherited: Inherited | None = None) -> None:
        """`inherited`: as for `Listeners`."""
        self._plane = data_plane
        self._serve = serve
        self._inherited = inherited
        self.listeners: Listeners | None = None
        """None while nobody listens."""
        self.is_open: Plaintext | None = None
        """What takes plaintext now; None: no port does."""
        self._complained = ""

    def set(self, wanted: Plaintext | None) -> None:
        """Take plaintext at these ports from now on; None: at none. Said again when nothing has changed, it mends what
        a new node agent has not heard. What cannot be opened stays closed.
        """
        if wanted is None:
            if self.is_open is not None:
                log.info("no port takes plaintext any more")
                with contextlib.suppress(OSError):  # nobody listens, which is enough
                    tell(_CLOSED)
            self.close()
            return
        try:
            tell(wanted)
            if self.listeners is None:
                self.listeners = Listeners(self._plane, self._inherited)
                self._listen(self.listeners)
        except OSError as error:
            self.close()
            problem = f"no port takes plaintext, though a PeerAuthentication says so: {error}"
            if problem != self._complained:
                log.error("%s", problem)
            self._complained = problem
            return
        if wanted != self.is_open:
            ports = ", ".join(map(str, wanted.ports))
            log.info(
                "these ports take plaintext: %s", f"all but {ports}" if wanted.others and ports else ports or "all"
            )
        self.is_open, self._complained = wanted, ""

    def close(self) -> None:
        """Listen no more; what the kernel was told stays, since a successor of this process may have said it too."""
        self.is_open = None
        if self.listeners is not None:
            self.listeners.close()
            self.listeners = None

    def _listen(self, listeners: Listeners) -> None:
        # At loopback, where nobody from outside gets by himself.
        listeners.listen("127.0.0.1", PLAINTEXT_PORT, self._serve)
        try:
            listeners.listen("::1", PLAINTEXT_PORT, self._serve)
        except OSError as error:
            log.info("no plaintext over IPv6: %s", error)


def tell(plaintext: Plaintext) -> None:
    """Tell the kernel which ports of this network namespace take plaintext. Raises OSError."""
    ports = (*plaintext.ports, *(0,) * (MAX_PORTS - len(plaintext.ports)))
    with socket.socket() as any_socket:
        try:
            any_socket.setsockopt(
                SOL_MESH, SO_PLAINTEXT, PLAINTEXT.pack(plaintext.others, len(plaintext.ports), *ports)
            )
        except OSError as error:
            raise OSError(
                error.errno,
                f"the kernel does not take the ports ({error.strerror}): that needs --capture ebpf and a "
                "node agent of this version",
            ) from error
