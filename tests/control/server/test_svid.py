"""The control plane's own certificates: renewed in time by the clock that others check them with."""

import asyncio

import pytest

from control.server import svid
from control.server.ca import DEFAULT_TTL_S, Authority
from control.server.rights import broker_id
from control.server.svid import due, issue_own

HALF_S = DEFAULT_TTL_S / 2


@pytest.fixture
def identity(tmp_path):
    authority = Authority.create(tmp_path / "ca", "cluster.local")
    issue_own(authority, tmp_path / "own", broker_id(authority.trust_domain))
    return tmp_path / "own"


def is_due(directory, monkeypatch, ahead_s):
    """Within one look."""
    now = svid.time.time() + ahead_s
    monkeypatch.setattr(svid, "_LEAST_PAUSE_S", 0.0)
    monkeypatch.setattr(svid, "_LOOK_S", 0.01)

    async def wait():
        async with asyncio.timeout(0.1):
            await due(directory, now=lambda: now)

    try:
        asyncio.run(wait())
    except TimeoutError:
        return False
    return True


@pytest.mark.parametrize(
    ("ahead_s", "expected"),
    [
        (0, False),
        (HALF_S - 10, False),
        (HALF_S + 10, True),
        (10 * DEFAULT_TTL_S, True),  # the host was suspended, or its clock was behind
        (-30, False),
        (-3600, True),  # the clock was ahead when the certificate was made: it is not valid yet
    ],
)
def test_it_is_due_at_half_life_by_the_wall_clock(identity, monkeypatch, ahead_s, expected):
    assert is_due(identity, monkeypatch, ahead_s) is expected


@pytest.mark.parametrize("content", [None, b"", b"-----BEGIN CERTIFICATE-----\n"])
def test_one_that_cannot_be_read_is_due(identity, monkeypatch, content):
    (identity / "chain.pem").unlink()
    if content is not None:
        (identity / "chain.pem").write_bytes(content)
    assert is_due(identity, monkeypatch, 0)


def test_a_suspended_host_is_noticed_within_a_minute():
    assert svid._LOOK_S <= 60
