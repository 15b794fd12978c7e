"""Methods, headers and paths: what HTTP lets stand there, and the one way to write a path."""

from __future__ import annotations

import re
from urllib.parse import unquote

import pytest
from hypothesis import given
from hypothesis import strategies as st

from control.api.http_text import normal_path, wrong_field_value, wrong_header_name, wrong_method

pieces = st.sampled_from(
    ["a", "B", ".", "..", "/", "//", "%41", "%2a", "%2A", "%2f", "%5C", "%00", "~", "*", "%7E", "-"]
)


@given(st.lists(pieces, max_size=6).map("".join))
def test_a_path_has_one_form_that_means_the_same(text):
    try:
        path = normal_path(text)
    except ValueError:
        decoded = unquote(text, "latin-1")
        dots = {".", ".."} & set(re.sub("%2[eE]", ".", text).split("/"))
        assert not text or dots or {"%2F", "%5C", "%00"} & set(re.findall("%..", text.upper())), decoded
        return
    assert normal_path(path) == path
    assert unquote(path, "latin-1") == unquote(text, "latin-1")
    assert not re.search("%[0-9A-F]?[a-f]|%41|%7E", path)


@pytest.mark.parametrize("text", ["", "/a b", "/a?b", "/a#b", "/%4", "/%", "/\u00fc", "/{a}", "/a\\b", "/" * 1025])
def test_what_is_no_path_is_refused(text):
    with pytest.raises(ValueError, match="is no path of up to 1024 characters"):
        normal_path(text)


@pytest.mark.parametrize("text", ["x", "x-user", "a1!#$%&'*+.^_`|~-", "x" * 256])
def test_names_of_headers(text):
    assert wrong_header_name(text) == ""


@pytest.mark.parametrize("text", ["", "X", "a b", "a:", ":path", "a\r", "\u00fc", "x" * 257, "x\n"])
def test_what_is_no_name_of_a_header(text):
    assert "is no header's name in lower case" in wrong_header_name(text)


@pytest.mark.parametrize(
    ("text", "right"), [("", True), ("a\tb c", True), (" a", False), ("a ", False), ("a\n", False)]
)
def test_values_of_headers(text, right):
    assert (wrong_field_value(text) == "") is right
    assert wrong_field_value("\u00fc")
    assert wrong_field_value("x" * 4097)


@pytest.mark.parametrize(
    ("text", "right"), [("GET", True), ("M-SEARCH", True), ("get", False), ("", False), ("G T", False)]
)
def test_methods(text, right):
    assert (wrong_method(text) == "") is right
