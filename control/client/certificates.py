"""Keeps the certificate of a workload that has joined: gets the first, and each next one at half life.

`certify` does the work, in a child: what it imports is too large for a proxy. Whoever uses the certificate watches the
identity directory for the new one.
"""

from __future__ import annotations

import asyncio
import logging
import random
import ssl
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

from control.client.membership import CHAIN_FILE
from control.client.x509 import X509Error, read_leaf

# As ztunnel (SECRET_GRACE_PERIOD_RATIO): proxies that joined together do not renew together.
_SHARE_OF_LIFE: Final = 0.5
_JITTER: Final = 0.01
# Sleep no longer than this at once: a host that was suspended finds out soon after.
_LONGEST_SLEEP_S: Final = 60.0
_FIRST_RETRY_S: Final = 0.5
_LAST_RETRY_S: Final = 150.0
# A clock that is wrong, or a certificate that lives for seconds, must not start one child after the other.
_LEAST_PAUSE_S: Final = 0.2
_CHILD_TIMEOUT_S: Final = 75.0  # above `certify`'s own
JOIN_PATIENCE_S: Final = 60.0
"""How long `join` tries while the control plane does not answer. The same key gets the same certificate so long."""

_DONE, _REFUSED = 0, 2  # `certify`'s exit statuses; not imported, since that would import all it imports
_MAX_CHAIN_BYTES: Final = 256 * 1024

log = logging.getLogger(__name__)


class JoinError(Exception):
    """No certificate; the text says why."""


@dataclass(frozen=True, slots=True)
class _Failure:
    text: str
    final: bool
    """Whether asking again in the same way is of no use."""


async def join(identity_dir: Path, token_file: Path, patience_s: float = JOIN_PATIENCE_S) -> None:
    """Get the first certificate into an identity directory, trying again for a while. Raises JoinError."""
    loop = asyncio.get_running_loop()
    deadline = loop.time() + patience_s
    failures = 0
    while failure := await _certify("join", "--token-file", str(token_file), "--dir", str(identity_dir)):
        failures += 1
        pause_s = _retry_delay_s(failures)
        if failure.final or loop.time() + pause_s > deadline:
            raise JoinError(failure.text)
        log.warning("cannot join yet: %s", failure.text)
        await asyncio.sleep(pause_s)


async def fetch_token(agent_dir: Path, workload_key: str, token_file: Path) -> None:
    """Get a token for a waypoint's process into a file, with the certificate of its node's agent. Raises JoinError."""
    failure = await _certify("token", "--dir", str(agent_dir), "--for", workload_key, "--out", str(token_file))
    if failure is not None:
        raise JoinError(failure.text)


class Renewal:
    """Renews the certificate in an identity directory. What is there stays until there is a better one."""

    def __init__(self, identity_dir: Path, now: Callable[[], float] = time.time) -> None:
        """`now`: Unix time in seconds."""
        self._directory = identity_dir
        self._now = now
        self._share = random.uniform(_SHARE_OF_LIFE - _JITTER, _SHARE_OF_LIFE + _JITTER)
        self.problem = ""
        """Why the last attempt failed; empty once the certificate is fresh."""

    async def run(self) -> None:
        """Renew whenever it is due, until cancelled."""
        failures = 0
        while True:
            due_at = self._due_at()
            if self._now() < due_at:
                failures, self.problem = 0, ""
                await asyncio.sleep(min(due_at - self._now(), _LONGEST_SLEEP_S))
                continue
            failure = await _certify("renew", "--dir", str(self._directory))
            if failure is None:
                log.info("the certificate was renewed")
                await asyncio.sleep(_LEAST_PAUSE_S)
                continue
            failures += 1
            self._report(failure)
            await asyncio.sleep(_LAST_RETRY_S if failure.final else _retry_delay_s(failures))

    def _due_at(self) -> float:
        """Unix time; 0 when the certificate cannot be read, since a new one is then due."""
        life = self._life()
        return life[0] + (life[1] - life[0]) * self._share if life is not None else 0.0

    def _life(self) -> tuple[float, float] | None:
        """When the certificate came here and when it ends. CAs date it back, for peers whose clocks are behind."""
        try:
            with (self._directory / CHAIN_FILE).open("rb") as file:
                pem = file.read(_MAX_CHAIN_BYTES).decode("ascii")
            end = pem.index("-----END CERTIFICATE-----") + len("-----END CERTIFICATE-----")
            leaf = read_leaf(ssl.PEM_cert_to_DER_cert(pem[pem.index("-----BEGIN CERTIFICATE-----") : end]))
            written_at = (self._directory / CHAIN_FILE).stat().st_mtime
        except (OSError, ValueError, X509Error):
            return None
        # A file from the future was touched, or the clock was set back: trust the certificate.
        came_at = written_at if leaf.not_before <= written_at <= self._now() else leaf.not_before
        return came_at, leaf.not_after

    def _report(self, failure: _Failure) -> None:
        life = self._life()
        if life is None:
            self.problem = f"the certificate cannot be read, nor renewed: {failure.text}"
        elif self._now() >= life[1]:
            self.problem = f"the certificate has ended, and cannot be renewed: {failure.text}"
        else:
            end = datetime.fromtimestamp(life[1], UTC)
            self.problem = f"the certificate ends at {end:%Y-%m-%d %H:%M:%S} UTC, and cannot be renewed: {failure.text}"
        late = life is None or self._now() > life[1] - (life[1] - life[0]) / 4
        log.log(logging.ERROR if late else logging.WARNING, "%s", self.problem)


def _retry_delay_s(failures: int) -> float:
    """Doubling, and random by half, so that many do not come at once to a control plane that is back."""
    return min(_LAST_RETRY_S, _FIRST_RETRY_S * 2.0 ** min(failures - 1, 16)) * random.uniform(0.5, 1.0)


async def _certify(*arguments: str) -> _Failure | None:
    """Run `certify`; None when it is done. A child that is not waited for any more is killed."""
    try:
        child = await asyncio.create_subprocess_exec(
            sys.executable,
            "-I",  # a module in the working directory must not stand in for one of ours
            "-X",
            "utf8",
            "-m",
            "control.client.certify",
            *arguments,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.PIPE,
            env={},
        )
    except OSError as error:  # no memory, process or descriptor left; or Python itself is being replaced
        return _Failure(f"{sys.executable} cannot be started: {error.strerror}", final=False)
    try:
        async with asyncio.timeout(_CHILD_TIMEOUT_S):
            _, said = await child.communicate()
    except TimeoutError:
        return _Failure(f"it took more than {_CHILD_TIMEOUT_S:.0f} s", final=False)
    finally:
        if child.returncode is None:
            child.kill()
            await child.wait()
    if child.returncode == _DONE:
        return None
    last_line = said.decode(errors="replace").strip().rpartition("\n")[2].removeprefix("error: ")
    text = last_line or f"`certify` ended with status {child.returncode}"
    return _Failure(text, final=child.returncode == _REFUSED)
