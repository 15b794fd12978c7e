"""Whoever probes the health of workloads: cgroups whose connections are admitted, to declared ports.

No workload may be one of them, whichever comes first: it is refused, or the cgroup that has it is left alone.
`probers/<cgroup id>` in the pin directory is the link. It outlives the agent, as capture does. A prober that is
restarted may come back in a new cgroup of the same path, so the paths are looked at now and then.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Final

from bpf.libbpf import BpfError, Link
from bpf.loader import PROBE_HOOK, Loader
from uproxy.node.places import Cgroup, PlaceError, cgroup_by_id
from uproxy.node.workloads import Captured

_log: Final = logging.getLogger(__name__)


class Probers:
    """The cgroups at some paths, as far as they are there."""

    def __init__(
        self, loader: Loader, pins: Path, paths: Sequence[Path], registered: Callable[[], Iterable[Captured]]
    ) -> None:
        """Takes over the pins of an earlier agent: those at these paths get this agent's program, others go.

        `registered`: the workloads of the moment.
        """
        self._program = loader.program(PROBE_HOOK)
        self._pins = pins
        self._paths = paths
        self._registered = registered
        self._problems: list[str] = []
        with self._there() as cgroups:
            for pin in sorted(pins.iterdir()):
                probers = [one for one in cgroups.values() if str(one.id) == pin.name]
                if not probers or self._workload_in(probers[0]):
                    pin.unlink()
                    continue
                with Link.open_pinned(pin) as link:
                    link.update(self._program)
        self.look()

    def look(self) -> None:
        """Attaches to what has come, and lets go of what is gone."""
        problems = []
        with self._there() as cgroups:
            for path in self._paths:
                if path not in cgroups:
                    problems.append(f"--probe-cgroup {path}: is not there, so that no health probe from it is admitted")
                    continue
                try:
                    self._attach(cgroups[path])
                except (BpfError, PlaceError) as error:
                    problems.append(f"--probe-cgroup {path}: {error}")
            for pin in sorted(self._pins.iterdir()):
                if pin.name not in {str(one.id) for one in cgroups.values()}:
                    pin.unlink()
        for problem in problems:
            if problem not in self._problems:
                _log.warning("%s", problem)
        self._problems = problems

    def problems(self) -> list[str]:
        """Which paths are not attached to, and why."""
        return list(self._problems)

    def check(self, workload: Cgroup) -> None:
        """Raises PlaceError for a workload that has a cgroup with a prober's: it would be a prober too."""
        with self._there() as cgroups:
            for path, cgroup in cgroups.items():
                if workload.is_related(cgroup):
                    raise PlaceError(
                        f"{workload.path} and --probe-cgroup {path} contain one another: the workload would be let in "
                        "wherever health probes are. Name the prober's own cgroup"
                    )

    def _attach(self, cgroup: Cgroup) -> None:
        """Raises PlaceError when it has a workload."""
        pin = self._pins / str(cgroup.id)
        if not pin.exists():
            workload = self._workload_in(cgroup)
            if workload:
                raise PlaceError(
                    f"workload {workload} is in it, or around it, and would be let in wherever health probes are; no "
                    "probe from it is admitted. Name the prober's own cgroup"
                )
            with self._program.attach_cgroup(cgroup.fd) as link:
                link.pin(pin)
            _log.info("health probes from %s are admitted", cgroup.path)

    def _workload_in(self, prober: Cgroup) -> str:
        """A workload that has a cgroup with a prober's; empty when none has."""
        for workload in self._registered():
            for cgroup_id in (workload.app_cgroup, workload.proxy_cgroup):
                with cgroup_by_id(cgroup_id) as fd:
                    if fd is not None and Cgroup.of(fd, f"workload {workload.name}").is_related(prober):
                        return workload.name
        return ""

    @contextmanager
    def _there(self) -> Iterator[Mapping[Path, Cgroup]]:
        found = {}
        with ExitStack() as stack:
            for path in self._paths:
                try:
                    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
                except FileNotFoundError:
                    continue
                stack.callback(os.close, fd)
                found[path] = Cgroup.of(fd, f"--probe-cgroup {path}")
            yield found
