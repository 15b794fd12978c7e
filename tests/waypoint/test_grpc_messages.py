"""Counting messages of gRPC, in a body that is cut anywhere."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from waypoint.grpc_messages import MessageCounter


@given(messages=st.lists(st.binary(max_size=40), max_size=8), cuts=st.lists(st.integers(1, 60)), rest=st.integers(0, 4))
def test_each_message_counts_once_however_the_body_is_cut(messages, cuts, rest):
    body = b"".join(b"\x00" + len(one).to_bytes(4) + one for one in messages) + bytes(rest)
    counter, place = MessageCounter(), 0
    for cut in cuts:
        counter.add(body[place : place + cut])
        place += cut
    counter.add(body[place:])
    assert counter.count == len(messages)


def test_a_message_counts_with_its_prefix_and_its_bytes_are_not_kept():
    counter = MessageCounter()
    counter.add(b"\x01\x00\x10\x00")
    assert counter.count == 0
    counter.add(b"\x00" + b"x" * 1000)
    assert counter.count == 1
    assert not counter._prefix
