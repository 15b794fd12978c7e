"""From one rendering to the next, without a request that is served by half of each.

What the next one needs comes first, beside what the last one needs still. Then the routes of each place change, and
with them all that holds there. Then what is not needed any more goes. Where Envoy does not take what is needed, the
last one stays; where it does not take the routes of a place, that place refuses everybody.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import re
import time
from collections.abc import Collection
from typing import Final

from uproxy.workers import APPLY_TIMEOUT_S
from waypoint.engine_envoy.child import PROBE, Child
from waypoint.engine_envoy.files import OWN, REVOKED_CALLERS, ROOTS, Files
from waypoint.engine_envoy.rendering import PROBE as PROBED
from waypoint.engine_envoy.rendering import Rendering, probed
from waypoint.engine_envoy.routes import refusing

_POLL_S: Final = 0.005
_SLOWEST_POLL_S: Final = 0.1
_SAID: Final = re.compile(r"^(?P<name>.+)\.version_text: \"(?P<version>.*)\"$", re.MULTILINE)
_COUNTED: Final = re.compile(
    r"^(?P<name>.+(?:update_rejected|update_failure|warming(?:_clusters)?)): (?P<count>\d+)$", re.MULTILINE
)
_ASKED: Final = "/stats?filter=(version_text|update_rejected|update_failure|warming_clusters|total_listeners_warming)$"
_LISTENERS: Final = "/config_dump?resource=dynamic_listeners&mask=error_state"
_ROUTES: Final = "rds."

_FAILED: Final = (".update_rejected", ".update_failure")
_NAMES: Final = {
    "listener_manager.lds": "its listeners",
    "cluster_manager.cds": "its clusters",
    "extension_config_discovery.http_filter.tokens": "its rules about tokens",
    OWN: "its certificate",
    ROOTS: "whom it is to believe",
    REVOKED_CALLERS: "whose certificates are revoked",
}
_REFUSED: Final = "Envoy does not take the configuration of this destination; its messages say why"

log = logging.getLogger("waypoint")


class Delivery:
    """Brings one Envoy's configuration up to date."""

    def __init__(self, files: Files, child: Child, concurrency: int) -> None:
        self._files = files
        self._child = child
        self._concurrency = concurrency
        self._now: Rendering | None = None
        self._version = 0
        """Of what is in force."""
        self.problem = ""
        """What Envoy does not take of the newest rendering, but the routes of places."""
        self.rejected: set[str] = set()
        """Places that are served nothing but refusals, since Envoy does not take what holds there."""
        self._counted: dict[str, int] = {}
        """Rejections that are known, of this life of Envoy's."""
        self._not_taken: dict[str, tuple[str, int]] = {}
        """Versions of secrets that Envoy does not take, and in which of its lives."""

    def prepare(self, rendering: Rendering) -> None:
        """Lay out what the first Envoy starts with. Raises OSError."""
        if rendering.modules:
            self._child.unbound()
        self._files.write_places(rendering)
        self._files.write_routes(rendering.routes)
        self._files.write_routes({PROBED: probed("")})

    async def bring(self, rendering: Rendering, version: int) -> bool:
        """Return when all requests are served by it, or, which is False, by the former one, since Envoy does not take
        what this one needs. Each rendering has a `version`. Raises OSError for the files.

        Where Envoy does not take who is revoked or believed, it is killed, and serves nobody until it does; without a
        new certificate it goes on with the one that it has.
        """
        if rendering.modules:
            self._child.unbound()
        former = self._now
        wide = rendering if former is None else rendering.beside(former)
        secrets, life = self._files.secrets, self._child.lives
        old = [name for name, its in secrets.items() if self._not_taken.get(name) == (its, life)]  # not said again
        not_taken = await self._taken({**secrets, **self._files.write_places(wide)}, old)
        rejected, life = set(not_taken), self._child.lives
        self._not_taken = {name: (not_taken[name], life) for name in rejected & secrets.keys()}
        routes = {name for name in rejected if name.startswith(_ROUTES)}
        self.problem = await self._told(rejected - routes)
        if self.problem:
            log.error("%s", self.problem)
            if rejected & {ROOTS, REVOKED_CALLERS}:
                self._child.kill()
                return False
            if former is not None and rendering.needs != former.needs and rejected - routes - {OWN}:
                await self._taken(self._files.write_places(former))
                await self._served()
                return False
        # The first one has nothing before it: without what it needs, a place refuses whoever asks.
        rest = {name: content for name, content in rendering.routes.items() if _ROUTES + name not in routes}
        routes.update(await self._taken(self._files.write_routes(rest)))
        self.rejected = {name.removeprefix(_ROUTES) for name in routes}
        if routes:
            log.error(
                "Envoy does not take what holds at %s: it is refused to callers", ", ".join(sorted(self.rejected))
            )
        refused = {name: refusing(name, 503, "not-expressible", _REFUSED) for name in self.rejected}
        await self._taken(self._files.write_routes(refused))
        self._version = version
        self._files.write_routes({PROBED: probed(str(version))})
        await self._served()
        self._now = rendering
        self._files.write_places(rendering)
        self._files.sweep(rendering)
        return True

    async def _told(self, rejected: set[str]) -> str:
        """What Envoy says of things that it does not take; empty: it takes all."""
        if not rejected:
            return ""
        failed: set[str] = set()
        with contextlib.suppress(OSError, ValueError, KeyError):
            for one in json.loads(await self._child.ask(_LISTENERS))["configs"]:
                if error := one.get("error_state"):
                    failed.add(f"{error['failed_configuration']['name']}: {' '.join(error['details'].split())}")
        why = "; ".join(sorted(failed)) or "its messages, on standard error, say why"
        return f"Envoy does not take {', '.join(sorted(map(_named, rejected)))}: {why}"

    async def _taken(self, versions: dict[str, str], known: Collection[str] = ()) -> dict[str, str]:
        """Return when Envoy has these versions, of secrets the newest, and is warm: those that it does not take, of
        which some may be `known`. One that tells of none for long is killed.
        """
        wanted = {_plain(name): name for name in versions}
        rejected = set(known)
        began, life, pause_s = time.monotonic(), self._child.lives, _POLL_S
        while True:
            secrets = {name: its for name, its in self._files.secrets.items() if name in versions}
            rejected -= {name for name, its in secrets.items() if its != versions[name]}
            versions = {**versions, **secrets}
            missing = set(wanted)
            try:
                told = (await self._child.ask(_ASKED)).decode()
            except OSError:
                pass
            else:
                said = {found["name"]: found["version"] for found in _SAID.finditer(told)}
                counts = {found["name"]: int(found["count"]) for found in _COUNTED.finditer(told)}
                for place in missing.copy():
                    stat = next((name for name in said if name.endswith(place)), "")
                    if said.get(stat) == versions[wanted[place]]:
                        missing.discard(place)
                    elif (failed := sum(counts.get(stat + kind, 0) for kind in _FAILED)) > self._counted.get(stat, 0):
                        self._counted[stat] = failed
                        rejected.add(wanted[place])
                missing -= {_plain(name) for name in rejected}
                warming = any(count for name, count in counts.items() if "warming" in name)
                if not missing and not warming:
                    return {name: versions[name] for name in rejected}
            if self._child.lives != life:
                life, began, self._counted = self._child.lives, time.monotonic(), {}
            if time.monotonic() - began > APPLY_TIMEOUT_S:
                log.error("Envoy has not taken %s for %g s, and is killed", ", ".join(sorted(missing)), APPLY_TIMEOUT_S)
                self._child.kill()
                began = time.monotonic()
            await asyncio.sleep(pause_s)
            pause_s = min(1.5 * pause_s, _SLOWEST_POLL_S)

    async def _served(self) -> None:
        """Return when requests are served by the version that is to be: a thread of Envoy's takes changes in order."""
        version, agreed = str(self._version), 0
        while agreed < (1 if self._concurrency == 1 else 4 * self._concurrency):
            try:
                same = await self._child.ask("/", socket=PROBE) == version.encode()
            except OSError:
                same = False
            agreed = agreed + 1 if same else 0
            if not same:
                await asyncio.sleep(_POLL_S)


def _named(name: str) -> str:
    """Of what statistics are about."""
    return _NAMES.get(name, f"the endpoints of {name.removeprefix('cluster.')}")


def _plain(name: str) -> str:
    """As the names of Envoy's statistics are written."""
    return name.replace(":", "_")
