"""WireGuard between two places of a lab: the kernel encrypts packets, and no process is beside the application.

Its keys are made here and known to both. It proves to be an address, not an identity; and where a kernel has no
WireGuard, or no `wg` is installed, it is not measured.
"""

from __future__ import annotations

import shutil
import subprocess
from typing import Final

from benchmarks.lab import congestion
from benchmarks.lab.sources import LabError
from benchmarks.lab.topology import PATH, entered
from benchmarks.peers.place import Place
from uproxy import sandbox

CLIENT, SERVER = "10.99.77.1", "10.99.77.2"
_PORT: Final = 51820
_LINK: Final = "wg-probe"


def why_not() -> str:
    """Why it cannot be measured here; empty when it can."""
    if shutil.which("wg", path=PATH) is None:
        return "wg is not installed: apt-get install wireguard-tools"
    made = subprocess.run(
        ["ip", "link", "add", _LINK, "type", "wireguard"],
        env={"PATH": PATH},
        capture_output=True,
        text=True,
        check=False,
    )
    if made.returncode:
        return f"this kernel has no WireGuard: {made.stderr.strip()}"
    subprocess.run(["ip", "link", "delete", _LINK], env={"PATH": PATH}, check=True)
    return ""


def start(client: Place, server: Place) -> str:
    """Set both ends up; its version, as `wg` says it. Raises LabError."""
    keys = {place.address: _wg("genkey") for place in (client, server)}
    for place, other, own, others in ((client, server, CLIENT, SERVER), (server, client, SERVER, CLIENT)):
        secret = place.directory / "wireguard.key"
        secret.touch(mode=0o600)
        secret.write_text(keys[place.address])
        public = _wg("pubkey", given=keys[other.address])
        sandbox.run_ip(
            [
                "link add wg0 type wireguard",
                f"address add {own}/32 dev wg0",
                "link set wg0 up",
                f"route add {others}/32 dev wg0",
            ],
            netns=place.box.netns,
        )
        with entered(place.box.netns_path):
            _wg(
                *("set", "wg0", "private-key", str(secret), "listen-port", str(_PORT)),
                *("peer", public, "endpoint", f"{other.address}:{_PORT}", "allowed-ips", f"{others}/32"),
            )
            congestion.use_cubic()
    return _wg("--version").split(" - ")[0]


def _wg(*words: str, given: str = "") -> str:
    """What `wg` prints. Raises LabError."""
    done = subprocess.run(
        ["wg", *words], env={"PATH": PATH}, input=given, capture_output=True, text=True, check=False, timeout=10
    )
    if done.returncode:
        raise LabError(f"wg {words[0]}: {done.stderr.strip()}")
    return done.stdout.strip()
