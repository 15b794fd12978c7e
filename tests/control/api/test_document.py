"""YAML documents: lines are kept, and what is dangerous or ambiguous is refused by name."""

from __future__ import annotations

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from control.api import document
from control.api.document import List, Map, Reader, Scalar, position_of, read_documents
from control.api.problems import MAX_PROBLEMS, Report, ResourceErrors


def read(text):
    report = Report()
    return list(read_documents(text, "f.yaml", report)), [str(error) for error in report.errors]


def reader_of(text):
    report = Report()
    (root,) = read_documents(text, "f.yaml", report)
    assert report.errors == []
    return Reader(root, "", position_of(root, "f.yaml"), report), report


def plain(node):
    match node:
        case Map():
            return {name: plain(value) for name, value in node.entries.items()}
        case List():
            return [plain(item) for item in node.items]
        case Scalar():
            return node.value


words = st.text(st.characters(max_codepoint=0xFFFF, exclude_categories=["Cs"]), max_size=10)
values = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**15), 10**15) | words,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(words, inner, max_size=3),
    max_leaves=8,
)


@given(st.lists(st.dictionaries(words, values, max_size=4), max_size=3), st.sampled_from([None, 2]))
def test_json_is_read_as_what_it_says(documents, indent):
    found, errors = read("\n---\n".join(json.dumps(item, indent=indent) for item in documents))
    assert errors == []
    assert [plain(root) for root in found] == documents


@given(st.text(max_size=200))
def test_any_text_is_documents_or_errors_and_never_an_exception(text):
    found, errors = read(text)
    assert all(isinstance(root, Map) for root in found)
    assert all(error.startswith("f.yaml") for error in errors)


tokens = [
    "a",
    "b",
    ": ",
    "- ",
    "\n",
    "  ",
    "{",
    "}",
    "[",
    "]",
    ",",
    "&x ",
    "*x",
    "!t ",
    "? ",
    "|",
    ">",
    "'",
    '"',
    "<<: ",
]
soup = st.lists(
    st.sampled_from([*tokens, "---\n", "...\n", "#", "%", "\t", "~", "on", "1", "\ud800", "\0"]), max_size=40
)


@given(soup.map("".join))
def test_any_soup_of_yaml_is_documents_or_errors(text):
    found, errors = read(text)
    assert all(isinstance(root, Map) for root in found)
    assert all(error.startswith("f.yaml") for error in errors)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("a", "a"),
        ("", None),
        ("~", None),
        ("null", None),
        ("true", True),
        ("False", False),
        ("0", 0),
        ("-17", -17),
        ("1.5", 1.5),
        ("1.e3", 1000.0),
        ("-.inf", float("-inf")),
        ("1e3", 1000.0),
        (".5", 0.5),
        ("'80'", "80"),
        ('"true"', "true"),
        ("''", ""),
        ("2024-01-01", "2024-01-01"),
        ("10:20:30", "10:20:30"),
        ("10.0.0.1", "10.0.0.1"),
        ("fd00::1", "fd00::1"),
        ("=", "="),
    ],
)
def test_scalars_are_read_by_the_core_schema(text, value):
    ((root,), errors) = read(f"x: {text}\n")
    assert errors == []
    assert plain(root) == {"x": value}
    assert type(plain(root)["x"]) is type(value)


def test_not_a_number_is_one_too():
    ((root,), errors) = read("x: .NaN\n")
    assert errors == []
    assert math.isnan(plain(root)["x"])


@pytest.mark.parametrize("text", ["on", "No", "YES", "y", "010", "0x1F", "0o17", "1_000", "off"])
def test_words_that_yaml_versions_read_differently_must_be_quoted(text):
    reader, report = reader_of(f"x: {text}\n")
    assert reader.text("x") == ""
    assert [str(e) for e in report.errors] == [
        f'f.yaml:1: x: YAML versions read {text!r} differently; write it in quotes: "{text}"'
    ]


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("a: 1\nb: &x 2\nc: *x\n", "f.yaml:3: the alias *x is not taken: write the value out"),
        ("a: !!str 1\n", "f.yaml:1: the tag 'tag:yaml.org,2002:str' is not taken: write the plain value"),
        ("a: !!python/object/apply:os.system [x]\n", "is not taken: write the plain value"),
        ("a: 1\nb: 2\na: 3\n", "f.yaml:3: the key 'a' stands twice, first in line 1: remove one"),
        ("x: {a: 1, 'a': 2}\n", "f.yaml:1: the key 'a' stands twice, first in line 1: remove one"),
        ("on: 1\n", "f.yaml:1: the key 'on' is no text: write it in quotes"),
        ("1.5: 1\n", "f.yaml:1: the key '1.5' is no text: write it in quotes"),
        ("~: 1\n", "f.yaml:1: the key '~' is no text: write it in quotes"),
        ("? [a]\n: 1\n", "f.yaml:1: a key must be text, not a list"),
        ("- a\n", "f.yaml:1: a document must be a mapping that begins with apiVersion"),
        ("hello\n", "f.yaml:1: a document must be a mapping that begins with apiVersion"),
        ("a: [1, 2\nb: 3\n", "f.yaml:2: not valid YAML: "),
        ("a: 'x\n", "not valid YAML: "),
        ("a:\n\t- b\n", "f.yaml:2: not valid YAML: "),
        ("a: \x00\n", "not valid YAML: "),
        ("a: \ud800\n", "f.yaml: not valid Unicode text; save the file as UTF-8"),
        ("x: " + "[" * 40 + "]" * 40, "f.yaml:1: nested deeper than 20 levels"),
        ("x: " + "[" * 100_000, "f.yaml:1: nested deeper than 20 levels"),
        ("{" * 100_000, "f.yaml:1: nested deeper than 20 levels"),
    ],
)
def test_what_is_dangerous_or_broken_is_refused_with_its_line(text, error):
    _, errors = read(text)
    assert len(errors) == 1
    assert error in errors[0]


