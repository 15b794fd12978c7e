"""Calls in the lab's shop, by web."""

from __future__ import annotations

import json
from collections import Counter

from benchmarks.lab.shop import REVIEWS, Shop


def versions(shop: Shop, times: int) -> Counter[str]:
    """Which version of reviews answers how often. Each is told that web calls, by a waypoint."""
    found: Counter[str] = Counter()
    for _ in range(times):
        answer = shop.web.job(job="http", host=REVIEWS[0], port=REVIEWS[1])
        assert answer.get("status") == 200, answer
        body = json.loads(answer["body"])
        assert body["caller"] == f"URI={shop.web.identity}"
        found[body["version"]] += 1
    return found
