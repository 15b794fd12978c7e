"""Markup that cannot forget to escape: every text is escaped but that which is markup already."""

from __future__ import annotations

import re
from collections.abc import Iterable
from html import escape

from control.cli.output import printable


class Html(str):
    """Markup, finished: goes into other markup as it is."""

    __slots__ = ()


def text(content: str) -> Html:
    """Text from anywhere. What HTML forbids (controls, lone surrogates) and what could reorder a line is a `?`."""
    return content if isinstance(content, Html) else Html(escape(printable(re.sub(r"\s+", " ", content))))


def tag(name: str, /, *content: str, **attributes: str | float) -> Html:
    """An element. An attribute's underscores are hyphens; one at the end makes a Python keyword usable (`class_`)."""
    written = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{attribute(value)}"' for key, value in attributes.items() if value != ""
    )
    if name in ("meta", "link", "br"):
        return Html(f"<{name}{written}>")
    return Html(f"<{name}{written}>{''.join(map(text, content))}</{name}>")


def attribute(value: str | float) -> str:
    """Numbers are coordinates: a tenth of a pixel is enough, and the same on every machine."""
    if isinstance(value, str):
        return text(value)
    return f"{value:.1f}".rstrip("0").rstrip(".").replace("-0", "0") if abs(value) < 0.05 else f"{value:.5g}"


def join(parts: Iterable[Html]) -> Html:
    return Html("".join(parts))
