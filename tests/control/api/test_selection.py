"""The index selects what holding the selector against every workload selects."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from control.api.labels import selects
from control.api.selection import Workloads
from tests.support.records import labels, namespaces, workloads


@given(st.lists(workloads(), max_size=8), namespaces, labels)
def test_the_index_selects_as_a_walk_over_all_does(every, namespace, selector):
    index = Workloads(every)
    expected = [w for w in every if w.namespace == namespace and selects(selector, w.labels)]
    assert index.selected(namespace, selector) == expected
    assert index.any_selected([namespace], selector) is bool(expected)
    assert index.any_selected(None, selector) is any(selects(selector, w.labels) for w in every)
