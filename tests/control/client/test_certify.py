"""Certificates from a real HTTPS server: who is trusted, what is refused, and what a crash leaves behind."""

import json
import os
import signal
import socket
import subprocess
import sys
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec

from control import durable
from control.api.identity import make_id
from control.api.token import JoinToken
from control.client import certify
from control.client.certify import CertifyError, RefusedError
from control.client.membership import Membership
from control.server.ca import Authority
from control.server.enrolment import Member
from tests.support.certificate_server import BROKERS, certificate_server, control_plane, scripted_server
from tests.support.certificates import DB, WEB, Forged, forge, identity_dir
from uproxy.tls import Credentials

FILES = ["bundle.pem", "chain.pem", "key.pem", "mesh.json"]


@pytest.fixture(scope="module")
def authority(tmp_path_factory):
    return Authority.create(tmp_path_factory.mktemp("ca") / "ca", "cluster.local")


@pytest.fixture(scope="module")
def issuer(authority) -> Forged:
    """The mesh's intermediate, in the hands of somebody who signs anything."""
    return Forged(authority.intermediate, authority._key, Forged(authority.root, authority._key, None))


@pytest.fixture(scope="module")
def control(authority, tmp_path_factory):
    with certificate_server(authority, tmp_path_factory.mktemp("control")) as running:
        yield running


@pytest.fixture(scope="module")
def own(authority, tmp_path_factory) -> Path:
    """The control plane's identity, for scripted servers."""
    return identity_dir(authority, tmp_path_factory.mktemp("own") / "id", control_plane(authority))


@pytest.fixture
def joined(control, tmp_path) -> Path:
    certify.join(control.token(WEB, "web-1", "10.9.0.1"), tmp_path / "id")
    return tmp_path / "id"


def names(directory: Path) -> list[str]:
    return sorted(entry.name for entry in directory.iterdir())


def contents(directory: Path) -> dict[str, bytes]:
    return {entry.name: entry.read_bytes() for entry in directory.iterdir() if entry.name in FILES}


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-I", "-m", "control.client.certify", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, env={})


def test_a_node_agent_gets_a_token_for_a_process_of_its_node_and_for_no_other(control, tmp_path):
    """Here and not beside `join`: what comes of it is an identity that is another's."""
    agent, process = tmp_path / "agent", tmp_path / "wp"
    certify.join(control.token(make_id("cluster.local", "mesh-system", "node-a"), "node-a"), agent)
    control.placed["a", "shop", "wp-1"] = member = Member(WEB, "wp-1", ("10.9.0.9",))
    control.placed["b", "shop", "wp-2"] = Member(WEB, "wp-2", ("10.9.0.8",))
    done = run("token", "--dir", agent, "--for", "shop/wp-1", "--out", tmp_path / "token")
    assert done.returncode == certify.DONE, done.stderr
    assert (tmp_path / "token").stat().st_mode & 0o777 == 0o600
    membership = certify.join(JoinToken.decode((tmp_path / "token").read_text()), process)
    assert (membership.identity, membership.workload, membership.addresses) == (WEB, "wp-1", member.addresses)
    for refused in ("shop/wp-2", "shop/nobody"):
        with pytest.raises(RefusedError, match=rf"no waypoint's process {refused} is declared for .*node-a"):
            certify.token(agent, *refused.split("/"))
    with pytest.raises(RefusedError, match=r"is declared for .*sa/web to start"):
        certify.token(process, "shop", "wp-1")
    liar = tmp_path / "liar"
    certify.join(control.token(make_id("cluster.local", "shop", "node-a"), "liar"), liar)
    with pytest.raises(RefusedError, match=r"is declared for .*ns/shop/sa/node-a to start"):
        certify.token(liar, "shop", "wp-1")


