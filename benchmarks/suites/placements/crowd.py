"""Many workloads on a host, and what each placement would run for them, side by side and without load.

Half of the workloads call, half are called, and any two of one kind are a service account's. Every uProxy, node agent
and waypoint of ours has joined one control plane; Envoys have their configuration from files.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Final

from benchmarks.lab.apps import commands
from benchmarks.lab.control import ControlPlane
from benchmarks.lab.topology import Host, Lab, Workload
from benchmarks.lab.waypoints import Waypoint, config_dump
from benchmarks.suites.placements import envoys
from benchmarks.suites.placements.application import INSTANCES, SERVICES, Member
from benchmarks.suites.placements.envoys import INBOUND_PORT, LOOPBACK, Endpoint
from benchmarks.suites.placements.mesh import BESIDE, GATEWAY
from benchmarks.suites.placements.placement import Envoy
from benchmarks.suites.placements.standing import admin_socket, issue_key, start_envoy
from control.api.gateway import Placement
from uproxy.sandbox import NETNS_DIR

_ENVOYS_ACCOUNTS: Final = (SERVICES[0].caller, SERVICES[0].name, SERVICES[1].caller, SERVICES[1].name)
"""An Envoy's configuration knows these four: for the fifth it is as for the first."""
_AT_ONCE: Final = 10
"""Workloads that are started together."""
_START_S: Final = 60.0
_PORT, _PORT_BESIDE = 8080, 8081

_ENDPOINTS: Final[Mapping[str, Sequence[Endpoint]]] = {
    service.name: [
        Endpoint(Member(service.name, number, f"10.128.{at}.{number}"), f"10.128.{at}.{number}", INBOUND_PORT)
        for number in range(1, INSTANCES + 1)
    ]
    for at, service in enumerate(SERVICES)
}
"""What each of their callers calls: two services, of two instances each."""

PLACED: Final = {
    "ours": Placement.REMOTE,
    "ours-node": Placement.NODE,
    "ours-service-account": Placement.SERVICE_ACCOUNT,
}
"""Gateways of ours whose processes stand by themselves."""


@dataclass(frozen=True, slots=True)
class Envoys:
    """Those that run, in the order of workloads and of accounts."""

    sidecars: Sequence[Envoy]
    of_accounts: Sequence[Envoy]
    of_nodes: Mapping[int, Envoy]
    """By how many workloads there are."""
    waypoint: Envoy


def account_of(number: int) -> int:
    """Of the workload of this number, from 0. Even workloads call, and so do even accounts."""
    return number // 4 * 2 + number % 2


def accounts(workloads: int) -> int:
    """How many the first so many workloads have."""
    return len({account_of(number) for number in range(workloads)})


# -- uProxies, and what is ours between and beside them


def workloads(host: Host, kind: str, count: int, *launch: str) -> list[Workload]:
    """Declare them; `launch`: options of `uproxy exec`."""
    return [
        host.workload(
            f"{kind}-{number}",
            commands.idle(),
            service_account=f"a{account_of(number)}",
            labels={"account": f"a{account_of(number)}"},
            launch=launch,
        )
        for number in range(count)
    ]


def launch(lab: Lab, some: Sequence[Workload]) -> None:
    """Start them, a few at once. Raises LabError."""
    for begin in range(0, len(some), _AT_ONCE):
        batch = some[begin : begin + _AT_ONCE]
        for one in batch:
            one.launch()
        lab.wait([one.running for one in batch], _START_S, "the workloads")


def _behind(gateway: str, workloads: int) -> str:
    """A service of each account that is called."""
    return "---\n".join(_service(account, gateway) for account in range(1, accounts(workloads), 2))


def _service(account: int, gateway: str) -> str:
    gateways = [*PLACED, BESIDE]
    port = _PORT_BESIDE if gateway == BESIDE else _PORT
    return f"""\
apiVersion: v1
kind: Service
metadata: {{name: s{account}-{gateway}, namespace: default, labels: {{istio.io/use-waypoint: {gateway}}}}}
spec:
  clusterIP: 240.240.{gateways.index(gateway) + 1}.{account}
  selector: {{account: a{account}}}
  ports: [{{name: http, port: {port}, targetPort: {port}}}]
"""


