"""Label syntax, and selectors against a naive matcher."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from control.api.labels import first_of, selects, wrong_key, wrong_value

words = st.sampled_from(["app", "version", "x", "", "web", "v1"])
label_sets = st.dictionaries(words, words, max_size=4)


def _naively(selector, labels):
    for key in selector:
        if key not in labels:
            return False
        if labels[key] != selector[key]:
            return False
    return True


@given(label_sets, label_sets)
def test_a_selector_matches_as_the_naive_one_does(selector, labels):
    assert selects(selector, labels) is _naively(selector, labels)


@given(label_sets, label_sets)
def test_more_labels_never_unselect_and_a_larger_selector_never_selects_more(selector, labels):
    assert selects({}, labels)
    assert selects(selector, {**labels, **selector})
    if selects({**labels, **selector}, labels):
        assert selects(selector, labels)


def test_an_empty_value_is_not_the_same_as_none():
    assert not selects({"app": ""}, {})
    assert selects({"app": ""}, {"app": ""})


@pytest.mark.parametrize("key", ["app", "a.b_c-D9", "x" * 63, "istio.io/rev", "a.b.c/d", f"{'x' * 50}.io/{'y' * 63}"])
def test_right_keys(key):
    assert wrong_key(key) == ""


@pytest.mark.parametrize(
    "key",
    ["", "-a", "a-", ".a", "a b", "x" * 64, "/a", "a/", "a/b/c", "A.io/b", "-a/b", "ä", "a\n", f"{'a.' * 130}b/c"],
)
def test_wrong_keys(key):
    assert wrong_key(key)


@pytest.mark.parametrize("value", ["", "web", "v1.2_3-X", "x" * 63])
def test_right_values(value):
    assert wrong_value(value) == ""


@pytest.mark.parametrize("value", ["-", "a-", "a b", "x" * 64, "a/b", "*", "ä", "a\n"])
def test_wrong_values(value):
    assert wrong_value(value)


def test_the_first_label_that_is_there_and_not_empty_is_taken():
    assert first_of(("a", "b"), {"a": "", "b": "2"}, "0") == "2"
    assert first_of(("a", "b"), {"a": "1", "b": "2"}, "0") == "1"
    assert first_of(("a", "b"), {}, "0") == "0"
