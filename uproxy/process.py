"""The life of a proxy's process, whichever proxy it is: hardened, listening to operators, ready, draining, gone."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import ipaddress
import json
import logging
import os
import resource
import socket
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final, Protocol

import uproxy
from control.client.files import ConfigError
from control.client.membership import Membership
from control.client.state import State
from uproxy import admin, linux
from uproxy.access_log import AccessLog, Style
from uproxy.config import Collector, Who
from uproxy.credentials import CurrentCredentials
from uproxy.handover import HandoverError, Hello, Predecessor
from uproxy.joining import JoinError
from uproxy.listener import Inherited
from uproxy.telemetry import Listing, Telemetry
from uproxy.tls import CredentialsError

if TYPE_CHECKING:
    from uproxy.member import Member
    from uproxy.otlp import Dial, Exporter

METRICS_PORT: Final = 15020
READY_PORT: Final = 15021
FAREWELL_S: Final = 0.5
"""Beyond the drain time, for tunnels to be closed by both ends."""
TICK_S: Final = 5.0
"""Between two looks at what has become old."""
WATCH_S: Final = 1.0
"""Between two looks at the files of a configuration."""


class StartError(Exception):
    """The proxy cannot start; the text says why and what to do."""


class Proxy(Protocol):
    """What `live` runs."""

    stopping: asyncio.Event
    """Set when the process was told to end."""

    async def start(self, group: asyncio.TaskGroup) -> None:
        """Return when it is ready, or when it was told to stop before. Raises StartError, ConfigError or
        CredentialsError, and so may the tasks that it adds to the group.
        """

    async def drain(self) -> None: ...

    def close(self) -> None: ...


class _Drained(Exception):
    """Ends the task group: the proxy has drained."""


async def live(proxy: Proxy) -> int:
    """A proxy from its start to its end: the exit status. Raises StartError, ConfigError or CredentialsError."""
    failed: Exception | None = None
    try:
        async with asyncio.TaskGroup() as group:
            await proxy.start(group)
            # What is here now stays. Looking at all of it again would hold up everybody for some 15 ms, now and then.
            gc.collect()
            gc.freeze()
            await proxy.stopping.wait()
            await proxy.drain()
            raise _Drained
    except* _Drained:
        pass
    except* (StartError, ConfigError, CredentialsError) as failures:
        failed = failures.exceptions[0]
    finally:
        proxy.close()
    if failed is not None:
        raise failed
    return 0


def log_to_stderr() -> None:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s", stream=sys.stderr)


def harden() -> None:
    """No core dump and no ptrace, which would show the key; as many descriptors as the system gives."""
    linux.forbid_dumps()
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def who_joined(membership: Membership) -> Who:
    """The workload that has joined. Raises JoinError for a node agent."""
    if not membership.addresses:
        raise JoinError(f"{membership.key} joined without an address, as node agents do: create a token that has one")
    return Who(membership.workload, membership.identity, membership.addresses)


def open_log(target: str, as_json: bool, loop: asyncio.AbstractEventLoop) -> AccessLog | None:
    """The access log that the command line asks for; None when it is off."""
    return None if target == "off" else AccessLog(target, Style.JSON if as_json else Style.TEXT, loop)


def record_spans(collector: Collector, dial: Dial, telemetry: Telemetry, service: Callable[[], str]) -> Exporter:
    """Have connections recorded for a collector; somebody runs what is returned. `service`: its `service.name`."""
    # Imported here: most proxies record nothing.
    from uproxy.otlp import Exporter

    exporter = Exporter(dial, collector.authority, collector.share, service, uproxy.__version__)
    telemetry.spans = exporter
    telemetry.counter("uproxy_spans_sent_total", "Spans that the collector took", lambda: exporter.sent)
    telemetry.counter(
        "uproxy_spans_dropped_total", "Spans lost because the collector was slow or refused", lambda: exporter.dropped
    )
    return exporter


async def predecessor(directory: Path, hello: Hello) -> Predecessor | None:
    """The one to take over from; None when none runs with this identity directory. Raises StartError."""
    try:
        return await Predecessor.find(directory, hello)
    except HandoverError as error:
        raise StartError(f"the one that runs does not let this one take over: {error}") from None


async def listen_to_operators(
    hosts: Sequence[str],
    admin_port: int,
    admin_routes: Mapping[str, admin.Handler],
    metrics: Callable[[], bytes | asyncio.Future[bytes]],
    pending: Callable[[], list[str]],
    inherited: Inherited | None = None,
) -> list[admin.Pages]:
    """Metrics and readiness at each of `hosts`; admin on loopback, at the first when it is one. Raises StartError.

    `inherited`: as for `Listeners`.
    """
    operator = hosts[0] if ipaddress.ip_address(hosts[0]).is_loopback else "127.0.0.1"
    servers: list[admin.Pages] = []
    for address, port, routes in (
        (operator, admin_port, admin_routes),
        *((host, METRICS_PORT, admin.metrics_routes(metrics)) for host in hosts),
        *((host, READY_PORT, admin.ready_routes(pending)) for host in hosts),
    ):
        try:
            listening = inherited.take(socket.SOCK_STREAM, address, port) if inherited is not None else None
            servers.append(await admin.serve(address, port, routes, listening))
        except OSError as error:
            for server in servers:
                server.close()
            hint = ": another proxy may run here; see --admin-port" if port == admin_port else ""
            raise StartError(f"cannot listen on {address}:{port}: {error.strerror or error}{hint}") from error
    return servers


def pending_of(pending: set[str], member: Member | None) -> list[str]:
    """What a proxy is not ready for yet; of a member's configuration, what has not come."""
    missing = member.replica.waiting() if member is not None and "config" in pending else ()
    return [*pending, *(f"config: {text}" for text in missing)]


