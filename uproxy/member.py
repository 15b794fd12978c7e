"""A proxy's life as a member of a mesh: what it knows, whom it hears it from, how it stays certified, what it reports.

`run` and the node agent use it; each says through `replica` what it wants to know.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

import uproxy
from control import durable
from control.api import messages, records, status
from control.api.identity import proxy_hash
from control.api.messages import Envelope, Stamp
from control.api.policy import DEFAULT_ROOT_NAMESPACE
from control.api.revocations import Revocations
from control.api.status import Kind, Knowledge, ProxyStatus, root_title
from control.api.topics import RevocationsTopic, StatusTopic, format_topic
from control.client import snapshot
from control.client.certificates import Renewal
from control.client.libcrypto import ConfigVerifier
from control.client.membership import Membership
from control.client.mqtt import BrokerAccess
from control.client.replica import Batch, Replica
from control.client.snapshot import SnapshotError
from control.client.subscriber import Subscriber
from uproxy.credentials import CurrentCredentials
from uproxy.tls import REVOCATIONS_FILE, broker_context, crl_pem

STATE_FILE: Final = "state"
# A change is on disk soon after, and a busy mesh does not keep the disk busy.
_SAVE_DELAY_S: Final = 1.0
_SAVE_INTERVAL_S: Final = 5.0

log = logging.getLogger(__name__)


class Member:
    """One proxy's place in the mesh. All of it belongs to the loop."""

    def __init__(
        self,
        kind: Kind,
        membership: Membership,
        identity_dir: Path,
        credentials: CurrentCredentials,
        on_batch: Callable[[Batch], None],
        on_progress: Callable[[], None] = lambda: None,
        problems: Callable[[], Sequence[str]] = tuple,
        in_force: Callable[[Knowledge], Knowledge] = lambda known: known,
    ) -> None:
        """`on_batch` takes configuration; `on_progress` is told that the replica may have learnt something, batch or no
        batch. `problems`: the proxy's own, for its report. `in_force`: how much of what the replica knows holds for
        every connection by now; only that is reported. When it is more than it was, call `in_force_changed`.
        """
        trust_domain = membership.identity.trust_domain
        self.replica = Replica(trust_domain, ConfigVerifier(trust_domain, lambda: credentials.value.roots))
        self._kind = kind
        self._key = membership.key
        self._topic = format_topic(trust_domain, StatusTopic(proxy_hash(membership.identity), membership.workload))
        self._credentials = credentials
        self._on_batch = on_batch
        self._on_progress = on_progress
        self._own_problems = problems
        self._in_force = in_force
        self._started_at = int(time.time())
        self._applied_at = 0
        self._told = self._knowledge()
        self._state_file = identity_dir / STATE_FILE
        self._unsaved = asyncio.Event()
        self._saving_problem = ""
        self._duties: list[asyncio.Task[None]] = []
        """What only one process of a workload may do."""
        self._left = False
        self._trust_domain = trust_domain
        self._revocations = format_topic(trust_domain, RevocationsTopic(DEFAULT_ROOT_NAMESPACE))
        self._revocations_file = identity_dir / REVOCATIONS_FILE
        self._revocations_problem = ""
        self._renewal = Renewal(identity_dir)
        access = BrokerAccess(membership.brokers, membership.identity, lambda: broker_context(credentials.value))
        self._subscriber = Subscriber(self.replica, access, self._apply, self._report, on_progress=self._progress)

    def restore(self) -> None:
        """Take up the last good state, if there is one, after the replica was asked for the base."""
        try:
            content = snapshot.read(self._state_file)
            batches = self.replica.restore(content) if content is not None else ()
        except (OSError, SnapshotError) as error:
            log.error("%s cannot be used, and the control plane is asked for everything: %s", self._state_file, error)
            return
        for batch in batches:
            self._applied_at = self._started_at
            self._on_batch(self._without_revocations(batch))
        if self.replica.based:
            log.info("configured from %s as of %s", self._state_file, self._stamps())

    async def run(self) -> None:
        """Follow the control plane, until cancelled; what is known by then is on disk."""
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._subscriber.run())
                self._duties = [group.create_task(self._renewal.run()), group.create_task(self._keep_saved())]
        finally:
            if self._unsaved.is_set() and not self._left:
                self._save(self.replica.dump())

    async def save(self) -> None:
        """Have what is known on disk, now."""
        await asyncio.to_thread(self._save, self.replica.dump())

    def leave(self) -> None:
        """Another process renews the certificate, keeps the state and reports from here on; this one only follows."""
        self._left = True
        for duty in self._duties:
            duty.cancel()
        self._subscriber.fall_silent()

    def interests_changed(self) -> None:
        """The replica was asked for more, or for less."""
        self._subscriber.interests_changed()
        self._unsaved.set()

    def renewed(self) -> None:
        """There is a new certificate."""
        self._subscriber.certificate_renewed()

    def in_force_changed(self) -> None:
        """More of what is known is in force, or less."""
        self._subscriber.status_changed()

    def known(self) -> Knowledge:
        """All that the replica knows, in force or not."""
        return Knowledge(self.replica.whole, self.replica.waiting(), self.replica.roots())

    @property
    def connected(self) -> bool:
        """Whether a broker is there, and lets us read."""
        return self._subscriber.connected

    @property
    def age_s(self) -> float:
        """Seconds since the control plane last vouched for what is applied; NaN before anything is."""
        age = self.replica.age_s(time.time())
        return float("nan") if age is None else age

    def problems(self) -> tuple[str, ...]:
        """What somebody should look at, the worst last."""
        own = [*self._own_problems(), self._saving_problem, self._renewal.problem]
        own += [self._revocations_problem, self._credentials.problem]
        return (*self.replica.problems(), *self._subscriber.problems(), *(text for text in own if text))

    def dump(self) -> dict[str, object]:
        """All of it, for operators."""
        age = self.replica.age_s(time.time())
        return {
            "connected": self.connected,
            "whole": self.replica.whole,
            "waiting": self.replica.waiting(),
            "age_s": None if age is None else round(age, 1),
            "roots": {
                name: {"epoch": epoch, "version": version, "issued_at": issued_at}
                for name, (epoch, version, issued_at) in self.replica.roots().items()
            },
            "services": self.replica.services(),
            "gateways": self.replica.gateways(),
            "problems": self.problems(),
        }

    def _apply(self, batch: Batch) -> None:
        self._applied_at = int(time.time())
        self._unsaved.set()
        self._subscriber.status_changed()
        self._on_batch(self._without_revocations(batch))

    def _without_revocations(self, batch: Batch) -> Batch:
        """The batch, but for what it says of revoked certificates: that goes where credentials are read from."""
        for topic, payload in batch:
            if topic == self._revocations:
                self._put_revocations(payload)
        return [one for one in batch if one[0] != self._revocations]

    def _put_revocations(self, payload: bytes) -> None:
        body = messages.decode(payload).body
        if body is None:
            return  # what is revoked stays so
        found = records.read(RevocationsTopic(DEFAULT_ROOT_NAMESPACE), body, self._trust_domain)
        assert isinstance(found, Revocations)
        content = b"".join(map(crl_pem, found.lists))
        try:
            if not self._revocations_file.exists() or self._revocations_file.read_bytes() != content:
                durable.write(self._revocations_file, content)
                self._credentials.hurry()
        except OSError as error:
            self._revocations_problem = (
                f"{self._revocations_file} cannot be written, and revoked peers are still taken: {error.strerror}"
            )
            log.error("%s", self._revocations_problem)
        else:
            self._revocations_problem = ""

    def _progress(self) -> None:
        """A root that changes nothing for this proxy comes without a batch, and is applied all the same."""
        known = self._knowledge()
        if known != self._told:
            self._told = known
            self._unsaved.set()
            self._subscriber.status_changed()
        self._on_progress()

    def _knowledge(self) -> tuple[bool, dict[str, Stamp]]:
        """Whether the replica is whole, and which roots it has applied, however often they were signed."""
        return self.replica.whole, {name: root[:2] for name, root in self.replica.roots().items()}

    def _report(self, online: bool, version: int) -> tuple[str, bytes]:
        certificate = self._credentials.value
        known = self._in_force(self.known())
        report = ProxyStatus(
            kind=self._kind,
            workload=self._key,
            version=uproxy.__version__,
            online=online,
            whole=known.whole,
            waiting=known.waiting,
            roots=known.roots,
            applied_at=self._applied_at,
            serial=f"{certificate.serial:x}",
            not_after=certificate.not_after,
            problems=self.problems(),
        )
        envelope = Envelope(self._started_at, version, int(time.time()), status.write(report))
        return self._topic, messages.encode(envelope)

    async def _keep_saved(self) -> None:
        while True:
            await self._unsaved.wait()
            await asyncio.sleep(_SAVE_DELAY_S)
            self._unsaved.clear()
            await asyncio.to_thread(self._save, self.replica.dump())
            await asyncio.sleep(_SAVE_INTERVAL_S - _SAVE_DELAY_S)

    def _save(self, content: bytes) -> None:
        try:
            snapshot.write(self._state_file, content)
        except OSError as error:
            problem = f"{self._state_file} cannot be written, and a restart needs the control plane: {error.strerror}"
            if problem != self._saving_problem:
                log.error("%s", problem)
            self._saving_problem = problem
        else:
            self._saving_problem = ""

    def _stamps(self) -> str:
        return ", ".join(
            f"{root_title(name)} {epoch}.{version}" for name, (epoch, version, _) in self.replica.roots().items()
        )
