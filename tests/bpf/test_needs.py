"""What the programs need: as the compiled objects say, and as docs/kernels.md says it."""

from pathlib import Path

import pytest

from bpf import needs
from bpf.loader import HOOKS, PROBE_HOOK

DOCS = Path(__file__).resolve().parents[2] / "docs" / "kernels.md"
HEADER = Path("/usr/include/linux/bpf.h")


def test_the_table_in_the_docs_is_what_the_objects_say():
    assert "\n".join(needs.table()) in DOCS.read_text()


def test_every_program_is_in_it_with_its_hook():
    found = {one.program: one for one in needs.needs()}
    assert list(found) == [*HOOKS, PROBE_HOOK]
    assert found["connect4"].hook == "cgroup/connect4"
    assert found["inbound"].hook == "sk_lookup"
    assert "sk_assign" in found["inbound"].helpers
    assert "set_retval" in found["bind6"].helpers
    assert "set_retval" not in found["getpeername6"].helpers


def test_what_needs_linux_6_1_is_what_refuses():
    """bpf_set_retval in these hooks is the newest of all that the programs need."""
    refusing = {"connect4", "connect6", "sendmsg4", "sendmsg6", "bind4", "bind6", "sock_create"}
    assert {one.program for one in needs.needs() if "set_retval" in one.helpers} == refusing


@pytest.mark.parametrize(("number", "name"), needs.HELPERS.items())
def test_helpers_have_the_numbers_of_the_kernel(number, name):
    """In <linux/bpf.h> they are listed in the order of their numbers, from `unspec`, which is 0."""
    lines = HEADER.read_text().partition("BPF_FUNC_MAPPER(FN")[2].splitlines()
    listed = [line.strip().removeprefix("FN(").partition(")")[0] for line in lines if line.strip().startswith("FN(")]
    assert listed[number].split(",")[0] == name
