"""What policies in dry run would do: each answer counted, and told where it is another one. No I/O."""

from __future__ import annotations

from uproxy.rules import Decision
from uproxy.telemetry import Telemetry


class Rehearsals:
    """Those of one process."""

    def __init__(self, telemetry: Telemetry) -> None:
        self.allowed = self.denied = 0
        telemetry.counter(
            "uproxy_dry_run_allowed_total",
            "Connections and requests that would be allowed if policies in dry run were enforced",
            lambda: self.allowed,
        )
        telemetry.counter(
            "uproxy_dry_run_denied_total",
            "Connections and requests that would be denied if policies in dry run were enforced",
            lambda: self.denied,
        )

    def note(self, decision: Decision, would: Decision) -> str:
        """`would`: what would be decided. For the access log; empty where it is the same."""
        if would.allowed:
            self.allowed += 1
        else:
            self.denied += 1
        return difference(decision, would)


def difference(decision: Decision, would: Decision) -> str:
    """What would be decided otherwise, and by which rule; empty where it is the same."""
    return "" if would.allowed is decision.allowed else f"{'allowed' if would.allowed else 'denied'}: {would.reason}"
