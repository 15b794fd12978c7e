"""Waiting for what a test needs, with a bound."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from tests.support.brokers import PATIENCE_S

_POLL_S = 0.01


async def until(condition: Callable[[], object], patience_s: float = PATIENCE_S) -> None:
    """Until the condition holds; TimeoutError when that takes too long."""

    async def asked() -> object:
        return condition()

    await until_true(asked, patience_s)


async def until_true(condition: Callable[[], Awaitable[object]], patience_s: float = PATIENCE_S) -> None:
    async with asyncio.timeout(patience_s):
        while not await condition():  # noqa: ASYNC110 - what is waited for is in other processes
            await asyncio.sleep(_POLL_S)
