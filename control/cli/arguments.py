"""Command lines as people type them after kubectl: options before, between and after the words."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any


class CommandParser(argparse.ArgumentParser):
    """A command's parser. `get service -n shop web` is what `get service web -n shop` is."""

    _inside = False

    def parse_known_args(  # type: ignore[override]  # typeshed tells kinds of namespaces apart
        self, args: Sequence[str] | None = None, namespace: Any = None
    ) -> tuple[Any, list[str]]:
        # argparse's own way to intermix comes back here for each of its two passes, and takes no subcommands.
        if self._inside or any(isinstance(action, argparse._SubParsersAction) for action in self._actions):
            return super().parse_known_args(args, namespace)
        self._inside = True
        try:
            return self.parse_known_intermixed_args(args, namespace)
        finally:
            self._inside = False
