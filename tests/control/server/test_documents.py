"""Documents: one form for everything, which says exactly what was written."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from control.api.problems import ResourceErrors
from control.server import documents
from tests.support.desired import policy, service, together, workload

TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=20) | st.sampled_from(
    [
        "yes",
        "No",
        "null",
        "~",
        "true",
        "1",
        "1e3",
        "010",
        "0x1f",
        "1_000",
        ".inf",
        "-",
        "a: b",
        "# c",
        "y",
        "",
        " a",
        "é",
    ]
)
KEYS = TEXTS.filter(lambda text: len(text) <= 500)
VALUES = st.recursive(
    TEXTS | st.integers(-(10**18), 10**18) | st.booleans() | st.none(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(KEYS, inner, max_size=4),
    max_leaves=20,
)


@given(st.dictionaries(KEYS, VALUES, max_size=5))
def test_what_is_written_reads_back_as_it_was(value):
    assert documents.values(documents.write(value)) == value


def test_the_form_is_one_value_on_each_line():
    (document,) = documents.read(service("web", labels="team: a-b"), "f.yaml")
    assert document.place == ("Service", "shop", "web")
    assert document.text == (
        "apiVersion: v1\nkind: Service\nmetadata:\n  name: web\n  namespace: shop\n  labels:\n    team: a-b\n"
        "spec:\n  selector:\n    app: web\n  ports:\n  - name: http\n    port: 80\n    targetPort: 8080\n"
    )


def test_every_document_of_a_file_is_read_and_reads_again():
    text = together(service("web"), workload("web-1", "10.0.0.1"), policy("allow", app="web"))
    found = documents.read(text, "f.yaml")
    assert [one.place[0] for one in found] == ["Service", "WorkloadEntry", "AuthorizationPolicy"]
    for one in found:
        (again,) = documents.read(one.text, "stored")
        assert again == one
        assert again.resource.position.file == "stored"


def test_all_errors_of_a_file_are_told_with_their_places():
    text = together(service("web"), service("NO", app="web"), workload("a", "10.0.0"))
    with pytest.raises(ResourceErrors) as caught:
        documents.read(text, "f.yaml")
    assert [(one.file, one.line, one.field) for one in caught.value.errors] == [
        ("f.yaml", 10, "metadata.name"),
        ("f.yaml", 18, "spec.address"),
    ]


def test_a_difference_shows_values_and_is_empty_for_none():
    old, new = service("web"), service("web", labels="a: b")
    texts = [documents.read(text, "f")[0].text for text in (old, new)]
    assert documents.difference(texts[0], texts[0], "x") == ""
    assert documents.difference(*texts, "Service shop/web").splitlines()[:2] == [
        "--- Service shop/web (now)",
        "+++ Service shop/web (new)",
    ]


def test_metadata_is_set_and_removed():
    text = documents.read(service("web", labels="a: b, c: d"), "f")[0].text
    changed = documents.with_metadata(text, {"labels": {"a": None, "e": "yes"}, "annotations": {"n": "1"}})
    metadata = documents.values(changed)["metadata"]
    assert metadata == {"name": "web", "namespace": "shop", "labels": {"c": "d", "e": "yes"}, "annotations": {"n": "1"}}
    bare = documents.with_metadata(changed, {"labels": {"c": None, "e": None}, "annotations": {"n": None}})
    assert documents.values(bare)["metadata"] == {"name": "web", "namespace": "shop"}