def start_waypoints(control: ControlPlane, host: Host, elsewhere: Host) -> dict[str, list[Waypoint]]:
    """Gateway -> its processes for this host's workloads; of a remote one elsewhere. Raises LabError."""
    ofs = [f"a{account}" for account in range(1, accounts(len(host.workloads)), 2)]
    made = {
        "ours": [Waypoint(control, elsewhere, "ours")],
        "ours-node": [Waypoint(control, host, "ours-node")],
        "ours-service-account": [
            Waypoint(control, host, "ours-service-account", account, number + 1) for number, account in enumerate(ofs)
        ],
    }
    for gateway, some in made.items():
        instances = [f"{one.name}={one.address}@{one.node}{f'/{one.account}' if one.account else ''}" for one in some]
        placement = PLACED[gateway].value
        control.meshctl("waypoint", "apply", gateway, "--placement", placement, "--instance", *instances)
    for one in (one for some in made.values() for one in some):
        one.launch()
    for one in (one for some in made.values() for one in some):
        one.await_ready()
    control.apply("---\n".join(_behind(gateway, len(host.workloads)) for gateway in made))
    return made


def put_beside(lab: Lab, control: ControlPlane, kinds: Collection[Sequence[Workload]]) -> None:
    """Have our process stand beside each workload that is called, and return when all do. Raises LabError.

    `kinds`: alike workloads, in the order of their numbers.
    """
    control.meshctl("waypoint", "apply", BESIDE, "--placement", Placement.SIDECAR.value)
    control.apply(_behind(BESIDE, max(map(len, kinds))))
    # Called are those of odd numbers.
    lab.wait(
        [partial(_has_beside, one) for some in kinds for one in some[1::2]], _START_S, "our processes beside workloads"
    )


def _has_beside(workload: Workload) -> bool:
    beside = config_dump(workload.box.netns_path).get("beside")
    return beside is not None and not beside["missing"]


# -- Envoys


def start_envoys(lab: Lab, host: Host, elsewhere: Host, sizes: Sequence[int]) -> Envoys:
    """All of them. Raises LabError."""
    members = [
        Member(_ENVOYS_ACCOUNTS[account_of(number) % len(_ENVOYS_ACCOUNTS)], number + 1, f"127.0.1.{number + 1}")
        for number in range(max(sizes))
    ]
    of_accounts: list[list[Member]] = [[] for _ in range(accounts(len(members)))]
    for number, one in enumerate(members):
        of_accounts[account_of(number)].append(one)
    address = elsewhere.underlay_address
    config = envoys.waypoint(address, _ENDPOINTS, issue_key(lab, GATEWAY, GATEWAY), admin_socket(lab, GATEWAY))
    started = Envoys(
        [_beside(lab, host, f"sidecar.{one.name}", LOOPBACK, one.address, [one]) for one in members],
        [
            _beside(lab, host, f"account.{number}", f"127.0.2.{number + 1}", f"127.0.2.{number + 1}", some)
            for number, some in enumerate(of_accounts)
        ],
        {
            size: _beside(lab, host, f"node.{size}", f"127.0.3.{size}", f"127.0.3.{size}", members[:size])
            for size in sizes
        },
        start_envoy(lab, config, GATEWAY, "waypoint", elsewhere.name, NETNS_DIR / elsewhere.netns, 0),
    )
    every = [*started.sidecars, *started.of_accounts, *started.of_nodes.values(), started.waypoint]
    lab.wait([one.ready for one in every], _START_S, "the Envoys")
    return started


def _beside(lab: Lab, host: Host, label: str, entry: str, address: str, members: Sequence[Member]) -> Envoy:
    """One for these workloads, configured as the suite's own."""
    keys = {one.account: issue_key(lab, label, one.account) for one in members}
    config = envoys.beside(entry, address, members, _ENDPOINTS, keys, admin_socket(lab, label))
    return start_envoy(lab, config, label, "proxy", host.name, NETNS_DIR / host.netns, 0)
