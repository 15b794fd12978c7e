"""The applications as a lab starts them: real servers, each with its configuration in a directory of its own."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

from benchmarks.lab.topology import App

_HERE = Path(__file__).parent

_NGINX = """\
daemon off;
worker_processes 1;
pid {data}/nginx.pid;
error_log {data}/error.log;
events {{ worker_connections 1024; }}
http {{
    access_log off;
    keepalive_requests 1000000;
    client_body_temp_path {data}/body; proxy_temp_path {data}/proxy; fastcgi_temp_path {data}/fastcgi;
    uwsgi_temp_path {data}/uwsgi; scgi_temp_path {data}/scgi;
    server {{
        listen {address}:{port};
        default_type application/json;
        location / {{
            return 200 '{{"version": "{version}", "method": "$request_method", "path": "$request_uri",
                "caller": "$http_x_forwarded_client_cert"}}';
        }}
    }}
}}
"""


def nginx(version: str, port: int = 9080) -> App:
    """Reviews as nginx serves it."""

    def argv(address: str, data: Path) -> list[str]:
        config = data / "nginx.conf"
        config.write_text(_NGINX.format(data=data, address=address, port=port, version=version))
        return ["nginx", "-p", str(data), "-e", str(data / "error.log"), "-c", str(config)]

    return App(argv, "nginx", {"http": port})


def python_http(version: str, port: int = 9080) -> App:
    """Reviews as a Python program serves it."""
    return App(
        lambda address, data: [*_script("reviews.py", data), address, str(port), version],
        _interpreter(),
        {"http": port},
    )


def redis(port: int = 6379) -> App:
    """A Redis that keeps nothing on disk."""

    def argv(address: str, data: Path) -> list[str]:
        memory_only = ["--save", "", "--appendonly", "no", "--dir", str(data), "--loglevel", "warning"]
        return ["redis-server", "--bind", address, "--port", str(port), "--protected-mode", "no", *memory_only]

    return App(argv, "redis-server", {"redis": port})


def client() -> App:
    """Web: does jobs (client.py)."""
    return App(lambda address, data: _script("client.py", data), _interpreter(), talks=True)


def mixture(port: int = 8080) -> App:
    """What `mixture_call` talks to."""
    return App(
        lambda address, data: [*_script("mixture.py", data), "serve", address, str(port)],
        _interpreter(),
        {"tcp": port},
    )


def mixture_call(address: str, port: int, callers: int, seconds: float, seed: int, data: Path) -> list[str]:
    """The command of so many callers, each of which makes one connection after the other; `data`: of its own."""
    return [*_script("mixture.py", data), "call", address, str(port), str(callers), f"{seconds:g}", str(seed)]


def idle() -> App:
    """A workload that does nothing by itself: sockets made in its cgroup act for it."""
    return App(lambda address, data: ["sleep", "infinity"], "sleep")


def _script(name: str, data: Path) -> list[str]:
    # A copy, because an application's user may have no right to read where this package lies.
    copy = data / name
    shutil.copyfile(_HERE / name, copy)
    copy.chmod(0o644)
    return [_interpreter(), "-I", str(copy)]


def _interpreter() -> str:
    """The distribution's, which every user may run; else the one that runs us, outside of its environment."""
    system = "/usr/bin/python3"
    return system if os.path.exists(system) else str(Path(sys.base_prefix, "bin", "python3"))