def test_a_node_agent_that_asks_in_a_loop_is_told_to_wait(control, tmp_path):
    agent = tmp_path / "agent"
    certify.join(control.token(make_id("cluster.local", "mesh-system", "node-c"), "node-c"), agent)
    control.placed["c", "shop", "wp-3"] = Member(WEB, "wp-3", ("10.9.0.7",))
    for _ in range(8):
        last = certify.token(agent, "shop", "wp-3")
    with pytest.raises(CertifyError, match="8 tokens for shop/wp-3 are unused") as caught:
        certify.token(agent, "shop", "wp-3")
    assert not isinstance(caught.value, RefusedError), "it is worth another try"
    certify.join(last, tmp_path / "wp")
    certify.token(agent, "shop", "wp-3")


# -- joining


def test_a_token_becomes_an_identity(control, tmp_path):
    membership = certify.join(control.token(WEB, "web-1", "10.9.0.1", "fd00::1"), tmp_path / "new" / "id")
    directory = tmp_path / "new" / "id"
    assert names(directory) == FILES
    assert directory.stat().st_mode & 0o777 == 0o700
    assert (directory / "key.pem").stat().st_mode & 0o777 == 0o600
    assert Credentials.load(directory).identity == WEB
    assert membership == Membership(WEB, "web-1", ("10.9.0.1", "fd00::1"), control.url, BROKERS)
    assert Membership.load(directory) == membership


def test_a_token_is_good_once(control, tmp_path):
    token = control.token(WEB)
    certify.join(token, tmp_path / "first")
    with pytest.raises(RefusedError, match=r"refuses \(403\): the token was used already"):
        certify.join(token, tmp_path / "second")
    assert names(tmp_path / "second") == ["key.next.pem"]


def test_a_join_whose_answer_was_lost_gets_the_same_certificate(control, tmp_path, monkeypatch):
    token = control.token(WEB)
    answered = []

    def lose(content: bytes) -> None:
        answered.append(json.loads(content)["chain"])
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(certify._Answer, "parse", lose)
        with pytest.raises(KeyboardInterrupt):
            certify.join(token, tmp_path)
    certify.join(token, tmp_path)
    assert (tmp_path / "chain.pem").read_text() == answered[0]
    assert Credentials.load(tmp_path).identity == WEB
    assert names(tmp_path) == FILES


def test_nothing_is_told_to_a_server_without_the_pinned_root(control, tmp_path):
    stranger = Authority.create(tmp_path / "ca", "cluster.local")
    with scripted_server(
        identity_dir(stranger, tmp_path / "own", control_plane(stranger)), lambda *_: (200, stranger.bundle_pem)
    ) as server:
        with pytest.raises(RefusedError, match="another root than the token names"):
            certify.join(replace(control.token(WEB), url=server.url), tmp_path / "id")
        assert server.heard == ["/v1/bundle"]


def test_the_pinned_root_is_not_enough_to_be_the_control_plane(authority, control, tmp_path):
    """A workload of the mesh that answers in the control plane's place."""
    with scripted_server(
        identity_dir(authority, tmp_path / "own", DB), lambda *_: (200, authority.bundle_pem)
    ) as server:
        with pytest.raises(RefusedError, match="ns/shop/sa/db, not the control plane"):
            certify.join(replace(control.token(WEB), url=server.url), tmp_path / "id")
        assert server.heard == ["/v1/bundle"]


def test_an_impostor_that_copies_the_root_is_told_nothing(authority, control, tmp_path):
    stranger = Authority.create(tmp_path / "ca", "cluster.local")
    with scripted_server(
        identity_dir(stranger, tmp_path / "own", control_plane(stranger)), lambda *_: (200, authority.bundle_pem)
    ) as server:
        with pytest.raises(CertifyError, match=r"certificate of https://127\.0\.0\.1:[0-9]+ is not accepted"):
            certify.join(replace(control.token(WEB), url=server.url), tmp_path / "id")
        assert server.heard == ["/v1/bundle"]


def test_a_root_that_names_no_mesh_is_refused(issuer, tmp_path):
    root = forge(None, (), ca=True)
    server_identity = forge(root, (str(WEB),)).write(tmp_path / "own", root.chain_pem)
    with scripted_server(server_identity, lambda *_: (200, root.chain_pem)) as server:
        token = JoinToken(server.url, root.certificate.fingerprint(hashes.SHA256()), "id", bytes(32))
        with pytest.raises(RefusedError, match="root that the token names is not a mesh's"):
            certify.join(token, tmp_path / "id")


