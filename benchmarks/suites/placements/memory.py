"""How much memory processes take as if nothing else ran: what they share with strangers counts in full.

PSS would divide the pages of Envoy's program by all placements' Envoys, which stand here side by side and would not
anywhere else.
"""

from __future__ import annotations

import os
from array import array
from collections.abc import Iterable
from pathlib import Path

_PAGE = os.sysconf("SC_PAGE_SIZE")
# An entry of /proc/PID/pagemap (kernel: admin-guide/mm/pagemap): bit 63 is "present", the low 55 are the frame.
_PRESENT = 1 << 63
_FRAME = (1 << 55) - 1
_ENTRY_BYTES = 8
# Of one read: a mapping may reserve far more than it uses.
_CHUNK = 1 << 20


def resident_mb(pids: Iterable[int]) -> float:
    """MB (1,000,000 bytes) of distinct physical pages of these processes, each counted once. Needs CAP_SYS_ADMIN.

    Raises ProcessLookupError when one is gone.
    """
    frames: set[int] = set()
    for pid in pids:
        frames |= _frames(pid)
    return len(frames) * _PAGE / 1e6


def _frames(pid: int) -> set[int]:
    found: set[int] = set()
    try:
        maps = Path(f"/proc/{pid}/maps").read_text().splitlines()
        with open(f"/proc/{pid}/pagemap", "rb", buffering=0) as pagemap:
            for line in maps:
                if line.endswith("[vsyscall]"):  # beyond the user's half, and no page of anybody's
                    continue
                first, end = (int(part, 16) // _PAGE for part in line.split()[0].split("-"))
                pagemap.seek(first * _ENTRY_BYTES)
                left = (end - first) * _ENTRY_BYTES
                while left:
                    data = pagemap.read(min(left, _CHUNK))
                    if not data:
                        break
                    left -= len(data)
                    if data.count(0) < len(data):
                        found.update(entry & _FRAME for entry in array("Q", data) if entry & _PRESENT)
    except FileNotFoundError:
        raise ProcessLookupError(pid) from None
    return found
