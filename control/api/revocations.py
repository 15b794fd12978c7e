"""Which certificates of the mesh are not to be believed any more, although they have not ended."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

MAX_LISTS: Final = 4
"""As many CAs as a chain may have."""


@dataclass(frozen=True, slots=True)
class Revocations:
    """Said in the root namespace, for the whole mesh."""

    namespace: str
    lists: tuple[bytes, ...]
    """CRLs (DER; RFC 5280 section 5), each of another CA and signed by it."""
