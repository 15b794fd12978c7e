"""What each program asks of a kernel, read from the compiled objects. `python -m bpf.needs` prints it as a table.

`make kernels` loads them all on kernels of Debian's, and prints beside it what happened there.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Final

from bpf import loader
from bpf.libbpf import Object
from bpf.loader import HOOKS, PROBE_HOOK, PROBER

HELPERS: Final[Mapping[int, str]] = {
    1: "map_lookup_elem",
    2: "map_update_elem",
    3: "map_delete_elem",
    5: "ktime_get_ns",
    7: "get_prandom_u32",
    49: "setsockopt",
    59: "sock_ops_cb_flags_set",
    70: "sock_hash_update",
    86: "sk_release",
    107: "sk_storage_get",
    108: "sk_storage_delete",
    122: "get_netns_cookie",
    124: "sk_assign",
    131: "ringbuf_reserve",
    132: "ringbuf_submit",
    187: "set_retval",
}
"""Number → name without `bpf_`, as in enum bpf_func_id of <linux/bpf.h>."""


@dataclass(frozen=True, slots=True)
class Need:
    """One program."""

    program: str
    hook: str
    """The ELF section, such as `cgroup/connect4`."""
    place: str
    helpers: tuple[str, ...]


def needs() -> list[Need]:
    """Of every program, in the order in which a workload is closed; the probers' last. Raises BpfError."""
    found = {}
    for path in loader.OBJECTS.glob("*.bpf.o"):
        with Object(path) as opened:
            for program in opened.programs():
                place = HOOKS[program.name].value if program.name in HOOKS else PROBER
                helpers = tuple(sorted(HELPERS[number] for number in program.helpers()))
                found[program.name] = Need(program.name, program.section(), place, helpers)
    return [found[name] for name in [*HOOKS, PROBE_HOOK]]


def table() -> Iterator[str]:
    """The rows of docs/kernels.md."""
    yield "| program | hook | attached to | helpers |"
    yield "|---|---|---|---|"
    for one in needs():
        helpers = ", ".join(f"`{name}`" for name in one.helpers)
        yield f"| `{one.program}` | `{one.hook}` | {one.place} | {helpers} |"


if __name__ == "__main__":
    print("\n".join(table()))
