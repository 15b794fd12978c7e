"""gRPC calls on a schedule, beside a stream that stays open, to what `grpc_interop serve` serves.

`python -m tests.support.grpc_load ADDRESS PORT` goes on until its standard input ends, and prints as JSON how many
calls went well, how many answers came on the stream, and what became of the others.
"""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc

_PERIOD_S = 0.02
_ASKING = json.dumps({"size": 100}).encode()


def main(address: str, port: str) -> None:
    over = threading.Event()
    threading.Thread(target=lambda: (sys.stdin.read(), over.set()), daemon=True).start()
    with grpc.insecure_channel(f"{address}:{port}") as channel, ThreadPoolExecutor(64) as pool:
        stream = pool.submit(_converse, channel, over)
        calls = []
        while not over.wait(_PERIOD_S):
            calls.append(pool.submit(_call, channel))
        beats, broken = stream.result()
        failed = [one.result() for one in calls if one.result()]
    print(json.dumps({"done": len(calls) - len(failed), "beats": beats, "failed": failed + broken}))


def _call(channel: grpc.Channel) -> str:
    """What went wrong."""
    try:
        channel.unary_unary("/interop.Test/Unary")(_ASKING, timeout=15)
    except grpc.RpcError as error:
        if _of(error).details() == "overload":  # as on a machine that others use
            return ""
        return f"{_of(error).code()}: {_of(error).details()}"
    return ""


def _converse(channel: grpc.Channel, over: threading.Event) -> tuple[int, list[str]]:
    """Answers to what was asked one after the other, and what ended it before its time."""
    beats, answered = 0, threading.Semaphore(1)

    def requests() -> Iterator[bytes]:
        while answered.acquire() and not over.wait(_PERIOD_S):
            yield _ASKING

    try:
        for _ in channel.stream_stream("/interop.Test/Converse")(requests()):
            beats += 1
            answered.release()
    except grpc.RpcError as error:
        return beats, [f"stream: {_of(error).code()}: {_of(error).details()}"]
    return beats, [] if over.is_set() else ["stream: ended"]


def _of(error: grpc.RpcError) -> Any:
    """It is a grpc.Call too, which comes without types."""
    return error


if __name__ == "__main__":
    main(*sys.argv[1:])