# -- renewing


def test_a_renewal_replaces_key_and_certificate(joined):
    before, key = Credentials.load(joined), (joined / "key.pem").read_bytes()
    certify.renew(joined)
    after = Credentials.load(joined)
    assert after.identity == WEB
    assert after.serial != before.serial
    assert (joined / "key.pem").read_bytes() != key
    assert names(joined) == FILES
    certify.renew(joined)  # with the new key, which the control plane knows


class Crash(BaseException):
    """The process dies here."""


@pytest.mark.parametrize("at", range(9))
def test_a_crash_at_any_write_leaves_a_whole_identity(joined, monkeypatch, at):
    """Before each write and rename of a renewal, one after the other; then the next renewal goes through."""
    steps = 0

    def dying(real):
        def step(*arguments, **options):
            nonlocal steps
            steps += 1
            if steps > at:
                raise Crash
            return real(*arguments, **options)

        return step

    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", dying(os.replace))
        patched.setattr(durable, "write_new", dying(durable.write_new))
        with pytest.raises(Crash):
            certify.renew(joined)
    assert Credentials.load(joined).identity == WEB
    certify.renew(joined)
    assert Credentials.load(joined).identity == WEB
    assert [name for name in names(joined) if not name.startswith(".")] == FILES


def test_a_crash_before_the_rename_is_finished_by_the_next_renewal(joined, monkeypatch):
    def die(_: Path) -> None:
        raise Crash

    with monkeypatch.context() as patched:
        patched.setattr(certify, "_promote_next_key", die)
        with pytest.raises(Crash):
            certify.renew(joined)
    interrupted = (joined / "key.next.pem").read_bytes()
    with socket.socket() as silent:  # bound, not listening: the renewal gets as far as its connection
        silent.bind(("127.0.0.1", 0))
        document = json.loads((joined / "mesh.json").read_bytes())
        document["control"] = f"https://127.0.0.1:{silent.getsockname()[1]}"
        (joined / "mesh.json").write_text(json.dumps(document))
        with pytest.raises(CertifyError, match="no answer"):
            certify.renew(joined)
    assert (joined / "key.pem").read_bytes() == interrupted
    assert (joined / "key.next.pem").read_bytes() != interrupted
    assert Credentials.load(joined).identity == WEB


def test_an_expired_certificate_renews_nothing(issuer, authority, joined):
    expired = forge(issuer, not_before=timedelta(hours=-2), not_after=timedelta(seconds=-1))
    (joined / "chain.pem").write_bytes(expired.chain_pem)
    (joined / "key.pem").write_bytes(expired.key_pem)
    with pytest.raises(RefusedError, match="renews nothing any more: join again"):
        certify.renew(joined)


def test_a_workload_that_has_not_joined_is_told_so(tmp_path):
    with pytest.raises(RefusedError, match="has not joined a mesh"):
        certify.renew(tmp_path)


def test_two_at_once_are_refused_in_one_directory(joined):
    with certify._alone_in(joined), pytest.raises(CertifyError, match="another process certifies"):
        certify.renew(joined)


# -- answers that must not replace what works


def certificate(issuer: Forged, request: bytes, **options) -> bytes:
    """A chain over the key of a request, from somebody who signs anything."""
    key = x509.load_pem_x509_csr(json.loads(request)["csr"].encode()).public_key()

    class Holder:
        """Stands in for a private key whose public half alone is known."""

        def public_key(self):
            return key

    return forge(issuer, key=Holder(), **options).chain_pem


def answer(authority: Authority, joined: Path, certified: bytes, **changes: object) -> bytes:
    document = {
        "chain": certified.decode(),
        "bundle": authority.bundle_pem.decode(),
        "membership": json.loads((joined / "mesh.json").read_bytes()),
    }
    return json.dumps(document | changes).encode()


