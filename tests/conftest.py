"""What every test shares: how hard hypothesis tries, and which tests need a machine like CI's."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Generator

import pytest
from hypothesis import HealthCheck, settings
from xdist.remote import Producer
from xdist.scheduler import LoadScopeScheduling

from tests.support.examples import DEEP, FAST
from uproxy import linux

# `make properties` chooses "deep", which tries other examples each time. The usual run tries the same, so that what
# is green stays green until somebody changes it. No deadline: machines are shared, and a slow example is no failure.
settings.register_profile(
    "fast", max_examples=FAST, derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.register_profile("deep", max_examples=DEEP, deadline=None, suppress_health_check=list(HealthCheck))
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "fast"))

_PRIVILEGED = ("root", "mesh")
_LABS = ("tests/mesh/", "tests/benchmarks/suites/")


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """More than cores, since tests wait a lot. None without a network for each: tests listen on the mesh's ports."""
    return (os.cpu_count() or 1) + 1 if os.geteuid() == 0 else 0


class _ByFile(LoadScopeScheduling):
    """Files run side by side, but those that make labs: of either directory one at a time, or they would take long."""

    def _split_scope(self, nodeid: str) -> str:
        labs = next((directory for directory in _LABS if nodeid.startswith(directory)), "")
        return labs or nodeid.partition("::")[0]


def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> _ByFile:
    return _ByFile(config, log)


def pytest_configure(config: pytest.Config) -> None:
    if hasattr(config, "workerinput"):
        linux.unshare(linux.CLONE_NEWNET)
        # A host has an address, by which workloads know it.
        for command in ("link set lo up", "address add 198.18.0.1/32 dev lo"):
            subprocess.run(["ip", *command.split()], check=True)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """As root, a privileged test that skips itself has failed."""
    report = yield
    if report.skipped and os.geteuid() == 0 and any(item.get_closest_marker(name) for name in _PRIVILEGED):
        report.outcome = "failed"
    return report


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skip privileged tests loudly where they cannot run, but in CI, where a skipped test would hide a failure.

    Labs come first: they take longest of what stays together.
    """
    items.sort(key=lambda item: not item.nodeid.startswith(_LABS))
    if os.geteuid() == 0 or os.environ.get("CI"):
        return
    needs_root = pytest.mark.skip(reason="needs root, network namespaces and eBPF: run `make test` as root")
    for item in items:
        if any(item.get_closest_marker(name) for name in _PRIVILEGED):
            item.add_marker(needs_root)
