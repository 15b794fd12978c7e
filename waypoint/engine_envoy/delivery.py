"""From one rendering to the next, without a request that is served by half of each.

What the next one needs comes first, beside what the last one needs still. Then the routes of each place change, and
with them all that holds there. Then what is not needed any more goes.
"""

from __future__ import annotations

import asyncio
import logging
import re
import time
from typing import Final

from uproxy.workers import APPLY_TIMEOUT_S
from waypoint.engine_envoy.child import PROBE, Child
from waypoint.engine_envoy.files import Files
from waypoint.engine_envoy.rendering import PROBE as PROBED
from waypoint.engine_envoy.rendering import Rendering, probed
from waypoint.engine_envoy.routes import refusing

_POLL_S: Final = 0.005
_SLOWEST_POLL_S: Final = 0.1
_SAID: Final = re.compile(r"^(?P<name>.+)\.version_text: \"(?P<version>.*)\"$", re.MULTILINE)
_COUNTED: Final = re.compile(r"^(?P<name>.+(?:update_rejected|warming(?:_clusters)?)): (?P<count>\d+)$", re.MULTILINE)
_ASKED: Final = "/stats?filter=(version_text|update_rejected|warming_clusters|total_listeners_warming)$"

log = logging.getLogger("waypoint")


class Delivery:
    """Brings one Envoy's configuration up to date."""

    def __init__(self, files: Files, child: Child, concurrency: int) -> None:
        self._files = files
        self._child = child
        self._concurrency = concurrency
        self._now: Rendering | None = None
        self.rejected: set[str] = set()
        """Places that are served nothing but refusals, since Envoy does not take what holds there."""
        self._counted: dict[str, int] = {}
        """Rejections that are known, of this life of Envoy's."""
        self._rejecting: set[str] = set()

    def prepare(self, rendering: Rendering) -> None:
        """Lay out what the first Envoy starts with. Raises OSError."""
        self._files.write_places(rendering)
        self._files.write_routes(rendering.routes)
        self._files.write_routes({PROBED: probed("")})

    async def bring(self, rendering: Rendering, version: int) -> None:
        """Return when all requests are served by it. Each rendering has a `version`. Raises OSError for the files."""
        wide = rendering if self._now is None else rendering.beside(self._now)
        # Without what it needs, a place refuses whoever asks.
        self._note(await self._taken(self._files.write_places(wide)))
        rejected = await self._taken(self._files.write_routes(rendering.routes))
        self._note(rejected)
        text = "Envoy does not take the configuration of this destination; its messages say why"
        self.rejected = {name for name in rendering.routes if f"rds.{name}" in rejected}
        refused = {name: refusing(name, 503, "not-expressible", text) for name in self.rejected}
        await self._taken(self._files.write_routes(refused))
        self._files.write_routes({PROBED: probed(str(version))})
        await self._served(str(version))
        self._now = rendering
        self._files.write_places(rendering)
        self._files.sweep(rendering)

    def _note(self, rejected: set[str]) -> None:
        if rejected:
            log.error("Envoy does not take %s", ", ".join(sorted(rejected)))

    async def _taken(self, versions: dict[str, str]) -> set[str]:
        """Return when Envoy has these versions, and is warm: those that it does not take. One that tells of none for
        long is killed.
        """
        wanted = {_plain(name): name for name in versions}
        began, life, pause_s = time.monotonic(), self._child.lives, _POLL_S
        while True:
            missing, rejected = set(wanted), set[str]()
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
                    elif counts.get(f"{stat}.update_rejected", 0) > self._counted.get(stat, 0):
                        self._counted[stat] = counts[f"{stat}.update_rejected"]
                        rejected.add(wanted[place])
                self._rejecting |= rejected
                missing -= {_plain(name) for name in self._rejecting}
                warming = any(count for name, count in counts.items() if "warming" in name)
                if not missing and not warming:
                    rejected, self._rejecting = self._rejecting, set()
                    return rejected
            if self._child.lives != life:
                life, began, self._counted = self._child.lives, time.monotonic(), {}
            if time.monotonic() - began > APPLY_TIMEOUT_S:
                log.error("Envoy has not taken %s for %g s, and is killed", ", ".join(sorted(missing)), APPLY_TIMEOUT_S)
                self._child.kill()
                began = time.monotonic()
            await asyncio.sleep(pause_s)
            pause_s = min(1.5 * pause_s, _SLOWEST_POLL_S)

    async def _served(self, version: str) -> None:
        """Return when requests are served by a version: a thread of Envoy's takes changes in their order."""
        agreed = 0
        while agreed < (1 if self._concurrency == 1 else 4 * self._concurrency):
            try:
                same = await self._child.ask("/", socket=PROBE) == version.encode()
            except OSError:
                same = False
            agreed = agreed + 1 if same else 0
            if not same:
                await asyncio.sleep(_POLL_S)


def _plain(name: str) -> str:
    """As the names of Envoy's statistics are written."""
    return name.replace(":", "_")
