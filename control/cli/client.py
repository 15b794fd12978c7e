"""What `meshctl` says to the control plane: JSON over its Unix socket."""

from __future__ import annotations

import argparse
import http.client
import json
import os
import socket
from pathlib import Path
from typing import Any, Final
from urllib.parse import quote, urlencode

from control.api.problems import ResourceError, ResourceErrors
from control.cli.output import UNREACHABLE, CommandError

DEFAULT_SOCKET: Final = Path("/run/uproxy/control.sock")
SOCKET_VARIABLE: Final = "MESHCTL_SOCKET"

_TIMEOUT_S: Final = 300.0  # beyond the publication of the largest change set
_MAX_ANSWER_BYTES: Final = 512 * 1024 * 1024


Answer = dict[str, Any]
"""What the control plane says: a JSON object."""


def add_socket_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--socket",
        type=Path,
        default=Path(os.environ.get(SOCKET_VARIABLE, DEFAULT_SOCKET)),
        metavar="PATH",
        help=f"the control plane's socket (default: ${SOCKET_VARIABLE}, or {DEFAULT_SOCKET})",
    )


class ControlPlane:
    """The control plane behind a socket. Every call is a connection of its own."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def get(self, *levels: str, **query: str) -> Answer:
        """The answer to GET. Raises CommandError."""
        path = "/v1/" + "/".join(quote(level, safe="") for level in levels)
        return self._call("GET", f"{path}?{urlencode(query)}" if query else path, None)

    def post(self, what: str, body: dict[str, object]) -> Answer:
        """The answer to POST. Raises CommandError."""
        return self._call("POST", f"/v1/{what}", body)

    def _call(self, method: str, path: str, body: dict[str, object] | None) -> Answer:
        connection = _UnixConnection(self._path)
        try:
            connection.request(
                method,
                path,
                None if body is None else json.dumps(body).encode(),
                {} if body is None else {"Content-Type": "application/json"},
            )
            response = connection.getresponse()
            answer = json.loads(response.read(_MAX_ANSWER_BYTES))
        except (FileNotFoundError, ConnectionRefusedError):
            raise CommandError(
                f"no control plane at {self._path}; is `meshctl up` running? --socket names another", UNREACHABLE
            ) from None
        except PermissionError:
            raise CommandError(
                f"you may not use {self._path}: whoever may has the mesh. Become root, or join the socket's group",
                UNREACHABLE,
            ) from None
        except TimeoutError:
            raise CommandError(
                f"the control plane at {self._path} did not answer in {_TIMEOUT_S:.0f} s", UNREACHABLE
            ) from None
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise CommandError(
                f"the control plane at {self._path} broke off its answer: {error!r}", UNREACHABLE
            ) from None
        finally:
            connection.close()
        if response.status == 200 and type(answer) is dict:
            return answer
        if type(answer) is dict and "errors" in answer:
            raise ResourceErrors(problems_of(answer["errors"]))
        told = answer.get("error") if type(answer) is dict else None
        raise CommandError(told or f"the control plane at {self._path} answered {response.status} without a reason")


def problems_of(found: list[Answer]) -> list[ResourceError]:
    """Errors or warnings as the control plane writes them."""
    return [ResourceError(item["file"], item["line"], item["field"], item["problem"]) for item in found]


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: Path) -> None:
        super().__init__("localhost", timeout=_TIMEOUT_S)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(str(self._path))
