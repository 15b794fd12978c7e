"""Join tokens: read as written, and anything else is refused without a word of the secret."""

from __future__ import annotations

import base64

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from control.api.token import JoinToken, TokenError

hosts = st.sampled_from(["control.example", "10.0.0.1", "[fd00::1]"])
tokens = st.builds(
    JoinToken,
    st.builds("https://{}:{}".format, hosts, st.integers(1, 65535)),
    st.binary(min_size=32, max_size=32),
    st.text("abcXYZ019_-", min_size=1, max_size=64),
    st.binary(min_size=32, max_size=32),
)
TOKEN = JoinToken("https://control.example:15012", bytes(32), "one", bytes(range(32)))


@given(tokens)
def test_a_token_survives_its_text(token):
    assert JoinToken.decode(f" {token.encode()}\n") == token
    assert len(token.encode()) < 1024


@given(tokens, st.data())
def test_a_token_cut_or_with_a_letter_changed_is_refused_or_another(token, data):
    text = token.encode()
    with pytest.raises(TokenError):
        JoinToken.decode(text[: data.draw(st.integers(0, len(text) - 1))])
    place = data.draw(st.integers(0, len(text) - 1))
    changed = text[:place] + data.draw(st.sampled_from("abcXYZ019_-.=+ ")) + text[place + 1 :]
    try:
        found = JoinToken.decode(changed)
    except TokenError:
        return
    assert found.encode() == changed.strip()


@given(st.text(max_size=80) | st.text("abcXYZ019_-", max_size=80).map("ujt1.".__add__))
def test_any_other_text_is_refused(text):
    with pytest.raises(TokenError):
        JoinToken.decode(text)


def of(content):
    return "ujt1." + base64.urlsafe_b64encode(msgpack.packb(content)).decode().rstrip("=")


CONTENT = {"url": TOKEN.url, "root": bytes(32), "id": "one", "secret": bytes(32)}


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "begins with 'ujt1.'"),
        ("UJT1.abc", "begins with 'ujt1.'"),
        ("ujt1." + "a" * 2000, "at most 1024"),
        (TOKEN.encode() + "=", "damaged"),
        (TOKEN.encode()[:-3], "damaged"),
        (of({**CONTENT, "more": 1}), "damaged"),
        (of({**CONTENT, "id": 1}), "damaged"),
        (of([]), "damaged"),
        (of({**CONTENT, "url": "http://control.example:15012"}), "must be https"),
        (of({**CONTENT, "url": "https://control.example"}), "must be https"),
        (of({**CONTENT, "url": "https://control.example:15012/x"}), "must be https"),
        (of({**CONTENT, "url": "https://a@control.example:15012"}), "must be https"),
        (of({**CONTENT, "url": "https://control.example:0"}), "must be https"),
        (of({**CONTENT, "url": "https://control.example:65536"}), "must be https"),
        (of({**CONTENT, "url": f"https://{'a' * 400}:1"}), "must be https"),
        (of({**CONTENT, "root": bytes(31)}), "32 bytes, not 31"),
        (of({**CONTENT, "id": ""}), "id must be"),
        (of({**CONTENT, "id": "a" * 65}), "id must be"),
        (of({**CONTENT, "id": "a\n"}), "id must be"),
        (of({**CONTENT, "secret": bytes(33)}), "32 bytes, not 33"),
        (of(dict(reversed(CONTENT.items()))), "not written as we write it"),
    ],
)
def test_each_wrong_token_is_refused_with_what_is_wrong(text, problem):
    with pytest.raises(TokenError, match=problem):
        JoinToken.decode(text)


def test_a_wrong_token_is_not_made():
    with pytest.raises(TokenError, match="must be https"):
        JoinToken("ftp://x:1", bytes(32), "one", bytes(32)).encode()


def test_the_secret_is_never_shown():
    assert "secret" not in repr(TOKEN)
    with pytest.raises(TokenError) as refused:
        JoinToken.decode(of({**CONTENT, "secret": b"s3cret"}))
    assert "s3cret" not in str(refused.value)
