"""What is forwarded is read by other parsers as the same one request: h11 and llhttp (Node's), in this process.

`test_smuggling` asks whole servers, about what a running waypoint forwards. Behind each forwarded request follows
another: whoever sees an end that we do not would not answer both.
"""

from __future__ import annotations

import contextlib
from typing import Any

import httptools
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.examples import examples
from tests.support.http1_judges import (
    NEXT_REQUEST,
    by_h11,
    by_llhttp,
    forwarded,
    read_by_h11,
    relayed,
)
from tests.support.http1_vectors import REFUSED, TAKEN, mutated


def check(judge: Any, data: bytes) -> None:
    found = forwarded(data)
    assert found is not None
    sent, request = found
    assert judge(sent) == [request, NEXT_REQUEST]


@pytest.mark.parametrize("name", TAKEN)
def test_h11_reads_what_we_read(name: str) -> None:
    check(by_h11, TAKEN[name])


@pytest.mark.parametrize("name", TAKEN)
def test_llhttp_reads_what_we_read(name: str) -> None:
    check(by_llhttp, TAKEN[name])


@given(mutated([*REFUSED.values(), *(10 * [*TAKEN.values()])]))
@settings(max_examples=examples(300))  # most are refused
def test_whatever_we_forward_is_read_as_we_read_it(data: bytes) -> None:
    found = forwarded(data)
    if found is None:
        return
    sent, request = found
    assert by_h11(sent) == [request, NEXT_REQUEST]
    with contextlib.suppress(httptools.HttpParserInvalidMethodError):  # it knows a list of methods only
        assert by_llhttp(sent) == [request, NEXT_REQUEST]


# -- responses, on their way to a client

RESPONSES = (
    b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello",
    b"HTTP/1.1 404\r\nX: y\r\nTransfer-Encoding: chunked\r\n\r\n5;a=b\r\nhello\r\n0\r\nX: y\r\n\r\n",
    b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 204 No Content\r\nContent-Length: 0\r\n\r\n",
    b"HTTP/1.1 304 Not Modified\r\nConnection: x\r\nX: y\r\nContent-Length: 5\r\n\r\n",
    b"HTTP/1.0 200 \xe9\r\n\r\nhello",
)


@given(mutated(RESPONSES), st.sampled_from(["GET", "HEAD"]))
@settings(max_examples=examples(300))
def test_clients_read_the_responses_that_we_read(data: bytes, method: str) -> None:
    found = relayed(data, method)
    if found is None:
        return
    sent, seen = found
    assert read_by_h11(sent, method) == [*seen, (200, b"next")]
