"""A pair of Istio's ztunnels, one for each workload, without Kubernetes and without Istio's control plane.

Written from ztunnel's source (src/config.rs, src/state/workload.rs, src/app.rs, examples/localhost.yaml): no ztunnel
has been run with it. Workloads come from a file (LOCAL_XDS_PATH), certificates from ztunnel's own test CA (FAKE_CA), so
the binary has to be built with `cargo build --release --features testing`; a released one ends with a message that says
so. Connections are captured as Istio does, by a redirect in the client's namespace.
"""

from __future__ import annotations

import subprocess
from pathlib import Path

import yaml

from benchmarks.lab.sources import TRUST_DOMAIN, LabError
from benchmarks.lab.topology import PATH, entered
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
        # Empty: neither Istio's configuration server nor its CA is there.
        "XDS_ADDRESS": "",
        "CA_ADDRESS": "",
        "FAKE_CA": "true",
        "NODE_NAME": _NODE,
        "TRUST_DOMAIN": TRUST_DOMAIN,
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
    """Send what this namespace dials at the target to its ztunnel; it finds where to by SO_ORIGINAL_DST."""
    rules = f"""\
table ip ztunnel {{
    chain output {{
        type nat hook output priority -100;
        ip daddr {target} tcp dport {ports.start}-{ports.stop - 1} redirect to :{OUTBOUND_PORT}
    }}
}}
"""
    try:
        with entered(place.box.netns_path):
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
        raise LabError("ztunnel's capture needs nftables: apt-get install nftables") from None
    except subprocess.CalledProcessError as error:
        raise LabError(f"nft cannot redirect to ztunnel here: {error.stderr.strip()}") from error


def version(program: Path) -> str:
    """As it says itself, in one line. Raises LabError when it cannot be run."""
    try:
        done = subprocess.run([str(program), "version"], capture_output=True, text=True, check=False, timeout=10)
    except OSError as error:
        raise LabError(f"{program} cannot be run: {error.strerror}; give the path of a ztunnel binary") from error
    return (
        f"ztunnel {(done.stdout or done.stderr).strip().splitlines()[0] if done.stdout or done.stderr else ''}".strip()
    )
