"""What every test shares: how hard hypothesis tries, and which tests need a machine like CI's."""

from __future__ import annotations

import os

import pytest
from hypothesis import HealthCheck, settings

# `make fuzz` chooses "deep". No deadline: the machines that run this are shared, and a slow example is no failure.
settings.register_profile("fast", max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("deep", max_examples=20_000, deadline=None, suppress_health_check=list(HealthCheck))
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "fast"))

_PRIVILEGED = ("root", "mesh")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skip privileged tests loudly where they cannot run, but in CI, where a skipped test would hide a failure."""
    if os.geteuid() == 0 or os.environ.get("CI"):
        return
    needs_root = pytest.mark.skip(reason="needs root, network namespaces and eBPF: run `make test` as root")
    for item in items:
        if any(item.get_closest_marker(name) for name in _PRIVILEGED):
            item.add_marker(needs_root)
