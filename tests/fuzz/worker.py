"""One parser under atheris: `python -m tests.fuzz.worker PARSER [libFuzzer's options] [folder, or file to run]`."""

from __future__ import annotations

import os
import signal
import sys
import time
from typing import Final

import atheris

from tests.fuzz import corpus
from uproxy import linux

_GUIDED_BY: Final = ["bpf", "control", "dns", "hpack", "msgpack.fallback", "uproxy", "waypoint", "yaml"]
"""Modules and packages in which a new branch or comparison makes an input worth keeping."""
_LONGEST_S: Final = 2.0
"""Of processor time, for one input. Some thousand times what most need."""


def main() -> None:
    name, *arguments = sys.argv[1:]
    # Ctrl-C is for whoever started this: it ends it in order, or has ended.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    linux.die_with_parent(os.getppid())
    with atheris.instrument_imports(include=_GUIDED_BY):
        check = corpus.parser(name).check

    def timed(data: bytes) -> None:
        began = time.thread_time()
        check(data)
        took = time.thread_time() - began
        assert took < _LONGEST_S, f"{len(data)} bytes took {took:.1f} s of processor time"

    # libFuzzer starts itself anew by this, to merge.
    atheris.Setup([f"{sys.executable} -m tests.fuzz.worker {name}", "-handle_int=0", *arguments], timed)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
