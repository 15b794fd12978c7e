from __future__ import annotations

import os
import subprocess
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from uproxy import cgroup, sandbox
from uproxy.cgroup import SandboxError
from uproxy.entrance import Entrance
from uproxy.sandbox import Sandbox

_MOUNT = Path("/sys/fs/cgroup")
_NAMES = st.from_regex(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?", fullmatch=True)


def test_names_are_plain_in_the_usual_place() -> None:
    box = Sandbox.below(_MOUNT / "uproxy", _MOUNT, "web", ["10.0.0.1"])
    assert (box.netns, box.host_link) == ("uproxy-web", "up-web")
    assert (box.app_cgroup, box.proxy_cgroup) == (_MOUNT / "uproxy/web/app", _MOUNT / "uproxy/web/proxy")


@given(_NAMES, _NAMES)
def test_interface_names_fit_and_differ(first: str, second: str) -> None:
    links = {Sandbox.below(_MOUNT / "uproxy", _MOUNT, name, []).host_link for name in (first, second)}
    assert all(len(link) <= 15 for link in links)
    assert len(links) == len({first, second})


def test_places_that_differ_share_no_name() -> None:
    """Else a launcher would take another one's sandbox for what a dead one left, and remove it."""
    boxes = [Sandbox.below(_MOUNT / root, _MOUNT, "web", []) for root in ("uproxy", "lab/a", "lab/b")]
    assert len({box.netns for box in boxes}) == len({box.host_link for box in boxes}) == 3


def test_failed_command_is_named() -> None:
    with pytest.raises(SandboxError, match="ip link set dev no-such-link up"):
        sandbox.run_ip(["link show", "link set dev no-such-link up"])


@pytest.mark.root
class TestOnThisMachine:
    @pytest.fixture
    def box(self) -> Iterator[Sandbox]:
        mount = cgroup.mount_point()
        root = mount / f"uproxy-test-{uuid.uuid4().hex[:6]}"
        made = Sandbox.below(root, mount, "box", ["198.18.7.7", "2001:db8:7::7"])
        try:
            yield made
        finally:
            sandbox.remove(made)
            root.rmdir()

    def _inside(self, box: Sandbox, *argv: str) -> str:
        with open(box.netns_path) as netns:
            enter = Entrance(box.app_cgroup, netns.fileno())
            return subprocess.run(argv, preexec_fn=enter, capture_output=True, text=True, check=True).stdout

    def test_build_gives_addresses_routes_and_cgroups(self, box: Sandbox) -> None:
        sandbox.build(box)
        assert "198.18.7.7/32" in self._inside(box, "ip", "-o", "address", "show", "dev", "eth0")
        assert "via 169.254.1.1 dev eth0" in self._inside(box, "ip", "route", "get", "192.0.2.1")
        assert "via fe80::1 dev eth0" in self._inside(box, "ip", "-6", "route", "get", "2001:db8::1")
        assert self._inside(box, "cat", "/proc/self/cgroup").splitlines()[-1].endswith("/box/app")
        route = subprocess.run(["ip", "route", "get", "198.18.7.7"], capture_output=True, text=True, check=True)
        assert f"dev {box.host_link}" in route.stdout
        # Both ends reach each other without ARP or NDP being answered by anybody.
        self._inside(box, "ping", "-c1", "-W2", "198.18.7.7")
        subprocess.run(["ping", "-c1", "-W2", "198.18.7.7"], stdout=subprocess.DEVNULL, check=True)

    def test_remove_kills_and_removes_and_may_be_repeated(self, box: Sandbox) -> None:
        sandbox.build(box)
        with open(box.netns_path) as netns:
            enter = Entrance(box.app_cgroup, netns.fileno())
            process = subprocess.Popen(["sleep", "100"], preexec_fn=enter)
        (box.app_cgroup / "below").mkdir()
        sandbox.remove(box)
        assert process.wait(60) == -9
        assert not box.cgroup.exists()
        assert not box.netns_path.exists()
        assert box.host_link not in os.listdir("/sys/class/net")
        sandbox.remove(box)

    def test_address_that_is_taken_is_named(self, box: Sandbox) -> None:
        sandbox.build(box)
        mount = cgroup.mount_point()
        second = Sandbox.below(box.cgroup.parent, mount, "second", ["198.18.7.7"])
        try:
            with pytest.raises(SandboxError, match=r"198\.18\.7\.7 is routed here already"):
                sandbox.build(second)
        finally:
            sandbox.remove(second)
