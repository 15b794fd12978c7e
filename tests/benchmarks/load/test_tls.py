"""Mutual TLS of the load generator's own, which stands for an application that speaks it by itself."""

from __future__ import annotations

import contextlib
import socket
import ssl
from pathlib import Path

import pytest

from benchmarks import load
from benchmarks.load import Load, LoadError, Tls
from control.api.identity import SpiffeId
from control.client.csr import make_request
from control.server.ca import Authority, write_identity
from tests.benchmarks.load.conftest import LOOPBACK, Served, spawn

WEB, DB, OTHER = (f"spiffe://cluster.local/ns/shop/sa/{name}" for name in ("web", "db", "other"))
S = 0.3


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An identity directory for each of the three, by the last part of its name; "stranger" has another CA."""
    made = tmp_path_factory.mktemp("identities")
    for ca, names in (("ca", ("web", "db", "other")), ("another-ca", ("stranger",))):
        authority = Authority.create(made / ca, "cluster.local")
        for name in names:
            identity = SpiffeId.parse(DB.replace("/db", f"/{name if ca == 'ca' else 'web'}"))
            request = make_request(made / name, identity).read_bytes()
            write_identity(made / name, authority.issue(request, identity), authority.bundle_pem)
    return made


@pytest.mark.parametrize(
    "asked",
    [
        pytest.param(load.closed(4, 64), id="small"),
        pytest.param(load.closed(2, 16384), id="a-whole-record"),
        pytest.param(load.opened(4, 64, 500), id="open"),
        pytest.param(load.connects(4), id="connects"),
        pytest.param(load.bulk(2), id="bulk"),
        pytest.param(load.beside_bulk(4, 64, 200, 1, 0.2), id="beside-bulk"),
        pytest.param(load.idle(20), id="idle"),
        pytest.param(load.slow_readers(2, 4, 64, 200), id="slow-readers"),
    ],
)
def test_every_load_goes_over_tls(asked: Load, program: Path, served: Served, directory: Path) -> None:
    port = served(tls=Tls(directory / "db", WEB))
    found = load.run(spawn, program, asked.over(Tls(directory / "web", DB)), LOOPBACK, port, S)
    assert found.operations > 0
    assert (found.failed, found.broken) == (0, 0)


def test_what_is_sent_is_tls_1_3_and_both_show_who_they_are(served: Served, directory: Path) -> None:
    port = served(tls=Tls(directory / "db", WEB))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.load_verify_locations(directory / "web" / "bundle.pem")
    context.load_cert_chain(directory / "web" / "chain.pem", directory / "web" / "key.pem")
    with socket.create_connection((LOOPBACK, port), 5) as plain, context.wrap_socket(plain) as made:
        assert made.version() == "TLSv1.3"
        certificate = made.getpeercert()
        assert certificate is not None
        assert certificate["subjectAltName"] == (("URI", DB),)
        made.sendall(b"echo")
        assert made.recv(4) == b"echo"
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    with socket.create_connection((LOOPBACK, port), 5) as plain, pytest.raises(ssl.SSLError):
        context.wrap_socket(plain)


@pytest.mark.parametrize(
    ("caller", "called"),
    [
        pytest.param(("other", DB), ("db", WEB), id="another-caller"),
        pytest.param(("web", OTHER), ("db", WEB), id="another-server"),
        pytest.param(("stranger", DB), ("db", WEB), id="another-ca"),
    ],
)
def test_nobody_else_gets_through(
    caller: tuple[str, str], called: tuple[str, str], program: Path, served: Served, directory: Path
) -> None:
    port = served(tls=Tls(directory / called[0], called[1]))
    with pytest.raises(LoadError):
        load.run(spawn, program, load.closed(1, 64).over(Tls(directory / caller[0], caller[1])), LOOPBACK, port, S)


def test_what_is_not_tls_gets_no_echo(served: Served, directory: Path) -> None:
    port = served(tls=Tls(directory / "db", WEB))
    with socket.create_connection((LOOPBACK, port), 5) as made:
        made.sendall(b"echo" * 16)
        told = b""
        with contextlib.suppress(ConnectionResetError):
            told = made.recv(64)
        assert b"echo" not in told


def test_what_tls_is_not_for_is_refused(program: Path, served: Served, directory: Path) -> None:
    tls = Tls(directory / "web", DB)
    for asked in (load.closed(1, 16385), load.http_closed(1, "/bytes/1", "x")):
        with pytest.raises(LoadError, match="in TLS there are echoes"):
            load.run(spawn, program, asked.over(tls), LOOPBACK, served(), S)
