"""SPIFFE IDs: one negative test for each clause of the grammar."""

from __future__ import annotations

import contextlib
import hashlib
import string

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from control.api.identity import IdentityError, SpiffeId, make_id, parse_trust_domain, proxy_hash

segments = st.text(string.ascii_letters + string.digits + "._-", min_size=1, max_size=60).filter(
    lambda text: text not in (".", "..")
)
trust_domains = st.text(string.ascii_lowercase + string.digits + "._-", min_size=1, max_size=60)


@given(trust_domains, segments, segments)
def test_an_identity_survives_its_text(trust_domain, namespace, account):
    identity = make_id(parse_trust_domain(trust_domain), namespace, account)
    assert SpiffeId.parse(str(identity)) == identity
    assert str(identity) == f"spiffe://{trust_domain}/ns/{namespace}/sa/{account}" == "spiffe://" + identity.principal


@given(st.text(max_size=80))
def test_any_text_is_an_identity_with_that_very_text_or_refused(text):
    try:
        identity = SpiffeId.parse(text)
    except IdentityError:
        return
    assert str(identity) == text


_GOOD = "spiffe://cluster.local/ns/shop/sa/web"


@given(st.integers(0, len(_GOOD)), st.characters())
def test_no_inserted_character_yields_the_same_identity(at, character):
    text = _GOOD[:at] + character + _GOOD[at:]
    with contextlib.suppress(IdentityError):
        assert SpiffeId.parse(text) != SpiffeId.parse(_GOOD)


@pytest.mark.parametrize(
    ("text", "clause"),
    [
        ("https://cluster.local/ns/shop/sa/web", "spiffe://"),
        ("SPIFFE://cluster.local/ns/shop/sa/web", "lower case"),
        ("cluster.local/ns/shop/sa/web", "spiffe://"),
        ("spiffe:/cluster.local/ns/shop/sa/web", "spiffe://"),
        ("", "spiffe://"),
        ("spiffe://Cluster.local/ns/shop/sa/web", "trust domain"),
        ("spiffe://cluster local/ns/shop/sa/web", "trust domain"),
        ("spiffe:///ns/shop/sa/web", "trust domain is empty"),
        (f"spiffe://{'a' * 256}/ns/shop/sa/web", "255"),
        (f"spiffe://cluster.local/ns/shop/sa/{'w' * 2048}", "2048"),
        ("spiffe://cluster.local/ns/sh%6fp/sa/web", "percent"),
        ("spiffe://cluster%2elocal/ns/shop/sa/web", "percent"),
        ("spiffe://user@cluster.local/ns/shop/sa/web", "user information"),
        ("spiffe://cluster.local:443/ns/shop/sa/web", "port"),
        ("spiffe://cluster.local/ns/shop/sa/web?x=1", "query"),
        ("spiffe://cluster.local/ns/shop/sa/web?", "query"),
        ("spiffe://cluster.local/ns/shop/sa/web#x", "fragment"),
        ("spiffe://cluster.local/ns//shop/sa/web", "empty segment"),
        ("spiffe://cluster.local//ns/shop/sa/web", "empty segment"),
        ("spiffe://cluster.local/ns/shop/sa/", "trailing"),
        ("spiffe://cluster.local/ns/shop/sa/web/", "trailing"),
        ("spiffe://cluster.local/ns/./sa/web", r"'\.'"),
        ("spiffe://cluster.local/ns/../sa/web", r"'\.\.'"),
        ("spiffe://cluster.local/ns/shop/sa/we b", "only letters"),
        ("spiffe://cluster.local/ns/shop/sa/web\n", "only letters"),
        ("spiffe://cluster.local/ns/shop/sa/web\0", "only letters"),
        ("spiffe://cluster.local/ns/shöp/sa/web", "ASCII"),
        ("spiffe://cluster.local", "empty segment"),
        ("spiffe://cluster.local/", "empty segment"),
        ("spiffe://cluster.local/web", "not of the form"),
        ("spiffe://cluster.local/sa/web/ns/shop", "not of the form"),
        ("spiffe://cluster.local/NS/shop/SA/web", "not of the form"),
        ("spiffe://cluster.local/ns/shop/sa/web/more", "not of the form"),
    ],
)
def test_each_clause_of_the_grammar_is_refused_by_name(text, clause):
    with pytest.raises(IdentityError, match=clause):
        SpiffeId.parse(text)


def test_the_longest_trust_domain_is_taken():
    assert parse_trust_domain("a" * 255)


@pytest.mark.parametrize("part", ["", ".", "..", "a/b", "a b", "ä"])
def test_a_part_that_cannot_stand_in_an_identity_is_refused(part):
    domain = parse_trust_domain("cluster.local")
    with pytest.raises(IdentityError):
        make_id(domain, part, "web")
    with pytest.raises(IdentityError):
        make_id(domain, "shop", part)


def test_an_identity_that_is_too_long_is_not_made():
    with pytest.raises(IdentityError, match="2048"):
        make_id(parse_trust_domain("cluster.local"), "n" * 1100, "s" * 1100)


@given(segments, segments)
def test_proxy_hashes_differ_with_identities(one, other):
    assume(one != other)
    domain = parse_trust_domain("cluster.local")
    assert proxy_hash(make_id(domain, "shop", one)) != proxy_hash(make_id(domain, "shop", other))


def test_the_proxy_hash_is_the_first_half_of_sha_256():
    assert proxy_hash(SpiffeId.parse(_GOOD)) == hashlib.sha256(_GOOD.encode()).hexdigest()[:32]
