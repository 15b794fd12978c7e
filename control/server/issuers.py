"""Fetches the keys that issuers of tokens publish, for RequestAuthentications that say where (`jwksUri`).

One place does it for the whole mesh, so that no waypoint needs a way out, and a change reaches all of them as any
other configuration does. Fails closed: what is not a key set in time leaves the keys as they were.
"""

from __future__ import annotations

import asyncio
import logging
import random
import ssl
import time
from typing import Final

import aiohttp

from control.api.jwt import MAX_JWKS, canonical_jwks
from control.api.problems import ResourceErrors
from control.server.core import Core
from control.server.store import StoreError

REFRESH_S: Final = 1200.0
"""Istio's PILOT_JWT_PUB_KEY_REFRESH_INTERVAL."""
RETRY_S: Final = 30.0
LOOK_S: Final = 1.0
"""How soon a URI that is new is fetched."""
TIMEOUT_S: Final = 10.0
AT_ONCE: Final = 8

_log = logging.getLogger(__name__)


class FetchError(Exception):
    """What is published is no key set; the text says why."""


class Issuers:
    """Keeps the keys of all issuers fresh."""

    def __init__(self, core: Core) -> None:
        self._core = core
        self._due: dict[str, float] = {}
        """URI -> when it is fetched next, by the monotonic clock."""
        self._failed: dict[str, str] = {}

    def problems(self) -> list[str]:
        """What is wrong with them, for people."""
        return [f"the keys at {uri} cannot be fetched: {why}" for uri, why in sorted(self._failed.items())]

    async def run(self) -> None:
        """Until it is cancelled."""
        turn = asyncio.Semaphore(AT_ONCE)
        async with aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(ssl=ssl.create_default_context()),  # SSL_CERT_FILE holds
            timeout=aiohttp.ClientTimeout(total=TIMEOUT_S),
            cookie_jar=aiohttp.DummyCookieJar(),
        ) as session:
            while True:
                wanted = await asyncio.to_thread(self._core.key_uris)
                self._due = {uri: self._due.get(uri, 0.0) for uri in wanted}
                self._failed = {uri: why for uri, why in self._failed.items() if uri in wanted}
                now = time.monotonic()
                due = [uri for uri, at in self._due.items() if at <= now]
                found = await asyncio.gather(*(self._fetch(session, turn, uri) for uri in due))
                fetched = {uri: jwks for uri, jwks in zip(due, found, strict=True) if jwks is not None}
                if fetched:
                    await self._take(fetched)
                await asyncio.sleep(LOOK_S)

    async def _take(self, fetched: dict[str, str]) -> None:
        try:
            await asyncio.to_thread(self._core.take_keys, fetched)
        except (ResourceErrors, StoreError) as error:
            for uri in fetched:
                self._failed[uri] = f"they cannot be published: {error}"
                self._due[uri] = time.monotonic() + RETRY_S

    async def _fetch(self, session: aiohttp.ClientSession, turn: asyncio.Semaphore, uri: str) -> str | None:
        """The keys; None when there are none to be had now."""
        try:
            async with turn:
                jwks = canonical_jwks(await _body(session, uri))
        except (aiohttp.ClientError, TimeoutError, FetchError, ValueError) as error:
            why = str(error) or type(error).__name__
            if self._failed.get(uri) != why:
                _log.warning("the keys at %s cannot be fetched, and are tried again every %g s: %s", uri, RETRY_S, why)
            self._failed[uri] = why
            self._due[uri] = time.monotonic() + RETRY_S
            return None
        self._failed.pop(uri, None)
        self._due[uri] = time.monotonic() + REFRESH_S * random.uniform(0.9, 1.0)
        return jwks


async def _body(session: aiohttp.ClientSession, uri: str) -> str:
    # A redirect could lead to a place that nobody has named.
    async with session.get(uri, allow_redirects=False, headers={"accept": "application/json"}) as response:
        if response.status != 200:
            raise FetchError(f"the answer is {response.status}, not 200")
        body = await response.content.read(MAX_JWKS + 1)
        while len(body) <= MAX_JWKS and (more := await response.content.read(MAX_JWKS + 1 - len(body))):
            body += more
        if len(body) > MAX_JWKS:
            raise FetchError(f"the answer is longer than {MAX_JWKS} bytes")
        return body.decode()
