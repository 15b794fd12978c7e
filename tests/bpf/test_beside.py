"""Beside another connect4 program, on a cgroup above the workload's."""

from __future__ import annotations

import ctypes
import os
import platform
import socket
import subprocess
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest
from cffi import FFI

from bpf.libbpf import LIBRARY, Object
from tests.bpf.dialling import connected, dial
from tests.bpf.test_connect import read
from tests.support.capture import KNOWN_V4, OUTSIDE_V4, PEER_V4, PORT, UNKNOWN_V4, VIP_V4, Site

pytestmark = pytest.mark.root

ELSEWHERE = "198.51.100.7"
# <linux/bpf.h>
CGROUP_INET4_CONNECT, ALLOW_MULTI, PREORDER = 10, 1 << 1, 1 << 6

Beside = Callable[..., AbstractContextManager[None]]


@pytest.fixture(scope="module")
def balancer(tmp_path_factory) -> Path:
    made = tmp_path_factory.mktemp("balancer") / "balancer.bpf.o"
    source = Path(__file__).with_name("balancer.bpf.c")
    include = f"-I/usr/include/{platform.machine()}-linux-gnu"
    subprocess.run(["clang", "-O2", "-g", "-target", "bpf", include, "-c", source, "-o", made], check=True)
    return made


@pytest.fixture
def beside(rig, balancer) -> Beside:
    """Runs the balancer above the workload's cgroups while the block runs."""
    return lambda *arguments: running_above(rig.site, balancer, *arguments)


@contextmanager
def running_above(
    site: Site, program: Path, from_address: str, to_address: str, flags: int = ALLOW_MULTI
) -> Iterator[None]:
    library = ctypes.CDLL(LIBRARY, use_errno=True)
    directory = os.open(site.directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        with Object(program) as loaded:
            loaded.set_constants(socket.inet_aton(from_address) + socket.inet_aton(to_address))
            loaded.load()
            fd = library.bpf_program__fd(ctypes.c_void_p(pointer_of(loaded)))
            if library.bpf_prog_attach(fd, directory, CGROUP_INET4_CONNECT, flags):
                if flags & PREORDER:
                    pytest.skip("this kernel knows no BPF_F_PREORDER (Linux 6.15)")
                raise OSError(ctypes.get_errno(), "bpf_prog_attach")
            try:
                yield
            finally:
                library.bpf_prog_detach2(fd, directory, CGROUP_INET4_CONNECT)
    finally:
        os.close(directory)


def pointer_of(loaded: Object) -> int:
    (program,) = loaded.programs()
    return int(FFI().cast("uintptr_t", program.pointer))


def test_ours_runs_first_and_the_other_sees_the_uproxys_address(rig, counted, beside):
    with rig.site.uproxy(), rig.site.outside(), beside(VIP_V4, PEER_V4):
        answer = rig.site.in_app(lambda: dial(VIP_V4))
    assert read(answer)[:2] == (VIP_V4, PORT)
    assert counted() == {"captured": 1}


def test_an_app_sees_what_it_dialled(rig, beside):
    def peer() -> tuple[str, int]:
        with connected(VIP_V4) as sock:
            return sock.getpeername()

    with rig.site.uproxy(), beside(VIP_V4, PEER_V4):
        assert rig.site.in_app(peer) == (VIP_V4, PORT)


def test_what_ours_refuses_the_other_does_not_open(rig, counted, beside):
    with rig.site.uproxy(), rig.site.outside(), beside(UNKNOWN_V4, OUTSIDE_V4), pytest.raises(ConnectionRefusedError):
        rig.site.in_app(lambda: dial(UNKNOWN_V4))
    assert counted() == {"refused_no_config": 1}


def test_what_ours_leaves_alone_is_the_others(rig, counted, beside):
    with rig.site.outside(), beside(ELSEWHERE, OUTSIDE_V4):
        assert rig.site.in_app(lambda: dial(ELSEWHERE)) == b"outside"
    assert counted() == {}


def test_one_that_insists_on_being_first_is_seen_through_its_choice(rig, counted, beside):
    """With BPF_F_PREORDER: it chooses the backend, and the way there is still through the mesh."""
    with rig.site.uproxy(), rig.site.outside(), beside(VIP_V4, KNOWN_V4, ALLOW_MULTI | PREORDER):
        answer = rig.site.in_app(lambda: dial(VIP_V4))
    assert read(answer)[:2] == (KNOWN_V4, PORT)
    assert counted() == {"captured": 1}