def renew_from(joined: Path, url: str) -> None:
    document = json.loads((joined / "mesh.json").read_bytes())
    (joined / "mesh.json").write_text(json.dumps(document | {"control": url}))
    certify.renew(joined)


FOREIGN = forge(None, (str(WEB),), key=ec.generate_private_key(ec.SECP256R1()))


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda a, i, j, r: answer(a, j, certificate(i, r, uris=(str(DB),))), "a certificate of .*/db, not of"),
        (lambda a, i, j, r: answer(a, j, certificate(i, r, uris=("spiffe://x/ns/a/sa/b",))), "another trust domain"),
        (lambda a, i, j, r: answer(a, j, forge(i).chain_pem), "of another key than this workload's"),
        (lambda a, i, j, r: answer(a, j, certificate(i, r, ca=True)), "cannot be used"),
        (lambda a, i, j, r: answer(a, j, certificate(i, r, not_after=timedelta(seconds=-1))), "cannot be used"),
        (lambda a, i, j, r: answer(a, j, FOREIGN.chain_pem), "cannot be used"),
        (lambda a, i, j, r: answer(a, j, certificate(i, r), bundle=""), "cannot be used"),
        (lambda a, i, j, r: answer(a, j, b""), "cannot be used"),
        (lambda a, i, j, r: answer(a, j, certificate(i, r) * 3), "chain has 6 certificates"),
        (lambda a, i, j, r: answer(a, j, certificate(i, r), membership=None), "cannot be read"),
        (lambda a, i, j, r: answer(a, j, certificate(i, r), chain=7), "cannot be read"),
        (lambda a, i, j, r: b"[]", "cannot be read"),
        (lambda a, i, j, r: b"[" * 100_000, "cannot be read"),
        (lambda a, i, j, r: b"\xff", "cannot be read"),
        (lambda a, i, j, r: b" " * 300_000, "more than 262144 bytes"),
    ],
)
def test_an_answer_that_is_not_ours_changes_nothing(authority, issuer, own, joined, make, told):
    with scripted_server(own, lambda _, body: (200, make(authority, issuer, joined, body))) as server:
        before = contents(joined)
        with pytest.raises(CertifyError, match=told):
            renew_from(joined, server.url)
    assert contents(joined) | {"mesh.json": b""} == before | {"mesh.json": b""}
    assert Credentials.load(joined).identity == WEB


def test_the_same_answer_without_a_fault_is_taken(authority, issuer, own, joined):
    """So that the refusals above are for the fault alone."""
    with scripted_server(own, lambda _, body: (200, answer(authority, joined, certificate(issuer, body)))) as server:
        before = Credentials.load(joined).serial
        renew_from(joined, server.url)
    assert Credentials.load(joined).serial != before


def test_a_certificate_of_another_workload_is_refused(authority, issuer, own, joined):
    other = json.loads((joined / "mesh.json").read_bytes()) | {"workload": "web-2"}
    with (
        scripted_server(
            own, lambda _, body: (200, answer(authority, joined, certificate(issuer, body), membership=other))
        ) as server,
        pytest.raises(CertifyError, match="answered for shop/web-2, not for shop/web-1"),
    ):
        renew_from(joined, server.url)


def test_a_membership_of_another_identity_is_refused(authority, issuer, own, joined):
    other = json.loads((joined / "mesh.json").read_bytes()) | {"service_account": "db"}
    with (
        scripted_server(
            own, lambda _, body: (200, answer(authority, joined, certificate(issuer, body), membership=other))
        ) as server,
        pytest.raises(CertifyError, match="gave a certificate of"),
    ):
        renew_from(joined, server.url)


