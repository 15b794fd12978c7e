"""`meshctl tap`: connections, and at a waypoint requests, as they happen."""

from __future__ import annotations

import argparse
import json
import selectors
import socket
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

from control.cli.connections import destination_of, peer_of, source_of
from control.cli.output import REFUSED, add_output_option, printable
from control.cli.proxies import Proxy, add_proxy_options, proxies

_EXAMPLES: Final = """\
examples:
  meshctl tap                                  of all workloads of this host
  meshctl tap web --failed                     what did not work, and why
  meshctl tap --admin 127.0.1.1:15000 -o json  of a proxy without capture, or of a waypoint

A line when a connection opens and one when it ends or is refused; at a waypoint one for each request. Ends with Ctrl-C,
or when no proxy is left. JSON has the fields of the access log. A proxy gives a watcher 1,000 lines in a second at
most, and says how many it left out.
"""
_REQUEST: Final = b"GET /tap HTTP/1.1\r\nHost: admin\r\n\r\n"
_MAX_LINE: Final = 256 * 1024  # a line has some 20 fields of at most 2,048 characters, escaped


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command to the parser."""
    command = commands.add_parser(
        "tap",
        help="show connections and requests as they happen",
        description="Show connections, and at a waypoint requests, as they happen.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_proxy_options(command)
    command.add_argument("--failed", action="store_true", help="only what was refused, or ended in an error")
    add_output_option(command)
    command.set_defaults(run=_tap)


def _tap(arguments: argparse.Namespace) -> int:
    status = 0
    with selectors.DefaultSelector() as selector:
        for proxy in proxies(arguments):
            try:
                sock = proxy.dial()
                sock.sendall(_REQUEST)
            except OSError as error:
                _say(f"{proxy.name}: its admin port does not answer: {error}")
                status = REFUSED
                continue
            selector.register(sock, selectors.EVENT_READ, _Watched(proxy, sock))
        told = False
        try:
            while watched := [key.data for key in selector.get_map().values()]:
                if not told and all(one.answered for one in watched):
                    print(f"watching {', '.join(one.proxy.name for one in watched)}", file=sys.stderr)
                    told = True
                for key, _ in selector.select():
                    try:
                        for line in key.data.lines():
                            _show(key.data.proxy, line, arguments)
                    except _EndedError as ended:
                        _say(f"{key.data.proxy.name}: {ended}")
                        selector.unregister(key.data.sock)
                        key.data.sock.close()
                        status = REFUSED
        except KeyboardInterrupt:
            return 0
    return status


class _EndedError(Exception):
    """A proxy tells nothing any more; the text says why."""


class _Watched:
    """One proxy's answer, as far as it has come."""

    def __init__(self, proxy: Proxy, sock: socket.socket) -> None:
        self.proxy = proxy
        self.sock = sock
        self._received = b""
        self.answered = False
        """Whether it has begun."""

    def lines(self) -> Iterator[dict[str, Any]]:
        """Those that are there. Raises _EndedError."""
        try:
            data = self.sock.recv(65536)
        except OSError as error:
            raise _EndedError(str(error)) from None
        self._received += data
        if not self.answered:
            head, end, rest = self._received.partition(b"\r\n\r\n")
            if end:
                if head.split(b" ", 2)[1:2] != [b"200"]:
                    raise _EndedError(f"its admin port answers: {rest.decode('utf-8', 'replace').strip()}")
                self.answered, self._received = True, rest
        if self.answered:
            *whole, self._received = self._received.split(b"\n")
            yield from map(json.loads, whole)
        if not data:
            raise _EndedError("has ended")
        if len(self._received) > _MAX_LINE:
            raise _EndedError("what it says is no access log")


def _show(proxy: Proxy, line: Mapping[str, Any], arguments: argparse.Namespace) -> None:
    if arguments.failed and line["level"] not in ("error", "warning"):
        return
    text = json.dumps({"proxy": proxy.name, **line}) if arguments.output == "json" else _text(proxy, line)
    print(text, flush=True)


def _text(proxy: Proxy, line: Mapping[str, Any]) -> str:
    words: Sequence[str]
    at, message = line["time"][11:23], line["message"]
    if message == "left out":
        words = (at, proxy.name, f"{line['lines']} more happened, too quickly to be shown")
    elif "method" in line:
        words = (
            *(at, proxy.name, "request", f"{source_of(line)} -> {line['method']} {destination_of(line)}"),
            *(f"[{peer_of(line)}]", str(line["response_code"]), f"{line['duration']}ms"),
            str(line.get("response_code_details", "")),
        )
    else:
        opened = message == "connection opened"
        failed = "response_flags" in line
        words = (
            *(at, proxy.name, line["direction"], "opened" if opened else "failed" if failed else "ended"),
            *(f"{source_of(line)} -> {destination_of(line)}", f"[{peer_of(line) or 'unknown'}]"),
            "" if opened else f"sent {line['bytes_sent']} received {line['bytes_recv']} {line['duration']}",
            line.get("error", ""),
        )
    return printable(" ".join(word for word in words if word))


def _say(text: str) -> None:
    print(f"error: {printable(text)}", file=sys.stderr)
