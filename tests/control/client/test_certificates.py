"""Certificates that stay fresh: renewed at half life by a real control plane, kept when it is away."""

import asyncio
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from control.client import certificates, certify
from control.client.certificates import JoinError, Renewal, join
from control.server.ca import Authority
from tests.support.certificate_server import certificate_server
from tests.support.certificates import WEB
from uproxy import plane
from uproxy.tls import Credentials

HALF_A_DAY_S = 12 * 3600


@pytest.fixture(scope="module")
def authority(tmp_path_factory):
    return Authority.create(tmp_path_factory.mktemp("ca") / "ca", "cluster.local")


@pytest.fixture(scope="module")
def control(authority, tmp_path_factory):
    with certificate_server(authority, tmp_path_factory.mktemp("control")) as running:
        yield running


@pytest.fixture
def joined(control, tmp_path) -> Path:
    certify.join(control.token(WEB), tmp_path / "id")
    return tmp_path / "id"


@pytest.fixture
def silent():
    """A port of loopback where nothing listens."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        yield f"https://127.0.0.1:{bound.getsockname()[1]}"


@pytest.fixture
def deaf():
    """A port of loopback where connections are taken and nothing is said."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        yield f"https://127.0.0.1:{listening.getsockname()[1]}"


@dataclass
class Clock:
    """The real one, moved on."""

    ahead_s: float = 0.0

    def __call__(self) -> float:
        return time.time() + self.ahead_s


def move_control_plane(directory: Path, url: str) -> str:
    """Returns where it was."""
    document = json.loads((directory / "mesh.json").read_bytes())
    (directory / "mesh.json").write_text(json.dumps(document | {"control": url}))
    return document["control"]


def serial(directory: Path) -> int:
    return Credentials.load(directory).serial


async def until(condition) -> None:
    async with asyncio.timeout(15.0):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.02)


@contextlib.asynccontextmanager
async def running(renewal: Renewal):
    async with asyncio.TaskGroup() as group:
        task = group.create_task(renewal.run())
        yield
        task.cancel()


# -- renewal


def test_a_certificate_is_renewed_at_half_life_again_and_again(joined):
    serials = [serial(joined)]

    def renewed() -> bool:
        now = serial(joined)  # there is one at any moment, and with its key
        if now != serials[-1]:
            serials.append(now)
        return len(serials) == 3

    async def scenario() -> None:
        renewal = Renewal(joined, Clock(HALF_A_DAY_S - 1.0))
        renewal._share = 0.5
        async with running(renewal):
            await asyncio.sleep(0.1)
            assert not renewed()
            await until(renewed)
        assert renewal.problem == ""

    plane.run(scenario())


@pytest.mark.parametrize(("ahead_s", "due"), [(0.48 * 86400, False), (0.52 * 86400, True), (2 * 86400, True)])
def test_half_life_is_when_a_renewal_is_due(joined, monkeypatch, ahead_s, due):
    asked = []

    async def ask(*arguments: str) -> None:
        asked.append(arguments)

    monkeypatch.setattr(certificates, "_certify", ask)

    async def scenario() -> None:
        async with running(Renewal(joined, Clock(ahead_s))):
            await asyncio.sleep(0.05)

    plane.run(scenario())
    assert asked == ([("renew", "--dir", str(joined))] if due else [])


def test_half_life_counts_from_when_the_certificate_came(joined, monkeypatch):
    """CAs date back by a minute; a file that was touched, or a clock that was set back, does not make it younger."""
    leaf = Credentials.load(joined)
    came_at = leaf.not_before + 60
    middle = (came_at + leaf.not_after) / 2
    jitter = 0.01 * 86400 + 1
    os.utime(joined / "chain.pem", (came_at, came_at))
    assert Renewal(joined)._due_at() == pytest.approx(middle, abs=jitter)
    os.utime(joined / "chain.pem", (came_at, came_at + 3600))
    assert Renewal(joined)._due_at() == pytest.approx(middle - 30, abs=jitter)
    os.utime(joined / "chain.pem", (0, 0))
    assert Renewal(joined)._due_at() == pytest.approx(middle - 30, abs=jitter)


def test_while_the_control_plane_is_away_the_certificate_stays_and_the_reason_is_told(joined, silent, caplog):
    there = move_control_plane(joined, silent)
    before = (joined / "chain.pem").read_bytes()
    clock = Clock(HALF_A_DAY_S + 3600)

    async def scenario() -> None:
        renewal = Renewal(joined, clock)
        async with running(renewal):
            await until(lambda: len(caplog.records) == 2)
            assert f"cannot be renewed: no answer from {silent}" in renewal.problem
            assert (joined / "chain.pem").read_bytes() == before
            move_control_plane(joined, there)
            await until(lambda: (joined / "chain.pem").read_bytes() != before)
            clock.ahead_s = 0
            await until(lambda: not renewal.problem)

    plane.run(scenario())
    assert {record.levelname for record in caplog.records} == {"WARNING"}


