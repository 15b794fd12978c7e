"""Loading: each object passes the verifier, all share the pinned maps, what does not fit is refused with its reason."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from bpf import libbpf, loader, maps
from bpf.libbpf import BpfError, Link, Object
from bpf.loader import HOOKS, PROBE_HOOK, Loader, LoadError
from tests.support import capture

pytestmark = pytest.mark.root
SOURCES = Path(loader.__file__).parent
OBJECTS = sorted(path.name for path in SOURCES.glob("*.bpf.c"))


@pytest.fixture
def pins():
    with capture.pins() as directory:
        yield directory


@pytest.mark.parametrize("source", OBJECTS)
def test_every_object_passes_the_verifier(source):
    with Object(loader.OBJECTS / source.replace(".c", ".o")) as opened:
        if source == "sk_lookup.bpf.c":
            opened.set_constants(bytes(8))
        opened.load()
        assert all(program.name in {*HOOKS, PROBE_HOOK} for program in opened.programs())


def test_the_objects_hold_every_hook_and_every_map():
    programs, shared = set(), set()
    for source in OBJECTS:
        with Object(loader.OBJECTS / source.replace(".c", ".o")) as opened:
            programs |= {program.name for program in opened.programs()}
            shared |= {one.name for one in opened.maps()}
    assert programs == {*HOOKS, PROBE_HOOK}
    assert shared == maps.KINDS.keys()


def test_no_sk_msg_program_exists():
    """Redirecting with sk_msg can crash the kernel (a NULL sk_socket): there must be none, not even unused."""
    for source in OBJECTS:
        assert "sk_msg" not in (SOURCES / source).read_text()


def test_a_second_loader_has_the_same_maps(pins):
    with Loader(pins / "maps") as first:
        capture.fill(first.maps)
    with Loader(pins / "maps") as second:
        assert len(second.maps.services) == 2
        assert second.maps.settings.read().generation == 9
        assert set(os.listdir(pins / "maps")) == maps.KINDS.keys()


def test_missing_objects_say_what_to_run(pins, tmp_path):
    with pytest.raises(LoadError, match="run `make bpf`"):
        Loader(pins / "maps", tmp_path / "nowhere")
    with pytest.raises(LoadError, match=r"getsockopt\.bpf\.o is missing: run `make bpf`"):
        Loader(pins / "maps", tmp_path)


def compile_to(objects: Path, name: str, text: str) -> None:
    """All objects, one of them from another source."""
    shutil.copytree(loader.OBJECTS, objects, dirs_exist_ok=True)
    source = objects / f"{name}.bpf.c"
    source.write_text(text)
    machine = subprocess.run(["clang", "-print-multiarch"], capture_output=True, text=True, check=True).stdout.strip()
    command = ["clang", "-O2", "-g", "-target", "bpf", f"-I{objects}", f"-I/usr/include/{machine}"]
    subprocess.run([*command, "-c", source, "-o", objects / f"{name}.bpf.o"], check=True, cwd=objects)


def test_a_map_of_another_size_is_refused_before_it_is_pinned(pins, tmp_path):
    for header in SOURCES.glob("*.h"):
        shutil.copy(header, tmp_path)
    header = tmp_path / "mesh.h"
    header.write_text(header.read_text().replace("	__u32 whole;", "	__u64 more;\n	__u32 whole;"))
    compile_to(tmp_path, "getsockopt", (SOURCES / "getsockopt.bpf.c").read_text())
    with pytest.raises(LoadError, match=r"map settings has MapSize\(key=4, value=24\), mesh\.h says .*value=16"):
        Loader(pins / "maps", tmp_path)
    assert os.listdir(pins / "maps") == []


def test_a_pinned_map_of_another_size_is_refused(pins, tmp_path):
    text = """
        #include <linux/bpf.h>
        #include <bpf/bpf_helpers.h>
        struct { __uint(type, BPF_MAP_TYPE_ARRAY); __uint(max_entries, 1); __type(key, __u32); __type(value, __u32); }
            settings SEC(".maps");
    """
    compile_to(tmp_path, "other", text)
    with Object(tmp_path / "other.bpf.o") as other:
        for shared in other.maps():
            shared.pin_at(pins / "maps" / shared.name)
        other.load()
    with pytest.raises(LoadError, match=r"settings has .*value=4.*made by another version.*--remove"):
        Loader(pins / "maps")


def test_an_unknown_map_is_refused(pins, tmp_path):
    text = (SOURCES / "getsockopt.bpf.c").read_text()
    for header in SOURCES.glob("*.h"):
        shutil.copy(header, tmp_path)
    extra = """
        struct { __uint(type, BPF_MAP_TYPE_ARRAY); __uint(max_entries, 1); __type(key, __u32); __type(value, __u32); }
            surprise SEC(".maps");
    """
    compile_to(tmp_path, "getsockopt", text + extra)
    with pytest.raises(LoadError, match="unknown map surprise"):
        Loader(pins / "maps", tmp_path)


@pytest.fixture
def refused_objects(tmp_path):
    """One of them does not pass the verifier."""
    for header in SOURCES.glob("*.h"):
        shutil.copy(header, tmp_path)
    text = """
        #include "sock.h"
        char LICENSE[] SEC("license") = "GPL";
        SEC("cgroup/getsockopt") int getsockopt(struct bpf_sockopt *ctx) { return *(int *)ctx->optval; }
    """
    compile_to(tmp_path, "getsockopt", text)
    return tmp_path


def test_what_the_verifier_refuses_comes_with_its_last_lines(pins, refused_objects):
    with pytest.raises(LoadError) as refused:
        Loader(pins / "maps", refused_objects)
    assert "load " in str(refused.value)
    assert "invalid access to packet" in str(refused.value)
    assert len(str(refused.value).splitlines()) <= 40
    assert "capture needs" not in str(refused.value)


def test_an_object_that_is_none_is_refused(pins, tmp_path):
    shutil.copytree(loader.OBJECTS, tmp_path, dirs_exist_ok=True)
    (tmp_path / "getsockopt.bpf.o").write_bytes(b"not an ELF file")
    with pytest.raises(LoadError, match=r"open .*getsockopt\.bpf\.o"):
        Loader(pins / "maps", tmp_path)


def test_a_failed_load_leaks_no_descriptor(pins, tmp_path):
    shutil.copytree(loader.OBJECTS, tmp_path, dirs_exist_ok=True)
    (tmp_path / "connect.bpf.o").write_bytes(b"not an ELF file")
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        with pytest.raises(LoadError):
            Loader(pins / "maps", tmp_path)
    assert len(os.listdir("/proc/self/fd")) == before


def test_an_old_kernel_is_named_when_it_refuses_a_program_and_only_then(pins, refused_objects, monkeypatch):
    monkeypatch.setattr("platform.release", lambda: "5.15.0-91-generic")
    with pytest.raises(LoadError, match=r"this is Linux 5\.15\.0-91-generic; capture needs 6\.1 or newer"):
        Loader(pins / "maps", refused_objects)
    Loader(pins / "maps").close()


def test_constants_of_another_size_are_refused():
    with Object(loader.OBJECTS / "sk_lookup.bpf.o") as opened, pytest.raises(BpfError, match="8 bytes, not 4"):
        opened.set_constants(bytes(4))
    with Object(loader.OBJECTS / "bind.bpf.o") as opened, pytest.raises(BpfError, match="no constants"):
        opened.set_constants(bytes(8))


def test_errors_say_what_failed(pins):
    with pytest.raises(BpfError, match=r"pinned map .*: No such file"):
        libbpf.open_pinned_map(pins / "maps" / "none")
    with pytest.raises(BpfError, match=r"pinned link .*: No such file"):
        Link.open_pinned(pins / "links" / "none")
    with Loader(pins / "maps") as loaded, pytest.raises(BpfError, match="attach connect4 to a cgroup: Bad file"):
        loaded.program("connect4").attach_cgroup(-1)
