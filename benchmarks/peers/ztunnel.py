"""A pair of Istio's ztunnels, one for each workload, without Kubernetes and without Istio's control plane.

Written from ztunnel's source (src/config.rs, src/app.rs, src/xds.rs, src/state/workload.rs, src/identity/caclient.rs,
src/tls/{control,certificate}.rs, examples/localhost.yaml): no ztunnel has been run with it. Workloads come from a file
(LOCAL_XDS_PATH), certificates from control.py beside it, in the place of istiod, with the lab's CA. Connections are
captured as Istio does, by a redirect in the client's namespace.
"""

from __future__ import annotations

import subprocess
from pathlib import Path

import yaml

from benchmarks.lab.sources import TRUST_DOMAIN, LabError
from benchmarks.peers import control
from benchmarks.peers.place import Place
from control.api.address import HBONE_PORT

OUTBOUND_PORT = 15001
_NODE = "bench"


def environment(place: Place, config: Path) -> dict[str, str]:
    """What one ztunnel is told; the rest is as ztunnel has it by itself."""
    identity = place.identity
    name = identity.service_account
    return {
        "PROXY_MODE": "dedicated",
        "PROXY_WORKLOAD_INFO": f"{identity.namespace}/{name}/{name}",
        "LOCAL_XDS_PATH": str(config),
        # Empty: there is no configuration server.
        "XDS_ADDRESS": "",
        # It takes nothing but HTTPS; the name is the one in the certificate.
        "CA_ADDRESS": f"https://localhost:{control.PORT}",
        "CA_ROOT_CA": str(place.identity_dir / "bundle.pem"),
        "NODE_NAME": _NODE,
        "ISTIO_META_DNS_CAPTURE": "false",
        "IPV6_ENABLED": "false",
        # The client's address as the application's peer would need routes for the answers.
        "ENABLE_ORIG_SRC": "false",
        # One, as the Envoys have: all of a subject runs on one core.
        "ZTUNNEL_WORKER_THREADS": "1",
        "RUST_LOG": "warn",
    }


def workloads(*places: Place) -> str:
    """The file that LOCAL_XDS_PATH names: who is where, and that each takes HBONE."""
    listed = [
        {
            "uid": f"bench//v1/Pod/{place.identity.namespace}/{place.identity.service_account}",
            "name": place.identity.service_account,
            "namespace": place.identity.namespace,
            "serviceAccount": place.identity.service_account,
            "trustDomain": TRUST_DOMAIN,
            "workloadIps": [place.address],
            "protocol": "HBONE",
            "node": _NODE,
            "network": "",
            "services": {},
        }
        for place in places
    ]
    return yaml.safe_dump({"workloads": listed, "policies": [], "services": []}, sort_keys=False)


def start(program: Path, place: Place, *everybody: Place) -> subprocess.Popen[bytes]:
    """One ztunnel of the pair. Raises LabError."""
    config = place.directory / "workloads.yaml"
    config.write_text(workloads(*everybody))
    listens = [("127.0.0.1", OUTBOUND_PORT), (place.address, HBONE_PORT)]
    return place.start([str(program), "proxy", "ztunnel"], listens, environment(place, config))


def capture(place: Place, target: str, ports: range) -> None:
    """Send what this namespace dials at the target to its ztunnel. Raises LabError."""
    place.redirect("output", f"ip daddr {target} tcp dport {ports.start}-{ports.stop - 1}", OUTBOUND_PORT)


def version(program: Path) -> str:
    """As it says itself, in one line. Raises LabError when it cannot be run."""
    try:
        done = subprocess.run([str(program), "version"], capture_output=True, text=True, check=False, timeout=10)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise LabError(f"{program} cannot be asked for its version: {error}; give the path of a ztunnel") from error
    return f"ztunnel {next(iter((done.stdout or done.stderr).strip().splitlines()), '')}".strip()
