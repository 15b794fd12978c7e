"""Cases of gRPC's interoperability tests (github.com/grpc/grpc, doc/interop-test-descriptions.md), by grpcio, on bytes.

`serve ADDRESS` prints its port and serves until its standard input ends; `call ADDRESS PORT` runs every case and prints
what each has seen, as JSON by name.
"""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final

import grpc

_SERVICE: Final = "/interop.Test/"
_SENT: Final = (27182, 8, 1828, 45904)
_WANTED: Final = (31415, 9, 2653, 58979)
_SPECIAL: Final = "\t\ntest with whitespace\r\nand Unicode BMP ☺ and non-BMP \U0001f608\t\n"

Call = Any  # of grpc.Call and grpc.ServicerContext, which come without types


class Service:
    """What is called. A message asks, as JSON, for sizes of answers or for a status."""

    def __init__(self) -> None:
        self.cancelled = threading.Semaphore(0)

    def unary(self, request: bytes, context: Call) -> bytes:
        self._echo_metadata(context)
        if not request:
            return b""
        asked = json.loads(request.rstrip(b"\0"))
        if "compressed" in asked:
            context.set_compression(grpc.Compression.Gzip)
        if "code" in asked:
            context.abort(list(grpc.StatusCode)[asked["code"]], asked["message"])
        return bytes(asked["size"])

    def collect(self, requests: Iterator[bytes], _: Call) -> bytes:
        return b"%d" % sum(len(request) for request in requests)

    def pour(self, request: bytes, _: Call) -> Iterator[bytes]:
        for size in json.loads(request):
            yield bytes(size)

    def converse(self, requests: Iterator[bytes], context: Call) -> Iterator[bytes]:
        context.add_callback(self.cancelled.release)
        self._echo_metadata(context)
        for request in requests:
            yield bytes(json.loads(request.rstrip(b"\0"))["size"])

    def sleep(self, _: bytes, context: Call) -> bytes:
        ended = threading.Event()
        context.add_callback(ended.set)
        ended.wait(30)
        self.cancelled.release()
        return b""

    def was_cancelled(self, _: bytes, __: Call) -> bytes:
        return b"%d" % self.cancelled.acquire(timeout=10)

    def _echo_metadata(self, context: Call) -> None:
        given = dict(context.invocation_metadata())
        if "x-initial" in given:
            context.send_initial_metadata((("x-initial", given["x-initial"]),))
            context.set_trailing_metadata((("x-trailing-bin", given["x-trailing-bin"]),))


def serve(address: str) -> None:
    service = Service()
    server = grpc.server(ThreadPoolExecutor(16))
    methods = {
        "Unary": grpc.unary_unary_rpc_method_handler(service.unary),
        "Collect": grpc.stream_unary_rpc_method_handler(service.collect),
        "Pour": grpc.unary_stream_rpc_method_handler(service.pour),
        "Converse": grpc.stream_stream_rpc_method_handler(service.converse),
        "Sleep": grpc.unary_unary_rpc_method_handler(service.sleep),
        "WasCancelled": grpc.unary_unary_rpc_method_handler(service.was_cancelled),
    }
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(_SERVICE.strip("/"), methods),))
    print(server.add_insecure_port(f"{address}:0"), flush=True)
    server.start()
    sys.stdin.read()
    server.stop(0).wait()


