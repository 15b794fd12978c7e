"""Several generators at once, of callers of one subject: what they found, as if it were one."""

from __future__ import annotations

import contextlib
import select
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from benchmarks import load
from benchmarks.harness import histogram
from benchmarks.harness.bench import BenchError, Sample
from benchmarks.harness.results import UNSUSTAINED
from benchmarks.load import LoadError, Outcome

Started = Callable[[], "subprocess.Popen[bytes]"]
"""Starts one of the generators where it belongs, with pipes for its output; and for its input, if it waits."""

_GRACE_S = 45.0
"""Of a generator, as the wrapper of one gives it."""


@dataclass(frozen=True, slots=True)
class Together:
    """Their outcomes, and the time in which all of them counted, on CLOCK_MONOTONIC in ns: they begin one by one."""

    outcomes: Sequence[Outcome]
    counted: tuple[int, int]

    @property
    def seconds(self) -> float:
        return (self.counted[1] - self.counted[0]) / 1e9

    @property
    def per_second(self) -> float:
        return sum(one.operations / one.seconds for one in self.outcomes)

    def sample(self, key: str, busy_ns: float) -> Sample:
        """`key`: the detail that is the value. `busy_ns`: of the applications, which share the generators' core."""
        found = histogram.merge(one.histogram for one in self.outcomes)
        details = self._details(found, busy_ns)
        return Sample(
            value=details[key],
            operations=self.per_second * self.seconds,
            details=details,
            histogram=found,
            bottleneck=self._bottleneck(details["load_core_share"]),
            counted=self.counted,
        )

    def _details(self, found: histogram.Histogram, busy_ns: float) -> dict[str, float]:
        percentiles = {"p50_us": 0.5, "p90_us": 0.9, "p99_us": 0.99, "p999_us": 0.999}
        details = {name: histogram.percentile(found, share) / 1000 for name, share in percentiles.items()}
        details["max_us"] = max(one.max_us for one in self.outcomes)
        details["mean_us"] = histogram.mean(found) / 1000
        details["per_second"] = self.per_second
        details |= load.punctual(histogram.merge(one.punctual for one in self.outcomes))
        details["late_p99_us"] = max(one.generator.late_p99_us for one in self.outcomes)
        details["behind_share"] = max(one.generator.behind_s / one.seconds for one in self.outcomes)
        details["load_core_share"] = (
            sum(one.generator.cpu_share for one in self.outcomes) + busy_ns / 1e9 / self.seconds
        )
        return details

    def _bottleneck(self, share: float) -> str:
        if share >= load.BUSIEST:
            return f"generators and applications used {share:.0%} of their core"
        found = [one.bottleneck for one in self.outcomes if one.bottleneck]
        own = [one for one in found if not one.startswith(UNSUSTAINED)]
        if own or not found:
            return next(iter(own), "")
        behind_s = max(one.generator.behind_s for one in self.outcomes)
        return load.unsustained(sum(one.rate for one in self.outcomes), behind_s)


def start_together(subject: str, started: Sequence[subprocess.Popen[bytes]]) -> None:
    """Tell those that wait to begin, once all of them can. Raises BenchError."""
    waiting = [(one.stdin, one.stdout) for one in started if one.stdin is not None and one.stdout is not None]
    end = time.monotonic() + _GRACE_S
    for _, told in waiting:
        if not select.select([told], [], [], max(end - time.monotonic(), 0.0))[0]:
            raise BenchError(f"{subject}: its callers' connections did not stand within {_GRACE_S:g} s")
        told.readline()  # or its end, and the reason is in its other output
    for asked, _ in waiting:
        with contextlib.suppress(BrokenPipeError):
            asked.write(b"\n")
            asked.flush()


def end_all(started: Sequence[subprocess.Popen[bytes]]) -> None:
    """Whoever still runs."""
    for process in started:
        if process.poll() is None:
            process.kill()
            process.communicate()


def run_together(
    subject: str, callers: Mapping[str, Started], seconds: float, *, all_answered: bool = True
) -> Together:
    """Raises BenchError when a generator failed, or a request did and `all_answered` is asked for."""
    started: list[subprocess.Popen[bytes]] = []
    outcomes = []
    try:
        started += [start() for start in callers.values()]
        start_together(subject, started)
        for caller, process in zip(callers, started, strict=True):
            out, err = process.communicate(timeout=seconds * 1.1 + _GRACE_S)
            if process.returncode:
                raise BenchError(f"{subject}: {caller}: {err.decode().strip()}")
            outcomes.append(load.parse(out.decode()))
            if all_answered and (failed := dict(outcomes[-1].errors)):
                raise BenchError(f"{subject}: requests of {caller} failed: {failed}")
    except (LoadError, subprocess.TimeoutExpired) as error:
        raise BenchError(f"{subject}: {error}") from error
    finally:
        end_all(started)
    # They began one after the other: only the time in which all of them counted is divided by.
    found = Together(outcomes, (max(one.start_ns for one in outcomes), min(one.end_ns for one in outcomes)))
    if found.seconds < seconds / 4:
        raise BenchError(f"{subject}: its callers shared only {found.seconds:.2f} s of {seconds:g} s")
    return found