def test_a_billion_laughs_costs_nothing():
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 10)]
    _, errors = read("\n".join(lines))
    assert errors == ["f.yaml:2: the alias *a0 is not taken: write the value out"]


def test_a_document_of_too_many_values_is_refused(monkeypatch):
    monkeypatch.setattr(document, "MAX_NODES", 10)
    assert read("---\n".join("a: [1, 2, 3, 4, 5, 6, 7]\n" for _ in range(3)))[1] == []
    assert read("a: [1, 2, 3, 4,\n 5, 6, 7, 8]")[1] == [
        "f.yaml:2: more than 10 values in one document; split the resource"
    ]


def test_a_key_that_is_too_long_is_refused():
    _, errors = read(f"{'k' * 513}: 1\n")
    assert errors == [f"f.yaml:1: the key '{'k' * 57}...' is longer than 512 characters"]


def test_a_great_many_unknown_fields_cost_little():
    report = Report()
    (root,) = read_documents("\n".join(f"field{n}: 1" for n in range(20_000)), "f.yaml", report)
    reader = Reader(root, "", position_of(root, "f.yaml"), report)
    assert not [reader.has(f"known{n}") for n in range(30) if reader.has(f"known{n}")]
    reader.finish()
    assert (len(report.errors), report.dropped) == (MAX_PROBLEMS, 20_000 - MAX_PROBLEMS)


def test_a_file_that_is_too_long_is_refused(monkeypatch):
    monkeypatch.setattr(document, "MAX_CHARACTERS", 10)
    assert read("a: 12345678") == ([], ["f.yaml: longer than 10 characters; split the file"])


def test_documents_before_a_broken_one_are_still_looked_at():
    found, errors = read("a: 1\n---\nb: [\n")
    assert [plain(root) for root in found] == [{"a": 1}]
    assert len(errors) == 1


def test_empty_documents_are_nothing():
    assert read("") == ([], [])
    assert read("---\n---\n# only a comment\n") == ([], [])


def test_errors_are_bounded():
    report = Report()
    list(read_documents("\n".join("a: 1" for _ in range(MAX_PROBLEMS * 3)), "f.yaml", report))
    assert (len(report.errors), report.dropped) == (MAX_PROBLEMS, 2 * MAX_PROBLEMS - 1)
    with pytest.raises(ResourceErrors, match=r"f\.yaml: 199 more errors; mend these first\Z"):
        report.raise_errors()


TEXT = """\
kind: x

spec:
  ports:
  - port: 80
  - {port: 81,
     name: b}
  labels: {"a.b/c": d}
"""


def test_every_field_knows_its_line():
    reader, _ = reader_of(TEXT)
    lines = reader.position.lines
    assert {path: lines[path] for path in ("kind", "spec", "spec.ports[0]", "spec.ports[1].name")} == {
        "kind": 1,
        "spec": 3,
        "spec.ports[0]": 5,
        "spec.ports[1].name": 7,
    }
    assert lines["spec.labels['a.b/c']"] == 8
    assert reader.position.error("spec.ports[1].target.name", "no").line == 6
    assert reader.position.error("nowhere[3].at.all", "no").line == 1


def problems(text, *reads):
    reader, report = reader_of(text)
    for read_field in reads:
        read_field(reader)
    reader.finish()
    return [str(error).removeprefix("f.yaml:") for error in report.errors]


