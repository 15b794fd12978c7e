"""Expressions against Python's `re`, and against texts that make others slow."""

import random
import re
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from control.api.expression import MAX_POSITIONS, Expression
from tests.support.examples import examples

_CHARACTERS = "ab/.-1"


def _repeated(inner):
    counts = st.sampled_from(["*", "+", "?", "{2}", "{0,2}", "{1,}", "*?", "{0}", "{0,0}"])
    return st.tuples(inner, counts).map(lambda pair: f"(?:{pair[0]}){pair[1]}")


ATOMS = st.sampled_from(
    ["a", "b", "/", r"\.", "-", "1", ".", "[ab]", "[^a/]", r"\d", r"\W", r"[\w-]", "[a-b1]", r"\x61"]
)
EXPRESSIONS = st.recursive(
    ATOMS,
    lambda inner: st.one_of(
        st.lists(inner, min_size=1, max_size=4).map("".join),
        st.lists(inner | st.just(""), min_size=2, max_size=3).map(lambda choices: f"({'|'.join(choices)})"),
        _repeated(inner),
    ),
    max_leaves=12,
)


@settings(max_examples=examples(300), deadline=None)
@given(EXPRESSIONS, st.lists(st.text(_CHARACTERS + "\n_é", max_size=12), min_size=1, max_size=5))
def test_it_matches_what_python_does(text, asked):
    try:
        mine = Expression(text)
    except ValueError as error:
        assert "too often" in str(error) or "longer than" in str(error)  # noqa: PT017 - of some drawn ones only
        return
    for one in asked:
        assert mine.matches(one) == bool(re.fullmatch(text, one, re.ASCII)), (text, one)


@pytest.mark.parametrize(
    ("text", "yes", "no"),
    [
        ("^/v[0-9]+/.*$", ["/v1/", "/v22/x/y"], ["/v/", "/v1", "x/v1/"]),
        (r"/a\$", ["/a$"], ["/a"]),
        (r"/a\\$", ["/a\\"], ["/a"]),
        ("(?P<name>a|b)c", ["ac", "bc"], ["c", "abc"]),
        ("(?<name>a){2,3}", ["aa", "aaa"], ["a", "aaaa"]),
        ("", [""], ["a"]),
        ("[]a]+", ["]a"], ["b"]),
        ("[^]]", ["a"], ["]"]),
        ("[a-]", ["-", "a"], ["b"]),
        ("a{0}", [""], ["a"]),
        ("ü+", ["üü"], ["u"]),
        ("(((){1000}){1000}){1000}a", ["a"], ["", "aa"]),
        ("((((|a{0}){1,1000}){1000}){1000,}){1000}", [""], ["a"]),
    ],
)
def test_what_expressions_match(text, yes, no):
    found = Expression(text)
    assert [found.matches(one) for one in yes] == [True] * len(yes)
    assert [found.matches(one) for one in no] == [False] * len(no)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("(a", "has no ')'"),
        ("a)", "closes no group"),
        ("[a", "has no ']'"),
        ("[b-a]", "goes from one character to a later one"),
        (r"[a-\d]", "goes from one character to a later one"),
        ("*a", "repeats nothing"),
        ("a**", "repeats a repetition"),
        ("a{2", "begins no count"),
        ("a{x}", "begins no count"),
        ("a{3,2}", "ends before it begins"),
        ("a^b", "stands in the middle"),
        ("a$b", "stands in the middle"),
        ("(?i)a", "begins what is not there, as flags"),
        ("(?=a)", "begins what is not there, as flags"),
        ("(?P<a", "begins what is not there, as flags"),
        ("(?<=a>)b", "begins what is not there, as flags"),
        (r"\bword", r"\b is not there"),
        (r"\p{Greek}", r"\p is not there"),
        (r"(a)\1", r"\1 is not there"),
        (r"\xg0", "two hexadecimal digits"),
        ("a\\", "stands at the end"),
        ("[[:alpha:]]", "write a-zA-Z"),
        ("(" * 51 + ")" * 51, "nests more than 50"),
        ("(a{1000}){1000}", f"longer than {MAX_POSITIONS}"),
        ("(a?){600}", "too often"),
    ],
)
def test_what_is_no_expression_is_refused(text, problem):
    with pytest.raises(ValueError, match=re.escape(problem)):
        Expression(text)


@pytest.mark.parametrize("text", ["(a+)+b", "(a|a)*b", ".*.*.*.*=x", "(.*a){20}c", ".*a.{300}b"])
def test_no_text_makes_it_slow(text):
    found = Expression(text)
    short, long = "a" * 500, "a" * 4000
    assert not found.matches(short)
    started = time.process_time()
    assert not found.matches(long)
    # `re` needs more than a lifetime for the first two, and minutes for the third; this is for any machine.
    assert time.process_time() - started < 5


def test_what_it_remembers_is_bounded():
    found = Expression(".*a.{300}b")
    chance = random.Random(1)
    assert not found.matches("".join(chance.choices("ab", k=3000)) + "a")
    assert sum(1 + len(state.following) + len(state.positions) for state in found._states.values()) < 45_000
    assert found.matches("a" + "c" * 300 + "b")
