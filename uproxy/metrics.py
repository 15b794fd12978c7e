"""Metrics of several processes as one, in Prometheus' text format. No I/O."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from uproxy.telemetry import BUILD


@dataclass(slots=True)
class _Family:
    """One metric: the lines that tell what it is, and its samples, by name and labels, in the order of their coming."""

    kind: str
    head: list[str]
    samples: dict[str, float] = field(default_factory=dict)


def summed(texts: Iterable[bytes]) -> bytes:
    """What all of them count, and hold, together. `istio_build` stays 1: it says which version this is."""
    families: dict[str, _Family] = {}
    for text in texts:
        _add(families, text.decode())
    return "".join(f"{line}\n" for family in families.values() for line in _lines(family)).encode()


def counters(text: bytes) -> bytes:
    """Without what only a living process has: its gauges."""
    families: dict[str, _Family] = {}
    _add(families, text.decode())
    kept = (family for family in families.values() if family.kind != "gauge")
    return "".join(f"{line}\n" for family in kept for line in _lines(family)).encode()


def _add(families: dict[str, _Family], text: str) -> None:
    """Each metric begins with its HELP and TYPE, as `uproxy.telemetry` writes it."""
    family = _Family("", [])
    help_line = ""
    for line in text.split("\n"):
        if line.startswith("# HELP "):
            help_line = line
        elif line.startswith("# TYPE "):
            _, _, name, kind = line.split(" ")
            family = families.setdefault(name, _Family(kind, [help_line, line]))
        elif line:
            sample, _, value = line.rpartition(" ")
            before = 0.0 if sample.startswith(BUILD) else family.samples.get(sample, 0.0)
            family.samples[sample] = before + float(value)


def _lines(family: _Family) -> Iterator[str]:
    yield from family.head
    for sample, value in family.samples.items():
        yield f"{sample} {int(value) if value.is_integer() else repr(value)}"