@pytest.mark.parametrize(
    ("text", "read_field", "expected"),
    [
        ("x: [1]", lambda r: r.text("x"), "1: x: must be text, not a list"),
        ("x: {}", lambda r: r.text("x"), "1: x: must be text, not a mapping"),
        ("x: 80", lambda r: r.text("x"), '1: x: must be text, not the number 80; write it in quotes: "80"'),
        ("x: 1.20", lambda r: r.text("x"), '1: x: must be text, not the number 1.20; write it in quotes: "1.20"'),
        ("x: true", lambda r: r.text("x"), '1: x: must be text, not the boolean true; write it in quotes: "true"'),
        ("x:", lambda r: r.text("x"), "1: x: is empty; give it a value or remove it"),
        ("q: 1", lambda r: (r.has("q"), r.text("x", required="a name")), "1: x: is missing; it must be a name"),
        ("x: a", lambda r: r.text("x", lambda text: f"{text} is bad"), "1: x: a is bad"),
        ("x: '80'", lambda r: r.integer("x", 1, 9), "1: x: must be a number from 1 to 9, not the text '80'"),
        ("x: 1.0", lambda r: r.integer("x", 1, 9), "1: x: must be a number from 1 to 9, not the number 1.0"),
        ("x: true", lambda r: r.integer("x", 1, 9), "1: x: must be a number from 1 to 9, not the boolean true"),
        ("x: 0x3", lambda r: r.integer("x", 1, 9), "1: x: must be a number from 1 to 9, not the text '0x3'"),
        ("x: 10", lambda r: r.integer("x", 1, 9), "1: x: 10 is out of range: 1 to 9"),
        ("x: yes", lambda r: r.boolean("x", default=True), "1: x: must be true or false, not the text 'yes'"),
        ("x: {a: b}", lambda r: r.children("x"), "1: x: must be a list, not a mapping"),
        ("x: []", lambda r: r.children("x"), "1: x: is an empty list; give it an item or remove the field"),
        ("x: [a]", lambda r: r.children("x"), "1: x[0]: must be a mapping, not the text 'a'"),
        ("x: [~]", lambda r: r.children("x"), "1: x[0]: must be a mapping, not empty"),
        ("x: a", lambda r: r.child("x").text("z", required="z"), "1: x: must be a mapping, not the text 'a'"),
        ("x:", lambda r: r.child("x").text("z", required="z"), "1: x: is empty; give it a value or remove it"),
        ("x: [a, [b]]", lambda r: r.parsed_list("x", str), "1: x[1]: must be text, not a list"),
        ("x: [~]", lambda r: r.parsed_list("x", str), "1: x[0]: is empty; it must be text"),
        ("x: a", lambda r: r.parsed("x", int), "1: x: invalid literal for int() with base 10: 'a'"),
        ("x: Bad", lambda r: r.choice("x", ["Good", "Best"], default="Good"), "1: x: 'Bad' must be Good or Best"),
        ("x: Goood", lambda r: r.choice("x", ["Good"], default="Good"), "(did you mean 'Good'?)"),
        ("x: ''", lambda r: r.choice("x", ["Good"], default="Good"), "1: x: '' must be Good"),
        (
            "x: Evil",
            lambda r: r.choice("x", ["Good"], default="", others={"Evil": "why"}),
            "1: x: Evil is refused: why",
        ),
        ("x: 1", lambda r: r.refuse({"x": "because"}), "1: x: is refused: because"),
        ("prots: 1", lambda r: r.has("ports"), "1: prots: unknown field; known here: ports (did you mean 'ports'?)"),
        ("x: {q: 1}", lambda r: r.child("x").finish(), "1: x.q: unknown field; none is known here"),
        ("x: {-a: b}", lambda r: r.pairs("x", lambda key: f"bad {key}", lambda value: "", most=9), "1: x.-a: bad -a"),
        ("x: {a: b}", lambda r: r.pairs("x", lambda key: "", lambda value: "bad", most=9), "1: x.a: bad"),
        (
            "x: {a: b, c: d}",
            lambda r: r.pairs("x", lambda k: "", lambda v: "", most=1),
            "1: x: has 2 entries; at most 1 are taken",
        ),
        (
            "x: {a: 1}",
            lambda r: r.pairs("x", lambda k: "", lambda v: "", most=9),
            'must be text, not the number 1; write it in quotes: "1"',
        ),
        (
            "x: [a]",
            lambda r: r.integer_or_text("x", 1, 9, lambda t: "", default=1),
            "1: x: must be a number from 1 to 9, not a list",
        ),
    ],
)
def test_each_wrong_field_gives_one_error_that_says_what_would_be_right(text, read_field, expected):
    found = problems(text, read_field)
    assert len(found) == 1
    assert expected in found[0]


def test_right_fields_give_no_error():
    text = "a: x\nb: 3\nc: true\nd: [p, q]\ne: {f: g}\nh: Good\ni: 5\nj: http\nk: [{l: m}]\n"
    seen = []
    assert (
        problems(
            text,
            lambda r: seen.append(r.text("a")),
            lambda r: seen.append(r.integer("b", 1, 9)),
            lambda r: seen.append(r.boolean("c", default=False)),
            lambda r: seen.append(r.parsed_list("d", str.upper)),
            lambda r: seen.append(r.pairs("e", lambda k: "", lambda v: "", most=1)),
            lambda r: seen.append(r.choice("h", ["Good"], default="Bad")),
            lambda r: seen.append(r.integer_or_text("i", 1, 9, lambda t: "", default=1)),
            lambda r: seen.append(r.integer_or_text("j", 1, 9, lambda t: "", default=1)),
            lambda r: seen.append([child.text("l") for child in r.children("k")]),
            lambda r: seen.append((r.text("z", default="none"), r.integer("y", 1, 9, default=7), r.parsed("w", str))),
        )
        == []
    )
    assert seen == ["x", 3, True, ("P", "Q"), {"f": "g"}, "Good", 5, "http", ["m"], ("none", 7, None)]
