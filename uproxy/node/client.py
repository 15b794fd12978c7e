"""Talks to the node agent over its Unix socket: registers workloads for capture. Needs no eBPF library.

One SOCK_SEQPACKET message each way, msgpack maps: {op, ...} with descriptors as SCM_RIGHTS; then {ok: True, ...} or
{ok: False, error}.
"""

from __future__ import annotations

import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import msgpack

MAX_MESSAGE: Final = 131072  # bytes; a status with the 500 workloads that it lists has less
DEFAULT_SOCKET: Final = Path("/run/uproxy/node.sock")

PROBE_V4: Final = ("240.240.255.255", 15021)
"""Captured in every workload, always: a uProxy that connects a socket of the app cgroup to it, and then accepts that
connection itself, has proved capture. The same as in bpf/mesh.h."""
PROBE_V6: Final = ("fd75:5072:6f78::ffff", 15021)


class NodeError(Exception):
    """The agent cannot be reached, or refused; the text says why and what to do."""


class NodeClient:
    """A connection per call: nothing to keep alive, and the agent may restart in between."""

    def __init__(self, path: str | Path = DEFAULT_SOCKET, *, timeout_s: float = 10.0) -> None:
        self._path = str(path)
        self._timeout_s = timeout_s

    def register(
        self,
        workload: str,
        *,
        namespace: str,
        service_account: str,
        addresses: Sequence[str],
        app_cgroup: int,
        proxy_cgroup: int,
        netns: int,
        dns: bool = False,
        probe_ports: Sequence[int] = (),
    ) -> None:
        """Puts capture on a workload: all of it, or NodeError and nothing.

        `workload` is unique on the node. `app_cgroup`, `proxy_cgroup` and `netns` are descriptors: of the two cgroup
        directories and of the network namespace. `dns`: its name queries go to its uProxy, which must answer them.
        `probe_ports`: those that health probes may dial. To be called before the first process is in the app cgroup:
        sockets made earlier would not be captured, and the agent refuses. Calling again with the same arguments does
        nothing.
        """
        self._call(
            {
                "op": "register",
                "workload": workload,
                "namespace": namespace,
                "service_account": service_account,
                "address": list(addresses),
                "dns": dns,
                "probe_port": list(probe_ports),
            },
            [app_cgroup, proxy_cgroup, netns],
        )

    def unregister(self, workload: str) -> None:
        """Takes capture off again. An unknown workload is nothing to do.

        Refused while the app cgroup has processes: they would be in the open.
        """
        self._call({"op": "unregister", "workload": workload})

    def status(self) -> dict[str, Any]:
        """What the agent enforces.

        `whole`, `generation`, `services` and `addresses` (how many), `ranges`, `egress`, `counters`, `pending`
        (connections between SYN and accept), `workloads`, and `error`: what is wrong, or empty.
        """
        return self._call({"op": "status"})

    def _call(self, request: dict[str, Any], descriptors: Sequence[int] = ()) -> dict[str, Any]:
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
            sock.settimeout(self._timeout_s)
            try:
                sock.connect(self._path)
                socket.send_fds(sock, [msgpack.packb(request)], list(descriptors))
                answer = sock.recv(MAX_MESSAGE)
            except TimeoutError:
                raise NodeError(f"{self._path}: the node agent did not answer within {self._timeout_s:g} s") from None
            except OSError as error:
                raise NodeError(f"{self._path}: {error.strerror}; is `uproxy node` running?") from None
        if not answer:
            raise NodeError(f"{self._path}: the node agent closed the connection; its log says why")
        reply: dict[str, Any] = msgpack.unpackb(answer)
        if not reply.pop("ok"):
            raise NodeError(reply["error"])
        return reply
