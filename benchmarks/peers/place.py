"""Where a peer's process runs: a place of a lab that looks like a workload's, without a uProxy."""

from __future__ import annotations

import socket
import subprocess
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from benchmarks.lab.sources import TRUST_DOMAIN, LabError
from benchmarks.lab.topology import PATH, Host, Lab, entered, tail
from control.api.identity import SpiffeId
from uproxy.sandbox import Sandbox

Address = tuple[str, int]

_START_S = 20.0
_POLL_S = 0.01


@dataclass(frozen=True, slots=True)
class Place:
    """One side of a pair of peers: a namespace with an address, and the identity of its workload."""

    lab: Lab
    box: Sandbox
    identity: SpiffeId
    identity_dir: Path
    """chain.pem, key.pem and bundle.pem, of the lab's CA."""

    @classmethod
    def make(cls, host: Host, name: str, account: str) -> Place:
        """On a host, with the identity of the service account `account` in the namespace `default`."""
        identity = SpiffeId.parse(f"spiffe://{TRUST_DOMAIN}/ns/default/sa/{account}")
        directory = host.lab.directory / "identities" / f"peer-{name}"
        host.lab.issue(identity, directory)
        return cls(host.lab, host.twin(name), identity, directory)

    @property
    def address(self) -> str:
        return self.box.addresses[0]

    @property
    def directory(self) -> Path:
        """For configuration and logs."""
        made = self.lab.directory / "peers" / self.box.workload
        made.mkdir(parents=True, exist_ok=True)
        return made

    @property
    def log(self) -> Path:
        return self.directory / "log"

    @property
    def control_log(self) -> Path:
        """Of what stands for the peer's control plane."""
        return self.directory / "control.log"

    @property
    def access_log(self) -> Path:
        """A line for each connection, of a peer that writes them to a file of its own."""
        return self.directory / "access.log"

    def start(
        self,
        argv: Sequence[str],
        listens: Sequence[Address],
        environment: Mapping[str, str] | None = None,
        *,
        log: Path | None = None,
    ) -> subprocess.Popen[bytes]:
        """The peer's process, once it accepts connections at these addresses. Raises LabError with its log.

        `log`: of another process than the proxy, beside it.
        """
        written = log or self.log
        given = [f"{name}={value}" for name, value in (environment or {}).items()]
        # In a session of its own, as a uProxy is: where the kernel shares processors out by session (sched_autogroup),
        # a proxy among the generator's processes would be scheduled otherwise. `env` becomes what is named.
        command = ["setsid", "env", *given, *argv]
        with written.open("wb") as output:
            process = self.lab.spawn(
                command,
                self.box.netns_path,
                str(self.box.proxy_cgroup.relative_to(self.lab.names.cgroup)),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
            )
        deadline = time.monotonic() + _START_S
        for address in listens:
            while not self.accepts(address):
                if process.poll() is not None or time.monotonic() > deadline:
                    raise LabError(
                        f"{Path(argv[0]).name} does not listen at {address[0]}:{address[1]} "
                        f"(exit status {process.poll()}):\n{tail(written)}"
                    )
                time.sleep(_POLL_S)
        return process

    def redirect(self, hook: str, matching: str, port: int) -> None:
        """Send connections to a port here instead; who accepts them learns where to by SO_ORIGINAL_DST.

        `hook`: "output", of what is dialled in this namespace, or "prerouting", of what arrives. Raises LabError.
        """
        rules = f"""\
table ip {hook} {{
    chain {hook} {{
        type nat hook {hook} priority -100;
        {matching} redirect to :{port}
    }}
}}
"""
        try:
            with entered(self.box.netns_path):
                subprocess.run(
                    ["nft", "-f", "-"],
                    env={"PATH": PATH},
                    input=rules,
                    text=True,
                    check=True,
                    capture_output=True,
                    timeout=10,
                )
        except FileNotFoundError:
            raise LabError("capturing by a redirect needs nftables: apt-get install nftables") from None
        except subprocess.CalledProcessError as error:
            raise LabError(f"nft cannot redirect here: {error.stderr.strip()}") from error

    def accepts(self, address: Address) -> bool:
        with suppress(OSError), entered(self.box.netns_path), socket.create_connection(address, 1.0):
            return True
        return False
