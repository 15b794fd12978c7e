"""What is the same in every placement: who calls whom, the routes, the policy, and the application."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from benchmarks.lab.sources import TRUST_DOMAIN
from benchmarks.lab.topology import App
from control.api.identity import SpiffeId

INSTANCES = 2
"""Of every service account, on a host of its own."""
NEAR = INSTANCES + 1
"""Number of each caller's third instance, on the host of the called services."""
SERVICE_PORT = 80
HTTP_PORT, L4_PORT = 8080, 8081
"""Of the application: the second is served alike and needs no L7."""
NUMBER = "number"
"""Label of an instance: which one of its service account it is."""
DENIED = "/admin"
"""Nobody may ask for what begins with it."""
LIMITED = "/limited"
"""Of what begins with it each process lets LIMIT_PER_S requests a second through."""
LIMIT_PER_S = 200
BUSY = "/busy"
"""Of what begins with it a filter of the service's owner burns BUSY_MS of processor time a request."""
BUSY_MS = 20


@dataclass(frozen=True, slots=True)
class Service:
    """What `caller` may call, and the other service account may not. Its instances run as the account `name`."""

    name: str
    caller: str
    address: str
    """The virtual one, where the port SERVICE_PORT is HTTP."""
    l4_address: str
    """The virtual one of the same workloads' L4_PORT."""


SERVICES = (
    Service("reviews", "web", "240.240.0.40", "240.240.0.50"),
    Service("ratings", "cart", "240.240.0.41", "240.240.0.51"),
)


CALLERS = frozenset(one.caller for one in SERVICES)
"""Service accounts."""


@dataclass(frozen=True, slots=True)
class Member:
    """A workload in one placement; `number` counts an account's instances from 1."""

    account: str
    number: int
    address: str

    @property
    def name(self) -> str:
        return member_name(self.account, self.number)

    @property
    def version(self) -> str:
        return version(self.number)

    @property
    def calls(self) -> bool:
        """Else it is called."""
        return self.account in CALLERS

    @property
    def near(self) -> bool:
        """A caller on the host of what it calls."""
        return self.calls and self.number == NEAR


def member_name(account: str, number: int) -> str:
    return f"{account}-{number}"


def version(number: int) -> str:
    """What an instance's application calls itself, and the path (with a slash) that is routed to it alone."""
    return f"v{number}"


def identity(account: str) -> SpiffeId:
    return SpiffeId.parse(f"spiffe://{TRUST_DOMAIN}/ns/default/sa/{account}")


_NGINX = """\
daemon off;
worker_processes 1;
pid {data}/nginx.pid;
error_log {data}/error.log;
events {{ worker_connections 1024; }}
http {{
    access_log off;
    keepalive_requests 100000000;
    client_body_temp_path {data}/body; proxy_temp_path {data}/proxy; fastcgi_temp_path {data}/fastcgi;
    uwsgi_temp_path {data}/uwsgi; scgi_temp_path {data}/scgi;
    server {{
        listen {address}:{http_port};
        listen {address}:{l4_port};
        default_type application/json;
        location / {{
            return 200 '{{"service": "{service}", "version": "{version}", "caller": "$http_x_forwarded_client_cert"}}';
        }}
    }}
}}
"""


def application(service: str, number: int) -> App:
    """nginx, which answers with its name and version and who it was told is calling."""

    def argv(address: str, data: Path) -> list[str]:
        config = data / "nginx.conf"
        ports = {"http_port": HTTP_PORT, "l4_port": L4_PORT}
        told = {"service": service, "version": version(number)}
        config.write_text(_NGINX.format(data=data, address=address, **told, **ports))
        return ["nginx", "-p", str(data), "-e", str(data / "error.log"), "-c", str(config)]

    return App(argv, "nginx", {"http": HTTP_PORT, "l4": L4_PORT})
