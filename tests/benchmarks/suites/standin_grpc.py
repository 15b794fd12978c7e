"""A gRPC client for stand-ins of proxies, written from the protos, and from nothing of the server's."""

from __future__ import annotations

import socket
import struct

import h2.config
import h2.connection
import h2.events

_FRAME = 16384


class CallError(Exception):
    """Ended with another status than 0."""

    def __init__(self, status: str, text: str) -> None:
        super().__init__(f"{status}: {text}")
        self.status = status


def call(made: socket.socket, path: str, message: bytes) -> bytes:
    """The first message of the answer. Raises CallError, and ConnectionError when there is none."""
    http = h2.connection.H2Connection(h2.config.H2Configuration(client_side=True, header_encoding="utf-8"))
    http.initiate_connection()
    headers = [(":method", "POST"), (":scheme", "http"), (":path", path), (":authority", "control")]
    http.send_headers(1, [*headers, ("content-type", "application/grpc"), ("te", "trailers")])
    body = struct.pack("!BI", 0, len(message)) + message
    for at in range(0, len(body), _FRAME):
        http.send_data(1, body[at : at + _FRAME])
    http.end_stream(1)
    body = b""
    while True:
        made.sendall(http.data_to_send())
        received = made.recv(65536)
        if not received:
            raise ConnectionError("no answer")
        for event in http.receive_data(received):
            if isinstance(event, h2.events.ResponseReceived | h2.events.TrailersReceived):
                told = dict(event.headers)
                if told.get("grpc-status", "0") != "0":
                    raise CallError(told["grpc-status"], told.get("grpc-message", ""))
            elif isinstance(event, h2.events.DataReceived):
                body += event.data
            elif isinstance(event, h2.events.StreamReset):
                raise ConnectionError(f"reset: {event.error_code}")
        if len(body) >= 5 and len(body) >= 5 + struct.unpack("!BI", body[:5])[1]:
            return body[5 : 5 + struct.unpack("!BI", body[:5])[1]]


def write(number: int, content: bytes | str | int) -> bytes:
    """One field; an integer as a varint."""
    if isinstance(content, int):
        return _varint(number * 8) + _varint(content)
    content = content.encode() if isinstance(content, str) else content
    return _varint(number * 8 + 2) + _varint(len(content)) + content


def read(message: bytes, *path: int) -> list[bytes | int]:
    """The values of the field at the end of a path of numbers, through messages within messages."""
    values = [value for number, value in _fields(message) if number == path[0]]
    return values if len(path) == 1 else [found for value in values for found in read(value, *path[1:])]


def _fields(message: bytes) -> list[tuple[int, bytes | int]]:
    fields, rest = [], message
    while rest:
        key, rest = _split(rest)
        if key % 8 == 0:
            value, rest = _split(rest)
        elif key % 8 == 2:
            length, rest = _split(rest)
            assert length <= len(rest)
            value, rest = rest[:length], rest[length:]
        else:
            assert key % 8 == 5, f"wire type {key % 8}"
            value, rest = struct.unpack("<I", rest[:4])[0], rest[4:]
        fields.append((key // 8, value))
    return fields


def _varint(value: int) -> bytes:
    return bytes([value]) if value < 128 else bytes([value % 128 + 128]) + _varint(value // 128)


def _split(message: bytes) -> tuple[int, bytes]:
    first, rest = message[0], message[1:]
    if first < 128:
        return first, rest
    more, rest = _split(rest)
    return first - 128 + 128 * more, rest