def test_a_certificate_of_another_mesh_is_refused(authority, own, control, joined, tmp_path):
    """Its own roots accept it, and it is of our key; but the token was for this mesh."""
    other = Authority.create(tmp_path / "other", "other.example")
    stranger = make_id(other.trust_domain, "shop", "web")
    membership = json.loads((joined / "mesh.json").read_bytes()) | {"trust_domain": "other.example"}

    def speak(path: str, body: bytes) -> tuple[int, bytes]:
        if path == "/v1/bundle":
            return 200, authority.bundle_pem
        chain = other.issue(json.loads(body)["csr"].encode(), stranger)
        return 200, answer(other, joined, chain, membership=membership)

    with scripted_server(own, speak) as server, pytest.raises(RefusedError, match="of another mesh than its own"):
        certify.join(replace(control.token(WEB), url=server.url), tmp_path / "id")


@pytest.mark.parametrize("status", [408, 429, 500, 503])
def test_some_refusals_pass(own, joined, status):
    with (
        scripted_server(own, lambda *_: (status, b'{"error": "too\\nmany"}')) as server,
        pytest.raises(CertifyError, match=rf"refuses \({status}\): too many") as raised,
    ):
        renew_from(joined, server.url)
    assert not isinstance(raised.value, RefusedError)


@pytest.mark.parametrize("content", [b"", b"\xff", b"[]", b'{"error": 1}', b"[" * 100_000])
def test_a_refusal_needs_no_reason(own, joined, content):
    with (
        scripted_server(own, lambda *_: (403, content)) as server,
        pytest.raises(RefusedError, match="it does not say why"),
    ):
        renew_from(joined, server.url)


# -- the command


def test_the_command_joins_and_renews(control, tmp_path):
    (tmp_path / "token").write_text(control.token(WEB).encode() + "\n")
    done = run("join", "--token-file", tmp_path / "token", "--dir", tmp_path / "id")
    assert (done.returncode, done.stdout, done.stderr) == (certify.DONE, "", "")
    serial = Credentials.load(tmp_path / "id").serial
    assert run("renew", "--dir", tmp_path / "id").returncode == certify.DONE
    assert Credentials.load(tmp_path / "id").serial != serial


def test_the_command_tells_a_refusal_from_an_absence(authority, control, tmp_path):
    token = control.token(WEB)
    (tmp_path / "token").write_text(replace(token, secret=bytes(32)).encode())
    refused = run("join", "--token-file", tmp_path / "token", "--dir", tmp_path / "id")
    assert refused.returncode == certify.REFUSED
    assert "the token is not known" in refused.stderr
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        (tmp_path / "token").write_text(replace(token, url=f"https://127.0.0.1:{silent.getsockname()[1]}").encode())
        absent = run("join", "--token-file", tmp_path / "token", "--dir", tmp_path / "id")
    assert absent.returncode == certify.TRY_LATER
    assert "no answer from https://127.0.0.1" in absent.stderr
    for said in (refused.stderr, absent.stderr):
        assert said.startswith("error: ")
        assert "Traceback" not in said


@pytest.mark.parametrize("content", [b"", b"ujt1.", b"ujt2.AAAA", b"\xff" * 10, b"x" * 10_000])
def test_a_file_that_is_no_token_is_refused(tmp_path, content, capsys):
    (tmp_path / "token").write_bytes(content)
    assert certify.main(["join", "--token-file", str(tmp_path / "token"), "--dir", str(tmp_path)]) == certify.REFUSED
    assert "token" in capsys.readouterr().err


def test_the_command_ends_whatever_the_server_does(control, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as deaf:
        token = replace(control.token(WEB), url=f"https://127.0.0.1:{deaf.getsockname()[1]}")
        (tmp_path / "token").write_text(token.encode())
        code = (
            "import sys, control.client.certify as c; c.DEADLINE_S = 1\n"
            f"sys.exit(c.main(['join', '--token-file', {str(tmp_path / 'token')!r}, '--dir', {str(tmp_path)!r}]))"
        )
        done = subprocess.run([sys.executable, "-c", code], timeout=30, check=False)
    assert done.returncode == -signal.SIGALRM


def test_a_directory_that_cannot_be_written_is_refused(control, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RefusedError, match="cannot use"):
        certify.join(control.token(make_id(WEB.trust_domain, "shop", "a")), tmp_path / "file" / "id")