def listed(who: Who, live: Listing) -> bytes:
    """The connections of a proxy for `/connections`, as JSON."""
    whose = f'"workload":{json.dumps(who.key)},"identity":{json.dumps(str(who.identity))}'
    lines = ",".join(live.lines)  # each ends its line
    return f'{{{whose},"total":{live.total},"connections":[\n{lines}]}}\n'.encode("ascii")


def report_ready(who: Who, ready_fd: int | None, log: logging.Logger) -> None:
    """Tells people, whoever has started the process, and a service manager: that may know another process as this."""
    log.info("%s is ready as %s", who.key, who.identity)
    if ready_fd is not None:
        with contextlib.suppress(OSError):
            os.write(ready_fd, b"ready\n")
        os.close(ready_fd)
    manager = os.environ.get("NOTIFY_SOCKET")  # sd_notify(3)
    if manager:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock, contextlib.suppress(OSError):
            sock.sendto(
                f"READY=1\nMAINPID={os.getpid()}".encode(), "\0" + manager[1:] if manager.startswith("@") else manager
            )


def register_gauges(telemetry: Telemetry, credentials: CurrentCredentials, state: State) -> None:
    """Of certificate and configuration."""
    telemetry.gauge(
        "uproxy_certificate_expiry_timestamp_seconds",
        "When this workload's certificate expires, Unix time",
        lambda: credentials.value.not_after,
    )
    telemetry.gauge("uproxy_config_generation", "Configurations applied since the start", lambda: state.generation)


def register_member_gauges(telemetry: Telemetry, member: Member, whole: Callable[[], bool]) -> None:
    """Of the control plane. `whole`: whether everything that is subscribed to is in force."""
    telemetry.gauge(
        "uproxy_config_whole", "Whether everything that is subscribed to has come: 0 or 1", lambda: int(whole())
    )
    telemetry.gauge(
        "uproxy_config_age_seconds",
        "Since the control plane last said that the configuration is current",
        lambda: member.age_s,
    )
    telemetry.gauge("uproxy_control_connected", "Whether a broker is connected: 0 or 1", lambda: int(member.connected))
