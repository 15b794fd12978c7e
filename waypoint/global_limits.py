"""Rate limits that all processes of a waypoint count together, in a Redis.

The Redis counts as a process does by itself (`traffic`): for each share of each limit it keeps when that is full again,
by its own clock, and one script looks at all limits of a request and takes of all or of none.
"""

from __future__ import annotations

import logging
import math
import os
import time
from collections.abc import Iterable, Sequence
from typing import Final

from control.api.identity import SpiffeId
from control.api.traffic import Redis
from uproxy import trace
from uproxy.errors import RefusedError
from uproxy.plane import Plane, Waiter
from waypoint import telemetry as flags
from waypoint.byte_stream import ByteStream
from waypoint.caller import Caller
from waypoint.course import Course
from waypoint.destination import Destinations
from waypoint.redis import RedisClient, RedisError
from waypoint.refusal import RefusalError, retry_after
from waypoint.telemetry import WaypointTelemetry
from waypoint.traffic import Asked
from waypoint.upstream import Upstream

_SCRIPT: Final = b"""
local now = redis.call('TIME')
local t = now[1] * 1000000 + now[2]
local full = {}
for i = 1, #KEYS do
  local each, burst = tonumber(ARGV[2 * i - 1]), tonumber(ARGV[2 * i])
  full[i] = math.max(tonumber(redis.call('GET', KEYS[i])) or 0, t) + each
  if full[i] - t - burst > 0.5 then
    return {i, math.ceil(full[i] - t - burst)}
  end
end
for i = 1, #KEYS do
  redis.call('SET', KEYS[i], string.format('%.0f', full[i]), 'PX', math.ceil((full[i] - t) / 1000))
end
return {0, 0}
"""
"""Microseconds. What it returns: which limit has no token (from 1; 0: all have), and how long until it has."""

log = logging.getLogger(__name__)


class GlobalLimits:
    """Asks for one process of a waypoint."""

    def __init__(
        self,
        data_plane: Plane,
        identity: SpiffeId,
        destinations: Destinations,
        upstream: Upstream,
        telemetry: WaypointTelemetry,
    ) -> None:
        """`identity`: of this waypoint, as which it asks."""
        self._plane = data_plane
        self._identity = identity
        self._destinations = destinations
        self._upstream = upstream
        self._clients: dict[tuple[str, int], RedisClient] = {}
        self._failures = 0
        telemetry.counter(
            "uproxy_waypoint_global_rate_limit_failures_total",
            "Requests about which the Redis of a rate limit has not answered",
            lambda: self._failures,
        )

    async def let_through(self, course: Course, questions: Sequence[Asked]) -> None:
        """Raises RefusalError for a request that is one too many, or about which nobody answers where that refuses."""
        for question in questions:
            claim: Waiter[int] = Waiter(self._plane)
            course.claim = claim
            self._plane.spawn(self._ask(question, claim))
            try:
                wait_us = await claim
            except ConnectionResetError as error:
                raise course.broken(error) from None
            except RedisError as error:
                self._failures += 1
                log.info("%s: %s", course.exchange.request_id, error)
                if not question.redis.fail_open:
                    text = "a rate limit cannot be asked for"
                    raise RefusalError(
                        500, "rate-limit-store", text, flag=flags.NOT_COUNTED, policy=question.policy
                    ) from None
                continue
            finally:
                course.claim = None
            if course.cause is not None:
                raise course.cause
            if wait_us:
                fields = retry_after(math.ceil(wait_us / 1e6))
                raise RefusalError(
                    429,
                    "rate-limited",
                    "global_rate_limited",
                    flag=flags.RATE_LIMITED,
                    policy=question.policy,
                    fields=fields,
                )

    async def _ask(self, question: Asked, claim: Waiter[int]) -> None:
        """Settle it with the microseconds until each limit has a token; 0: they have."""
        try:
            client = self._client(question.redis)
            match await client.run(question.keys, question.arguments, question.redis.timeout_ms / 1000):
                case [0, 0]:
                    claim.set(0)
                case [int(which), int(wait_us)] if which > 0 and wait_us > 0:
                    claim.set(wait_us)
                case other:
                    raise RedisError(
                        f"Redis of Service {question.redis.service}: an answer that means nothing: {other!r:.100}"
                    )
        except (RedisError, RefusedError) as error:
            claim.fail(error)
        finally:
            # Nothing, if it was settled; whoever waits must learn of a bug, too.
            claim.fail(RedisError("a bug of this proxy; its log has the traceback"))

    def _client(self, redis: Redis) -> RedisClient:
        place = redis.service, redis.port
        client = self._clients.get(place)
        if client is None:
            name = f"Redis of Service {redis.service}"
            client = RedisClient(self._plane, name, _SCRIPT, lambda: self._connect(redis), time.monotonic)
            self._clients[place] = client
        return client

    async def _connect(self, redis: Redis) -> ByteStream:
        """Raises RefusedError."""
        failed: RefusedError | None = None
        for hop in self._destinations.backends(redis.service, redis.port):
            caller = Caller(self._identity, self._upstream.source(hop.address) or hop.address, 0)
            try:
                return await self._upstream.stream(caller, hop, _Nobody())
            except RefusedError as error:
                failed = error
        assert failed is not None  # there is at least one hop
        try:
            raise failed
        finally:
            del failed  # its traceback holds this frame

    def keep(self, wanted: Iterable[Redis]) -> None:
        """Close the connections to all others."""
        places = {(redis.service, redis.port) for redis in wanted}
        for place in [one for one in self._clients if one not in places]:
            self._clients.pop(place).close()

    def close(self) -> None:
        """Close all connections."""
        self.keep(())


class _Nobody:
    """A connection is opened for all requests, and for none of them."""

    def __init__(self) -> None:
        self.request_id = os.urandom(16).hex()
        self.traceparent = trace.write(self.request_id, "", "")