def test_a_host_without_room_for_a_child_keeps_the_certificate(joined, monkeypatch, caplog):
    before = serial(joined)
    monkeypatch.setattr(certificates.sys, "executable", str(joined / "python that is being upgraded"))
    clock = Clock(HALF_A_DAY_S + 1800)
    renewal = Renewal(joined, clock)

    async def run():
        async with asyncio.timeout(2):
            await renewal.run()

    with pytest.raises(TimeoutError):
        asyncio.run(run())
    assert "cannot be started: No such file or directory" in renewal.problem
    assert serial(joined) == before


def test_the_end_comes_with_a_louder_alarm(joined, silent, caplog):
    move_control_plane(joined, silent)
    clock = Clock(0.8 * 86400)

    async def scenario() -> None:
        renewal = Renewal(joined, clock)
        async with running(renewal):
            await until(lambda: caplog.records)
            assert "the certificate ends at" in renewal.problem
            clock.ahead_s = 2 * 86400
            await until(lambda: "the certificate has ended" in renewal.problem)

    plane.run(scenario())
    assert {record.levelname for record in caplog.records} == {"ERROR"}


def test_a_certificate_that_cannot_be_read_is_due_and_told(joined, caplog):
    (joined / "chain.pem").write_text("-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n")

    async def scenario() -> None:
        renewal = Renewal(joined)
        async with running(renewal):
            await until(lambda: "cannot be read, nor renewed: the certificate in" in renewal.problem)
            await asyncio.sleep(1.2)  # more than twice the first pause

    plane.run(scenario())
    assert [record.levelname for record in caplog.records] == ["ERROR"]  # refused for good: no second one at once


def test_a_new_join_ends_the_alarm(control, joined, silent, monkeypatch):
    """Somebody puts another certificate in place while renewals fail."""
    move_control_plane(joined, silent)
    clock = Clock(HALF_A_DAY_S + 3600)

    async def scenario() -> None:
        renewal = Renewal(joined, clock)
        async with running(renewal):
            await until(lambda: renewal.problem)
            await asyncio.to_thread(certify.join, control.token(WEB), joined)
            clock.ahead_s = 0
            await until(lambda: not renewal.problem)

    plane.run(scenario())


@given(st.integers(1, 10_000))
def test_retries_come_later_and_later_within_bounds(failures):
    delay = certificates._retry_delay_s(failures)
    assert 0.25 <= delay <= 150
    assert delay <= 0.5 * 2.0 ** min(failures - 1, 60)
    assert delay >= min(150.0, 0.5 * 2.0 ** min(failures - 1, 20)) / 2


def test_a_child_does_not_outlive_its_parent(joined, deaf, monkeypatch):
    move_control_plane(joined, deaf)
    children = []
    real = asyncio.create_subprocess_exec

    async def start(*arguments, **options):
        children.append(await real(*arguments, **options))
        return children[-1]

    monkeypatch.setattr(asyncio, "create_subprocess_exec", start)

    async def scenario() -> None:
        async with running(Renewal(joined, Clock(HALF_A_DAY_S + 3600))):
            await until(lambda: children)
            await asyncio.sleep(0.1)

    started = time.monotonic()
    plane.run(scenario())
    assert time.monotonic() - started < 30.0
    assert [child.returncode for child in children] == [-signal.SIGKILL]


def test_a_child_that_hangs_is_ended(joined, deaf, monkeypatch):
    move_control_plane(joined, deaf)
    monkeypatch.setattr(certificates, "_CHILD_TIMEOUT_S", 0.5)

    async def scenario() -> None:
        renewal = Renewal(joined, Clock(HALF_A_DAY_S + 3600))
        async with running(renewal):
            await until(lambda: "took more than" in renewal.problem)

    plane.run(scenario())


# -- joining


def token_file(directory: Path, token) -> Path:
    (directory / "token").write_text(token.encode())
    return directory / "token"


def test_a_join_waits_for_the_control_plane(control, silent, tmp_path, caplog):
    token = control.token(WEB)
    path = token_file(tmp_path, replace(token, url=silent))

    async def scenario() -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(join(tmp_path / "id", path))
            await until(lambda: caplog.records)
            token_file(tmp_path, token)

    plane.run(scenario())
    assert Credentials.load(tmp_path / "id").identity == WEB
    assert "cannot join yet: no answer from" in caplog.text


def test_a_join_is_refused_at_once_and_in_words(control, tmp_path):
    path = token_file(tmp_path, replace(control.token(WEB), secret=bytes(32)))
    with pytest.raises(JoinError, match="the token is not known here"):
        plane.run(join(tmp_path / "id", path))


def test_a_join_does_not_wait_for_ever(control, silent, tmp_path):
    path = token_file(tmp_path, replace(control.token(WEB), url=silent))
    with pytest.raises(JoinError, match="no answer from"):
        plane.run(join(tmp_path / "id", path, patience_s=0.1))


# -- what a proxy pays


def test_a_proxy_that_renews_imports_nothing_heavy():
    code = (
        "import sys, control.client.certificates, control.client.membership\n"
        "assert not {'cryptography', 'http.client', 'aiohttp', 'yaml'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=30)
