"""Which ports take plaintext: the narrower scope says more, and where two of one scope differ STRICT holds."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from control.api.plaintext import Plaintext, plaintext_of
from control.api.policy import MtlsMode, PeerAuthentication

STRICT, PERMISSIVE, UNSET = MtlsMode.STRICT, MtlsMode.PERMISSIVE, MtlsMode.UNSET
ROOT, WEB = "mesh-system", {"app": "web"}


def of_mesh(mode):
    return PeerAuthentication(ROOT, "mesh", None, mode, {})


def of_namespace(mode, namespace="shop"):
    return PeerAuthentication(namespace, "all", None, mode, {})


def of_web(mode, ports=None, labels=None, namespace="shop"):
    return PeerAuthentication(namespace, "web", WEB if labels is None else labels, mode, ports or {})


OPEN = Plaintext(True, ())


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ([], None),
        ([of_mesh(UNSET), of_namespace(UNSET), of_web(UNSET)], None),
        ([of_mesh(PERMISSIVE)], OPEN),
        ([of_mesh(PERMISSIVE), of_namespace(UNSET), of_web(UNSET)], OPEN),
        ([of_mesh(PERMISSIVE), of_namespace(STRICT)], None),
        ([of_mesh(PERMISSIVE), of_namespace(STRICT), of_web(PERMISSIVE)], OPEN),
        ([of_mesh(PERMISSIVE), of_namespace(UNSET), of_web(STRICT)], None),
        ([of_mesh(STRICT), of_namespace(PERMISSIVE)], OPEN),
        ([of_namespace(PERMISSIVE, "bank")], None),
        ([of_web(PERMISSIVE, namespace="bank")], None),
        ([of_web(PERMISSIVE, labels={"app": "db"})], None),
        ([of_web(UNSET, {8080: PERMISSIVE})], Plaintext(False, (8080,))),
        ([of_web(STRICT, {8080: PERMISSIVE, 90: UNSET})], Plaintext(False, (8080,))),
        ([of_mesh(PERMISSIVE), of_web(UNSET, {90: STRICT, 80: STRICT, 70: UNSET})], Plaintext(True, (80, 90))),
        ([of_mesh(PERMISSIVE), of_web(STRICT, {90: UNSET})], None),
        ([of_web(STRICT), of_web(PERMISSIVE)], None),
        ([of_web(PERMISSIVE), of_web(UNSET, {80: STRICT})], Plaintext(True, (80,))),
        ([of_web(STRICT), of_web(UNSET, {80: PERMISSIVE})], None),
        ([of_mesh(STRICT), of_mesh(PERMISSIVE)], None),
        # As Istio: with a selector, the root namespace's says nothing of anybody.
        ([of_web(PERMISSIVE, namespace=ROOT)], None),
    ],
)
@pytest.mark.parametrize("turn", [list, reversed])
def test_the_narrower_scope_says_more_and_of_equals_the_stricter_holds(said, expected, turn):
    assert plaintext_of("shop", {"app": "web", "version": "v1"}, tuple(turn(said)), ROOT) == expected


def test_in_the_root_namespace_the_meshs_own_holds():
    assert plaintext_of(ROOT, WEB, [of_mesh(PERMISSIVE)], ROOT) == OPEN


modes = st.sampled_from(MtlsMode)
ports = st.sampled_from([80, 90])
declared = st.one_of(
    st.builds(PeerAuthentication, st.sampled_from([ROOT, "shop"]), st.just("p"), st.none(), modes, st.just({})),
    st.builds(of_web, modes, st.dictionaries(ports, modes)),
)


@given(st.lists(declared, max_size=5))
def test_each_port_is_what_a_look_at_that_port_alone_finds(said):
    """The naive way: from the narrowest scope on, the strictest word that somebody says of this port."""
    found = plaintext_of("shop", WEB, said, ROOT)
    for port in (80, 90, 100):
        scopes = [
            {_word(one, port) for one in said if one.selector},
            {one.mode for one in said if one.namespace == "shop" and not one.selector},
            {one.mode for one in said if one.namespace == ROOT},
        ]
        words = [scope - {UNSET} for scope in scopes if scope - {UNSET}]
        assert (found is not None and found.takes(port)) is (bool(words) and words[0] == {PERMISSIVE})


def _word(one, port):
    of_port = one.port_modes.get(port, UNSET)
    return one.mode if of_port is UNSET else of_port


@pytest.mark.parametrize("others", [True, False])
def test_the_uproxys_own_ports_never_take_plaintext(others):
    plaintext = Plaintext(others, (8080,))
    assert [port for port in (14999, 15000, 15006, 15021, 15090, 15091) if plaintext.takes(port)] == (
        [14999, 15091] if others else []
    )
