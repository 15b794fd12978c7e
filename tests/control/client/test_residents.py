"""Packed shards: the same residents as unpacked, and every difference."""

from __future__ import annotations

from hypothesis import given

from control.client.residents import PackedShard
from tests.support.records import address_shards, addresses


@given(address_shards(), addresses())
def test_what_is_packed_comes_back(drawn, other):
    topic, content = drawn
    packed = PackedShard.pack(topic.shard, content)
    assert packed.residents() == content.residents
    for ip in {*content.residents, other}:
        assert packed.resident_at(ip) == content.residents.get(ip)


@given(address_shards(), address_shards())
def test_differences_are_where_somebody_else_lives(one, other):
    first, second = (PackedShard.pack(topic.shard, content) for topic, content in (one, other))
    mine, theirs = one[1].residents, other[1].residents
    expected = {ip for ip in mine.keys() | theirs.keys() if mine.get(ip) != theirs.get(ip)}
    assert first.differences(second) == second.differences(first) == expected
    assert first.differences(None) == set(mine)
    assert first.differences(first) == set()
