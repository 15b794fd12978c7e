"""The parsers that are fuzzed, and the inputs that are kept of each: all together they reach what was ever reached.

A parser is a module beside this one, with
- `check(data)`, which gives any bytes to the parser and fails where something does not hold that should;
- `seeds()`, inputs to begin with; `WORDS`, pieces of inputs worth trying; `MAX_BYTES`, the longest input that is tried.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import zipfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Final, Protocol, cast

PARSERS: Final = (
    "certificates",
    "channel_messages",
    "dns_messages",
    "expressions",
    "fork_orders",
    "header_blocks",
    "http1_requests",
    "http1_responses",
    "http2_frames",
    "http2_heads",
    "identities",
    "proxy_headers",
    "records",
    "redis_replies",
    "request_targets",
    "resources",
    "tokens",
)
FOLDER: Final = Path(__file__).parent / "corpus"
_SPENT: Final = FOLDER.with_name("spent.json")
_A_DAY: Final = (1980, 1, 1, 0, 0, 0)
"""Of all files in an archive, so that the same inputs are the same bytes."""


class Parser(Protocol):
    """What a module of a parser holds."""

    MAX_BYTES: int
    WORDS: Sequence[bytes]
    seeds: Callable[[], Iterable[bytes]]
    check: Callable[[bytes], None]


def parser(name: str) -> Parser:
    return cast("Parser", importlib.import_module(f"tests.fuzz.{name}"))


def kept(name: str) -> list[bytes]:
    """The inputs in the repository."""
    try:
        with zipfile.ZipFile(FOLDER / f"{name}.zip") as archive:
            return [archive.read(each) for each in archive.namelist()]
    except FileNotFoundError:
        return []


def keep(name: str, inputs: Iterable[bytes]) -> None:
    """Replaces the inputs in the repository."""
    by_digest = {digest(data): data for data in inputs}
    with zipfile.ZipFile(FOLDER / f"{name}.zip", "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
        for input_name, data in sorted(by_digest.items()):
            archive.writestr(zipfile.ZipInfo(input_name, _A_DAY), data, zipfile.ZIP_DEFLATED)


def spend(name: str, seconds: float, inputs: int) -> None:
    """Add to what was ever spent on a parser: seconds of processor time, and inputs that were tried."""
    everything: dict[str, dict[str, int]] = json.loads(_SPENT.read_text()) if _SPENT.exists() else {}
    before = everything.get(name, {})
    everything[name] = {
        "processor_s": before.get("processor_s", 0) + round(seconds),
        "inputs": before.get("inputs", 0) + inputs,
    }
    _SPENT.write_text(json.dumps(dict(sorted(everything.items())), indent=1) + "\n")


def digest(data: bytes) -> str:
    """The name of an input."""
    return hashlib.sha256(data).hexdigest()[:16]