class Caller:
    """The cases, by their names there. Each returns what was seen."""

    def __init__(self, channel: grpc.Channel) -> None:
        self._channel = channel
        self._unary = channel.unary_unary(_SERVICE + "Unary")
        self._converse = channel.stream_stream(_SERVICE + "Converse")

    def empty_unary(self) -> object:
        return len(self._unary(b""))

    def large_unary(self) -> object:
        return len(self._unary(_asking(314159, 271828)))

    def client_streaming(self) -> object:
        collect = self._channel.stream_unary(_SERVICE + "Collect")
        return int(collect(bytes(size) for size in _SENT))

    def server_streaming(self) -> object:
        pour = self._channel.unary_stream(_SERVICE + "Pour")
        return [len(answer) for answer in pour(json.dumps(_WANTED).encode())]

    def ping_pong(self) -> object:
        more = threading.Semaphore(0)
        sizes = iter(zip(_WANTED, _SENT, strict=True))

        def requests() -> Iterator[bytes]:
            for wanted, sent in sizes:
                yield _asking(wanted, sent)
                more.acquire()

        seen = []
        for answer in self._converse(requests()):
            seen.append(len(answer))
            more.release()
        return seen

    def empty_stream(self) -> object:
        return list(self._converse(iter(())))

    def compressed_unary(self) -> object:
        return len(self._unary(_asking(314159, 271828), compression=grpc.Compression.Gzip))

    def compressed_streaming(self) -> object:
        requests = (_asking(wanted, sent) for wanted, sent in zip(_WANTED, _SENT, strict=True))
        return [len(answer) for answer in self._converse(requests, compression=grpc.Compression.Deflate)]

    def unary_to_a_compressing_server(self) -> object:
        asked = json.dumps({"size": 314159, "compressed": True}).encode()
        return len(self._unary(asked))

    def custom_metadata(self) -> object:
        metadata = (("x-initial", "initial value"), ("x-trailing-bin", b"\xab\xab\0"))
        _, unary = self._unary.with_call(_asking(1, 1), metadata=metadata)
        stream = self._converse(iter([_asking(1, 1)]), metadata=metadata)
        list(stream)
        return [
            (dict(call.initial_metadata())["x-initial"], dict(call.trailing_metadata())["x-trailing-bin"].hex())
            for call in (unary, stream)
        ]

    def status_code_and_message(self) -> object:
        return self._refused(2, "test status message")

    def special_status_message(self) -> object:
        return self._refused(2, _SPECIAL)

    def every_status(self) -> object:
        return [self._refused(code, "")[0] for code in range(1, 17)]

    def _refused(self, code: int, message: str) -> tuple[str, str]:
        return _status(lambda: self._unary(json.dumps({"code": code, "message": message}).encode()))

    def unimplemented_method(self) -> object:
        return _status(lambda: self._channel.unary_unary(_SERVICE + "Nothing")(b""))

    def unimplemented_service(self) -> object:
        return _status(lambda: self._channel.unary_unary("/interop.Nobody/Unary")(b""))[0]

    def refused(self) -> object:
        """None of theirs: where a policy refuses this path."""
        return _status(lambda: self._channel.unary_unary("/interop.Refused/Unary")(b""))

    def cancel_after_begin(self) -> object:
        hold = threading.Event()
        collect = self._channel.stream_unary(_SERVICE + "Collect")
        stream = collect.future(bytes(1) for _ in iter(lambda: hold.wait(10), True))
        stream.cancel()
        hold.set()
        return str(stream.code())

    def cancel_after_first_response(self) -> object:
        hold = threading.Event()

        def requests() -> Iterator[bytes]:
            yield _asking(31415, 27182)
            hold.wait(10)

        stream = self._converse(requests())
        first = len(next(stream))
        stream.cancel()
        told = _status(lambda: next(stream))[0]
        hold.set()
        return first, told, self._was_cancelled()

    def timeout_on_sleeping_server(self) -> object:
        sleep = self._channel.unary_unary(_SERVICE + "Sleep")
        return _status(lambda: sleep(b"", timeout=0.5))[0], self._was_cancelled()

    def concurrent_large_unary(self) -> object:
        calls = [self._unary.future(_asking(100_000 + number, 50_000)) for number in range(50)]
        return [len(call.result()) for call in calls]

    def _was_cancelled(self) -> int:
        return int(self._channel.unary_unary(_SERVICE + "WasCancelled")(b""))


def _asking(size: int, length: int) -> bytes:
    return json.dumps({"size": size}).encode().ljust(length, b"\0")


def _status(call: Callable[[], object]) -> tuple[str, str]:
    try:
        call()
    except grpc.RpcError as error:
        return str(error.code()), error.details()
    return "OK", ""


CASES: Final = tuple(name for name, value in vars(Caller).items() if not name.startswith("_") and callable(value))


def call(address: str, port: str) -> None:
    with grpc.insecure_channel(f"{address}:{port}") as channel:
        caller = Caller(channel)
        print(json.dumps({name: getattr(caller, name)() for name in CASES}))


if __name__ == "__main__":
    {"serve": serve, "call": call}[sys.argv[1]](*sys.argv[2:])
