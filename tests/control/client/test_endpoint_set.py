"""Endpoints of one service: the newest count, and the manifest tells when they are all there."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from control.api.index import Manifest, manifest_digest
from control.client.endpoint_set import EndpointSet


def manifest(**stamps):
    """Of workloads whose endpoints all are of epoch 1."""
    return Manifest(len(stamps), manifest_digest({workload: (1, version) for workload, version in stamps.items()}))


def receive(endpoints, workload, version, live=True):
    return endpoints.receive(workload, (1, version), f"{workload}@{version}".encode() if live else None)


def listed(endpoints, version, content):
    """A manifest arrives, and is compared. Returns what had to be put right."""
    endpoints.receive_manifest((1, version), content, b"manifest")
    return endpoints.settle()


def held(endpoints):
    return {workload: stamp[1] for workload, (stamp, _) in endpoints.live.items()}


def whole(**versions):
    """Endpoints as their newest manifest says, the manifest being of the newest of them."""
    endpoints = EndpointSet()
    for workload, version in versions.items():
        receive(endpoints, workload, version)
    listed(endpoints, max(versions.values(), default=0), manifest(**versions))
    assert endpoints.whole
    return endpoints


def test_the_newest_counts():
    endpoints = EndpointSet()
    assert receive(endpoints, "a", 2)
    assert not receive(endpoints, "a", 1)
    assert not receive(endpoints, "a", 2)
    assert receive(endpoints, "a", 3)
    assert not receive(endpoints, "a", 2, live=False)
    assert held(endpoints) == {"a": 3}
    assert receive(endpoints, "a", 4, live=False)
    assert not receive(endpoints, "a", 4, live=False)
    assert not receive(endpoints, "a", 3)
    assert held(endpoints) == {}
    assert not endpoints.whole
    assert endpoints.progress() == "no manifest yet"


def test_a_tombstone_that_comes_first_counts_too():
    endpoints = EndpointSet()
    assert not receive(endpoints, "a", 4, live=False)
    assert not receive(endpoints, "a", 3)
    assert receive(endpoints, "a", 5)


def test_whole_is_what_the_manifest_lists():
    endpoints = EndpointSet()
    assert listed(endpoints, 2, manifest(a=1, b=2)) == []
    receive(endpoints, "a", 1)
    assert endpoints.settle() == []
    assert not endpoints.whole
    assert endpoints.progress() == "1 of 2"
    receive(endpoints, "b", 2)
    assert endpoints.unsettled
    assert not endpoints.whole
    assert endpoints.settle() == []
    assert endpoints.whole
    assert not endpoints.unsettled


def test_the_same_number_of_other_endpoints_is_not_whole():
    endpoints = whole(a=1, b=2)
    listed(endpoints, 3, manifest(a=1, b=3))
    assert not endpoints.whole
    receive(endpoints, "b", 3)
    endpoints.settle()
    assert endpoints.whole


def test_a_newer_endpoint_counts_before_its_manifest_comes():
    endpoints = whole(a=1)
    assert receive(endpoints, "b", 2)
    assert not endpoints.whole
    assert not endpoints.unsettled  # there is nothing to compare it with yet
    listed(endpoints, 2, manifest(a=1, b=2))
    assert endpoints.whole


def test_an_older_manifest_says_nothing():
    endpoints = whole(a=5)
    listed(endpoints, 4, manifest())
    assert endpoints.whole
    assert held(endpoints) == {"a": 5}


def test_what_a_manifest_left_out_does_not_come_back():
    """Its tombstone is forgotten, or every name that ever was would be kept."""
    endpoints = whole(a=1, b=2)
    receive(endpoints, "b", 3, live=False)
    listed(endpoints, 3, manifest(a=1))
    assert endpoints.whole
    assert endpoints._gone == {}
    assert not receive(endpoints, "b", 2)
    assert not receive(endpoints, "b", 3)
    assert not receive(endpoints, "c", 1)
    assert endpoints.whole
    assert receive(endpoints, "b", 4)


def test_a_tombstone_above_the_manifest_is_kept():
    endpoints = whole(a=1, b=2)
    receive(endpoints, "b", 9, live=False)
    listed(endpoints, 3, manifest(a=1))
    assert endpoints.whole
    assert not receive(endpoints, "b", 8)


def test_who_was_away_until_the_tombstones_were_cleared_learns_from_the_manifest():
    endpoints = whole(a=1, b=2)
    endpoints.start_session()
    assert endpoints.whole
    receive(endpoints, "a", 1)
    assert listed(endpoints, 7, manifest(a=1)) == ["b"]
    assert endpoints.whole
    assert held(endpoints) == {"a": 1}


def test_a_restored_control_plane_may_publish_older_stamps():
    endpoints = whole(a=5, b=6)
    endpoints.start_session()
    receive(endpoints, "a", 3)
    assert held(endpoints) == {"a": 5, "b": 6}  # that alone could be an old copy
    content = Manifest(1, manifest_digest({"a": (1, 3)}))
    endpoints.receive_manifest((2, 1), content, b"")
    assert endpoints.settle() == ["a", "b"]
    assert endpoints.whole
    assert held(endpoints) == {"a": 3}
    assert endpoints.live["a"][1] == b"a@3"


def test_a_broker_that_has_fallen_behind_does_not_take_anything_back():
    endpoints = whole(a=5, b=6)
    endpoints.start_session()
    receive(endpoints, "a", 3)
    listed(endpoints, 3, manifest(a=3))
    assert held(endpoints) == {"a": 5, "b": 6}


def test_what_an_earlier_session_brought_proves_nothing_of_this_one():
    endpoints = EndpointSet()
    receive(endpoints, "a", 5)
    listed(endpoints, 4, manifest(a=3))
    endpoints.start_session()
    receive(endpoints, "a", 3)
    assert endpoints.settle() == []  # the manifest is of before, and may have been replaced
    assert not endpoints.whole
    assert listed(endpoints, 4, manifest(a=3)) == ["a"]
    assert endpoints.whole


def test_what_comes_late_takes_nothing_back():
    """An older endpoint, or one that is deleted, that comes once more while the newest manifest is not here yet."""
    endpoints = whole(a=1)
    listed(endpoints, 2, manifest(a=2))
    receive(endpoints, "a", 3)
    receive(endpoints, "a", 2)
    assert endpoints.settle() == []
    assert held(endpoints) == {"a": 3}
    assert listed(endpoints, 3, manifest(a=3)) == []
    assert endpoints.whole
    receive(endpoints, "a", 4, live=False)
    receive(endpoints, "a", 3)
    assert endpoints.settle() == []
    assert held(endpoints) == {}
    listed(endpoints, 4, manifest())
    assert endpoints.whole
    assert endpoints._seen == {}


@given(
    st.lists(st.tuples(st.sampled_from("abc"), st.booleans()), min_size=1, max_size=12),
    st.randoms(use_true_random=False),
)
def test_in_whatever_order_messages_of_a_session_come_nothing_goes_back(changes, chance):
    messages, listing = [], {}
    for version, (workload, live) in enumerate(changes, 1):
        if live:
            listing[workload] = version
        else:
            listing.pop(workload, None)
        messages += [(workload, version, live), (None, version, manifest(**listing))]
    given_ = messages + chance.choices(messages, k=len(messages))
    chance.shuffle(given_)
    endpoints, highest = EndpointSet(), {}
    for workload, version, said in given_:
        if workload is None:
            endpoints.receive_manifest((1, version), said, b"manifest")
        else:
            receive(endpoints, workload, version, live=said)
            highest[workload] = max(version, highest.get(workload, 0))
        if chance.random() < 0.7:
            endpoints.settle()
        assert all(version == highest[name] for name, version in held(endpoints).items())
    endpoints.settle()
    assert endpoints.whole
    assert held(endpoints) == listing


def test_damage_does_not_outlast_a_session():
    """Content of one stamp is what the broker says last, so that a mended broker mends the proxy."""
    endpoints = whole(a=1)
    assert endpoints.receive("a", (1, 1), b"altered")
    endpoints.settle()
    assert endpoints.whole  # nobody can tell: the manifest lists stamps alone
    assert receive(endpoints, "a", 1)
    listed(endpoints, 1, manifest(a=1, b=1))
    assert not endpoints.whole
    listed(endpoints, 1, manifest(a=1))
    endpoints.settle()
    assert endpoints.whole


def test_an_empty_manifest_is_whole_without_endpoints():
    endpoints = EndpointSet()
    listed(endpoints, 1, manifest())
    assert endpoints.whole


def test_a_reconnect_keeps_one_copy_of_each():
    endpoints = whole(a=1)
    endpoints.start_session()
    endpoints.receive("a", (1, 1), bytes(bytearray(b"a@1")))
    assert endpoints._seen["a"] is endpoints.live["a"]


operations = st.lists(
    st.tuples(
        st.sampled_from(["a", "b", "c"]),
        st.integers(1, 5),
        st.sampled_from(["live", "live", "gone", "manifest", "session"]),
    ),
    max_size=25,
)


@given(operations)
def test_the_account_of_memory_is_right(steps):
    endpoints = EndpointSet()
    for workload, version, what in steps:
        if what == "session":
            endpoints.start_session()
        elif what == "manifest":
            listed(endpoints, version, manifest(**dict.fromkeys(["a", "b", "c"][: version % 4], version)))
        else:
            receive(endpoints, workload, version, live=what == "live")
        kept = [*endpoints.live.values(), *endpoints._seen.values()]
        expected = sum(300 + len(payload) for _, payload in kept if payload is not None) + 300 * len(endpoints._gone)
        assert endpoints.bytes == expected
