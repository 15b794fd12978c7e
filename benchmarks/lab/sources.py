"""Where a lab's proxies have their configuration and identities from: files that each reads, or the control plane."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import yaml

from control.api.identity import SpiffeId
from control.api.labels import NODE
from control.client import csr
from control.server.ca import Authority, write_identity

if TYPE_CHECKING:
    from benchmarks.lab.topology import Host, Lab, Workload

TRUST_DOMAIN = "lab.test"


class LabError(Exception):
    """The lab cannot be built here, or something in it did not start. The text holds the logs that say why."""


class Source(Protocol):
    """Gives the lab's processes their arguments, and takes what the mesh shall be."""

    def start(self, progress: Callable[[str], None]) -> None:
        """Make ready what must be there before the first node agent."""

    def configure(self, documents: Sequence[str]) -> None:
        """Set all resources of the mesh, in YAML. Takes effect live."""

    def node_arguments(self, host: Host) -> list[str]:
        """Of `uproxy node`."""

    def workload_arguments(self, workload: Workload) -> list[str]:
        """Of `uproxy exec`."""

    def identity_dir(self, workload: Workload) -> Path:
        """Where a workload's key and certificate are."""

    def authority(self) -> Authority:
        """The mesh's CA, for identities that a test makes by hand."""

    def logs(self) -> str: ...


class Files:
    """One YAML file that every process reads, and certificates that a CA on this machine wrote beforehand."""

    def __init__(self, lab: Lab) -> None:
        self._lab = lab
        self.file = lab.directory / "mesh.yaml"
        self._authority: Authority | None = None

    def start(self, progress: Callable[[str], None]) -> None:
        for workload in self._lab.workloads():
            issue(self.authority(), workload.identity, self.identity_dir(workload))
        progress(f"issued {len(self._lab.workloads())} identities")

    def configure(self, documents: Sequence[str]) -> None:
        fresh = self.file.with_suffix(".new")
        fresh.write_text("---\n".join(documents))
        fresh.chmod(0o644)
        fresh.rename(self.file)

    def authority(self) -> Authority:
        if self._authority is None:
            self._authority = Authority.create(self._lab.directory / "ca", TRUST_DOMAIN)
        return self._authority

    def node_arguments(self, host: Host) -> list[str]:
        return ["--trust-domain", TRUST_DOMAIN, "--config", str(self.file)]

    def workload_arguments(self, workload: Workload) -> list[str]:
        return [
            *["--namespace", workload.identity.namespace, "--service-account", workload.identity.service_account],
            *["--trust-domain", TRUST_DOMAIN, "--address", workload.address],
            *["--config", str(self.file), "--identity-dir", str(self.identity_dir(workload))],
        ]

    def identity_dir(self, workload: Workload) -> Path:
        return self._lab.directory / "identities" / workload.name

    def logs(self) -> str:
        return ""


def issue(authority: Authority, identity: SpiffeId, directory: Path, ttl_s: int = 24 * 3600) -> None:
    """A key, a CSR and a certificate, as an operator makes them by hand."""
    request = csr.make_request(directory, identity)
    write_identity(directory, authority.issue(request.read_bytes(), identity, ttl_s), authority.bundle_pem)


def entry(workload: Workload) -> str:
    """The WorkloadEntry of a workload of the lab, in YAML."""
    options = workload.options
    return yaml.safe_dump(
        {
            "apiVersion": "networking.istio.io/v1",
            "kind": "WorkloadEntry",
            "metadata": {
                "name": workload.name,
                "namespace": workload.identity.namespace,
                "labels": {"app": workload.name, NODE: workload.host.name, **options.labels},
            },
            "spec": {
                "address": workload.address,
                "serviceAccount": workload.identity.service_account,
                "ports": dict(options.ports or workload.app.ports),
            },
        }
    )
