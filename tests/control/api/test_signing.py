"""What is signed: bound to topic, stamp, time and content, and the same before and after the signature is there."""

from __future__ import annotations

import uuid

import pytest
from hypothesis import given
from hypothesis import strategies as st

from control.api import messages
from control.api.messages import Envelope
from control.api.signing import CONFIG_KEY_OID, signed_bytes

bodies = st.dictionaries(st.sampled_from(["a", "b"]), st.integers(0, 3) | st.binary(max_size=2), max_size=2)
envelopes = st.builds(Envelope, st.integers(0, 2), st.integers(0, 2), st.integers(0, 2), bodies)
topics = st.sampled_from(["root/a", "root/b"])


@given(topics, envelopes, st.binary(max_size=64))
def test_the_signature_s_own_field_is_not_signed_and_the_wire_changes_nothing(topic, envelope, signature):
    signed = Envelope(*envelope.stamp, envelope.issued_at, {**envelope.body, "signature": signature})
    assert signed_bytes(topic, signed) == signed_bytes(topic, envelope)
    assert signed_bytes(topic, messages.decode(messages.encode(signed))) == signed_bytes(topic, envelope)


@given(topics, envelopes, topics, envelopes)
def test_whatever_differs_is_signed(topic, envelope, other_topic, other):
    ordered = list(envelope.body.items()) == list(other.body.items())
    same = topic == other_topic and envelope == other and ordered
    assert (signed_bytes(topic, envelope) == signed_bytes(other_topic, other)) == same


def test_a_tombstone_is_never_signed():
    with pytest.raises(ValueError, match="never signed"):
        signed_bytes("root/shop", Envelope(1, 1, 0, None))


def test_what_is_signed_says_what_it_is_for():
    assert signed_bytes("t", Envelope(1, 2, 3, {})) == b"uproxy-mesh config v1\0\x95\xa1t\x01\x02\x03\x80"


def test_the_key_s_usage_is_an_arc_of_its_own():
    assert f"2.25.{uuid.uuid5(uuid.NAMESPACE_URL, 'https://mesh.uproxy.dev/config-key').int}" == CONFIG_KEY_OID
