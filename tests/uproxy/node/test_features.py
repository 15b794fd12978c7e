"""What this host can do for capture: tried for real, and said of each thing that fails."""

import os
import shutil
import socket

import pytest

from bpf import loader
from uproxy import cgroup, linux
from uproxy.node import features
from uproxy.node.features import Feature, Verdict, verdict

pytestmark = pytest.mark.root


def _by_name(found: list[Feature]) -> dict[str, Feature]:
    return {f"{one.capture} {one.name}": one for one in found}


def test_everything_works_here_and_nothing_is_left():
    found = features.probe()
    assert [one for one in found if not one.ok] == []
    assert verdict(found).capture == "ebpf"
    tried = {one.name.removeprefix("program ") for one in found if one.name.startswith("program ")}
    assert tried == {*loader.HOOKS, loader.PROBE_HOOK}
    assert {"nft redirect", "nft redirect, IPv6", "nft refusal"} <= _by_name(found).keys()
    assert not (cgroup.mount_point() / f"uproxy-check-{os.getpid()}").exists()


def test_a_program_that_does_not_load_is_named_and_the_host_gets_nftables(tmp_path, monkeypatch):
    for path in loader.OBJECTS.glob("*.bpf.o"):
        shutil.copy(path, tmp_path)
    whole = (tmp_path / "connect.bpf.o").read_bytes()
    (tmp_path / "connect.bpf.o").write_bytes(whole[: len(whole) // 2])
    monkeypatch.setattr(loader, "OBJECTS", tmp_path)
    found = features.probe()
    assert [one.name for one in found if not one.ok] == ["program connect"]
    assert verdict(found).capture == "nft"
    assert "no eBPF: program connect: does not load" in verdict(found).reason


def test_programs_that_were_not_compiled_are_no_capture(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(loader, "OBJECTS", tmp_path)
    assert features.main() == 0
    capture, reason = capsys.readouterr().out.splitlines()
    assert capture == "nft"
    assert "run `make bpf`" in reason


def test_without_nft_the_rules_say_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setattr(features.nft, "_SYSTEM_PATH", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "apt-get install nftables" in _by_name(features.probe())["nft rules"].detail


def test_rules_that_redirect_nowhere_are_seen(monkeypatch):
    """The opposite of the first: the tries can fail."""
    monkeypatch.setattr(features.nft, "rules", lambda *_: "table inet uproxy {}")
    monkeypatch.setattr(features, "_TIMEOUT_S", 0.2)
    found = _by_name(features.probe())
    assert not found["nft redirect"].ok
    assert not found["nft redirect, IPv6"].ok
    assert found["nft refusal"].detail == "a datagram into the mesh was sent"


def test_sockets_are_made_as_somebody_else_for_a_while():
    def owner() -> int:
        with socket.socket() as made:
            return os.fstat(made.fileno()).st_uid

    with linux.files_of(65534):
        assert owner() == 65534
    assert owner() == 0


EBPF, NO_EBPF = Feature("ebpf", "cgroup v2", True, "there"), Feature("ebpf", "program x", False, "not\nlike this")
NFT, NO_NFT = Feature("nft", "rules", True, "they load"), Feature("nft", "rules", False, "no nft")


@pytest.mark.parametrize(
    ("found", "capture", "said"),
    [
        ([EBPF, NFT], "ebpf", "every program passes"),
        ([EBPF, NO_NFT], "ebpf", "every program passes"),
        ([EBPF, NO_EBPF, NFT], "nft", "no eBPF: program x: not; nftables redirects"),
        ([NO_EBPF, NO_NFT], "none", "no eBPF: program x: not; no nftables: rules: no nft; "),
    ],
)
def test_what_is_lacking_is_said(found, capture, said):
    answer = verdict(found)
    assert isinstance(answer, Verdict)
    assert answer.capture == capture
    assert said in answer.reason
