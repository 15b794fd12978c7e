"""What is judged of a request: every spelling of a path comes out as one, or is refused."""

from urllib.parse import unquote_to_bytes

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from control.api.http_text import normal_path
from waypoint.request import RequestError, host_name, merged_slashes, read_request


def read(target: str, **fields: str):
    named = [(name.replace("_", "-").encode(), value.encode("latin-1")) for name, value in fields.items()]
    return read_request("GET", target, named)


@pytest.mark.parametrize(
    ("target", "path", "query"),
    [
        ("/", "/", ""),
        ("/reviews/v2", "/reviews/v2", ""),
        ("/reviews?", "/reviews", "?"),
        ("/reviews?a=/../%2F", "/reviews", "?a=/../%2F"),
        ("/a?b?c", "/a", "?b?c"),
        # https://istio.io/latest/docs/reference/config/security/normalization/
        ("/some/data/%61%62%63", "/some/data/abc", ""),
        ("/some//data///abc", "/some/data/abc", ""),
        ("/public/./data/abc/../xyz", "/public/data/xyz", ""),
        ("/%7euser/%2D%5f%41", "/~user/-_A", ""),
        ("/caf%c3%a9", "/caf%C3%A9", ""),
        ("/%2e%2e/admin", "/admin", ""),
        ("/a/%2E/b", "/a/b", ""),
        # RFC 3986 section 5.2.4, and its examples of 5.4
        ("/a/b/c/./../../g", "/a/g", ""),
        ("/b/c/..", "/b/", ""),
        ("/b/c/.", "/b/c/", ""),
        ("/../../g", "/g", ""),
        ("/..", "/", ""),
        ("/b/c/g.", "/b/c/g.", ""),
        ("/b/c/..g", "/b/c/..g", ""),
        ("/.well-known/x", "/.well-known/x", ""),
        ("/...", "/...", ""),
        ("/a/;x=1/b", "/a/;x=1/b", ""),
        ("//admin", "/admin", ""),
        ("/a//../b", "/a/b", ""),
        ('/{id}|"', "/%7Bid%7D%7C%22", ""),
        ("/a%20b%25", "/a%20b%25", ""),
        ("/%252e%252e/x", "/%252e%252e/x", ""),  # decoded once, never twice
    ],
)
def test_a_path_has_one_spelling(target, path, query):
    request = read(target)
    assert (request.path, request.query) == (path, query)
    assert request.target == path + query


@pytest.mark.parametrize(
    "target",
    [
        "",
        "*",
        "admin",
        "?a=b",
        "http://shop/admin",
        "/a%2fb",
        "/a%2Fb",
        "/a%5cb",
        "/a%5Cb",
        "/a\\b",
        "/a%00b",
        "/a%",
        "/a%4",
        "/a%zz",
        "/a%+1",
        "/public/..;/admin",
        "/public/..;x=1/admin",
        "/public/%2e%2e;/admin",
        "/public/.;/admin",
        "/a b",
        "/a\tb",
        "/a\x7f",
        "/a\xe9",
        "/a\u0130",
        "/a#b",
        "/a?b#c",
        "/a?b c",
        "/a?\xe9",
        "/a\n",
        "/a?b\n",
        "/a?\n",
    ],
)
def test_what_two_could_read_differently_is_refused(target):
    with pytest.raises(RequestError):
        read(target)


pieces = st.sampled_from(
    [
        "/",
        "//",
        ".",
        "..",
        "%2e",
        "%2E%2e",
        "a",
        "B",
        "~",
        "%41",
        "%7e",
        "%c3",
        "%25",
        "%2525",
        ";",
        "{",
        "x=1",
        "-",
        "%20",
    ]
)
targets = st.lists(pieces, max_size=8).map(lambda found: "/" + "".join(found))


@given(targets)
@example("/..;")
def test_normalising_is_final_and_keeps_what_is_meant(target):
    try:
        path = read(target).path
    except RequestError:
        assert ";" in target  # nothing else of these pieces is refused
        return
    assert read(path).path == path
    assert normal_path(path) == path  # what routes and policies may name is what requests become
    assert "//" not in path
    assert not {".", ".."}.intersection(path.split("/"))
    assert decoded(path) == merged_slashes(remove_dot_segments(decoded(target)))


def decoded(path: str) -> str:
    return unquote_to_bytes(path).decode("latin-1")


def remove_dot_segments(path: str) -> str:
    """RFC 3986 section 5.2.4, as the steps stand there."""
    left, out = path, ""
    while left:
        if left.startswith("/./") or left == "/.":
            left = "/" + left[3:]
        elif left.startswith("/../") or left == "/..":
            left, out = "/" + left[4:], out[: max(out.rfind("/"), 0)]
        else:
            end = left.find("/", 1)
            segment, left = (left, "") if end < 0 else (left[:end], left[end:])
            out += segment
    return out


@given(st.text(st.characters(max_codepoint=0x17F), max_size=20))
@example("?\n")
def test_any_target_is_read_or_refused(tail):
    try:
        request = read("/" + tail)
    except RequestError:
        return
    assert all("!" <= character <= "~" for character in request.target)
    assert "#" not in request.target


@pytest.mark.parametrize(
    ("host", "name"),
    [
        ("shop.example", "shop.example"),
        ("shop.example:8080", "shop.example"),
        ("shop.example.", "shop.example"),
        ("shop.example.:80", "shop.example"),
        ("10.0.0.1:80", "10.0.0.1"),
        ("[fd00::1]:80", "[fd00::1]"),
        ("[fd00::1]", "[fd00::1]"),
        ("shop.example:", "shop.example"),
        ("a:b:c", "a:b:c"),
        ("", ""),
    ],
)
def test_a_host_has_a_name(host, name):
    assert host_name(host) == name


@pytest.mark.parametrize("host", ["shop.example..", "shop..example", ".shop.example", "shop.example..:80", ".", ".:80"])
def test_a_host_with_an_empty_label_is_refused(host):
    with pytest.raises(RequestError, match="empty label"):
        read("/", host=host)


@pytest.mark.parametrize("host", ["shop.example.", "shop.example.:80", "[::ffff:10.0.0.1]:80", "db", "10.0.0.1"])
def test_every_other_host_is_read(host):
    assert read("/", host=host).host == host


def test_lines_of_a_field_are_joined():
    fields = [(b"host", b"Shop.Example"), (b"x-a", b"1"), (b"x-a", b"2"), (b"x-b", b"\xe9")]
    request = read_request("GET", "/", fields)
    assert request.host == "shop.example"
    assert request.header("x-a") == "1,2"
    assert request.header("x-b") == "\xe9"
    assert request.header("x-c") is None
    assert read("/").host == ""


def test_slashes_of_patterns():
    assert merged_slashes("//a///b*") == "/a/b*"
