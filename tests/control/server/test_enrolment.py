"""Tokens and renewals: who gets which certificate, however often and in whatever order they ask."""

import hashlib
import time
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Barrier

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule

from control.api.identity import SpiffeId, make_id
from control.client.csr import request
from control.server.ca import Authority
from control.server.enrolment import Enrolment, EnrolmentError, Member
from control.server.store import Store, StoreError
from tests.support.certificates import DB, WEB, forge
from tests.support.examples import examples

URL = "https://control.test:15012"
MEMBER = Member(WEB, "web-1", ("10.97.0.1",))
NOW = int(time.time())  # that of the certificates, which the CA gives out by the wall clock


class Clock:
    def __init__(self, now: float = NOW) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


class Workload:
    """A workload's side: a key, and requests made with it."""

    def __init__(self) -> None:
        self.key = ec.generate_private_key(ec.SECP256R1())

    def csr(self, identity: SpiffeId | None = WEB) -> bytes:
        return request(self.key, identity)


@pytest.fixture
def authority():
    return _authority()


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def store(tmp_path):
    with Store(tmp_path / "mesh.db") as store:
        yield store


@pytest.fixture
def declared():
    """(namespace, name) -> what resources declare."""
    return {("shop", "web-1"): MEMBER}


@pytest.fixture
def enrolment(store, authority, clock, declared):
    return Enrolment(store, authority, lambda namespace, name: declared.get((namespace, name)), clock)


def leaf_of(chain: bytes) -> x509.Certificate:
    return x509.load_pem_x509_certificate(chain)


def der_of(chain: bytes) -> bytes:
    return leaf_of(chain).public_bytes(serialization.Encoding.DER)


def uris(certificate: x509.Certificate) -> list[str]:
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    return names.get_values_for_type(x509.UniformResourceIdentifier)


def refusal(call, *arguments) -> EnrolmentError:
    with pytest.raises(EnrolmentError) as caught:
        call(*arguments)
    assert 400 <= caught.value.status < 500
    return caught.value


# -- tokens


def test_a_token_becomes_a_certificate_of_its_identity_and_of_the_key_that_asked(enrolment, authority):
    token, workload = enrolment.create_token(URL, MEMBER), Workload()
    issued = enrolment.join(token.id, token.secret, workload.csr())
    leaf = leaf_of(issued.chain_pem)
    leaf.verify_directly_issued_by(authority.intermediate)
    assert uris(leaf) == [str(WEB)]
    assert leaf.public_key() == workload.key.public_key()
    assert issued.member == MEMBER
    assert token.url == URL
    assert token.root_sha256 == hashlib.sha256(authority.root.public_bytes(serialization.Encoding.DER)).digest()


def test_a_workload_that_does_not_know_its_identity_yet_may_leave_it_out(enrolment):
    token = enrolment.create_token(URL, MEMBER)
    issued = enrolment.join(token.id, token.secret, Workload().csr(None))
    assert uris(leaf_of(issued.chain_pem)) == [str(WEB)]


def test_a_token_is_good_for_one_key(enrolment):
    token = enrolment.create_token(URL, MEMBER)
    enrolment.join(token.id, token.secret, Workload().csr())
    assert "used already" in str(refusal(enrolment.join, token.id, token.secret, Workload().csr()))


@pytest.mark.parametrize("after_s", [0, 1, 59])
def test_a_lost_answer_is_given_again_to_the_same_key(enrolment, clock, after_s):
    token, workload = enrolment.create_token(URL, MEMBER), Workload()
    first = enrolment.join(token.id, token.secret, workload.csr())
    clock.now += after_s
    # A CSR is signed anew each time; it is the key that is the same.
    assert enrolment.join(token.id, token.secret, workload.csr()) == first


@pytest.mark.parametrize("after_s", [60, 61, 3600])
def test_after_a_minute_nobody_is_answered_again(enrolment, clock, after_s):
    token, workload = enrolment.create_token(URL, MEMBER), Workload()
    enrolment.join(token.id, token.secret, workload.csr())
    clock.now += after_s
    assert "used already" in str(refusal(enrolment.join, token.id, token.secret, workload.csr()))


def test_a_retry_must_prove_possession_of_the_key(enrolment):
    token, workload = enrolment.create_token(URL, MEMBER), Workload()
    csr = workload.csr()
    enrolment.join(token.id, token.secret, csr)
    body = bytearray(x509.load_pem_x509_csr(csr).public_bytes(serialization.Encoding.DER))
    body[-1] ^= 1
    forged = x509.load_der_x509_csr(bytes(body)).public_bytes(serialization.Encoding.PEM)
    assert "signature" in str(refusal(enrolment.join, token.id, token.secret, forged))


def test_of_many_that_race_with_one_token_one_is_served(enrolment):
    token, workloads = enrolment.create_token(URL, MEMBER), [Workload() for _ in range(8)]
    barrier = Barrier(len(workloads))

    def join(workload):
        csr = workload.csr()
        barrier.wait(60)
        try:
            return enrolment.join(token.id, token.secret, csr)
        except EnrolmentError as error:
            return error

    with ThreadPoolExecutor(len(workloads)) as pool:
        answers = list(pool.map(join, workloads))
    assert sum(not isinstance(answer, EnrolmentError) for answer in answers) == 1


def test_retries_that_race_get_one_certificate(enrolment, store):
    token, workload = enrolment.create_token(URL, MEMBER), Workload()
    barrier = Barrier(6)

    def join(_):
        barrier.wait(60)
        return enrolment.join(token.id, token.secret, workload.csr()).chain_pem

    with ThreadPoolExecutor(6) as pool:
        assert len(set(pool.map(join, range(6)))) == 1
    with store.transaction() as rows:
        assert rows.execute("SELECT count(*) FROM certificates").fetchone() == (1,)


def test_a_csr_of_another_identity_is_refused_and_burns_nothing(enrolment):
    token = enrolment.create_token(URL, MEMBER)
    assert str(DB) in str(refusal(enrolment.join, token.id, token.secret, Workload().csr(DB)))
    assert uris(leaf_of(enrolment.join(token.id, token.secret, Workload().csr()).chain_pem)) == [str(WEB)]


@pytest.mark.parametrize("csr", [b"", b"nonsense", b"x" * 20_000], ids=["empty", "nonsense", "long"])
def test_what_is_no_csr_is_refused_and_burns_nothing(enrolment, csr):
    token = enrolment.create_token(URL, MEMBER)
    assert refusal(enrolment.join, token.id, token.secret, csr).status == 400
    enrolment.join(token.id, token.secret, Workload().csr())


def test_a_token_ends(enrolment, clock):
    tokens = [enrolment.create_token(URL, MEMBER, 90) for _ in range(2)]
    clock.now += 89
    enrolment.join(tokens[0].id, tokens[0].secret, Workload().csr())
    clock.now += 1
    assert "ended" in str(refusal(enrolment.join, tokens[1].id, tokens[1].secret, Workload().csr()))


def test_the_default_life_of_a_token_is_ten_minutes(enrolment, clock):
    token = enrolment.create_token(URL, MEMBER)
    clock.now += 600
    assert "ended 0 s ago" in str(refusal(enrolment.join, token.id, token.secret, Workload().csr()))


def test_a_guess_learns_nothing(enrolment, clock):
    token, other = enrolment.create_token(URL, MEMBER), enrolment.create_token(URL, MEMBER)
    used = enrolment.create_token(URL, MEMBER)
    enrolment.join(used.id, used.secret, Workload().csr())
    flipped = bytes([token.secret[0] ^ 1]) + token.secret[1:]
    guesses = [
        ("unknown", token.secret),
        ("", b""),
        (token.id, b""),
        (token.id, flipped),
        (token.id, token.secret[:-1]),
        (token.id, token.secret + b"\0"),
        (token.id, other.secret),
        (token.id, hashlib.sha256(token.secret).digest()),
        (used.id, flipped),
        (token.id + "\0", token.secret),
        ("unknown", bytes(32)),
    ]
    told = {str(refusal(enrolment.join, *guess, Workload().csr())) for guess in guesses}
    clock.now += 3600
    told |= {str(refusal(enrolment.join, *guess, Workload().csr())) for guess in guesses}
    assert len(told) == 1
    assert "not known here" in told.pop()


def test_the_store_never_holds_a_secret(enrolment, store):
    token = enrolment.create_token(URL, MEMBER)
    enrolment.join(token.id, token.secret, Workload().csr())
    files = [path for path in store.path.parent.iterdir() if path.name.startswith(store.path.name)]
    content = b"".join(path.read_bytes() for path in files)
    assert token.id.encode() in content
    assert token.secret not in content
    assert token.secret.hex().encode() not in content.lower()


def test_the_token_is_burnt_with_the_certificate_or_neither_happens(enrolment, store):
    token, workload = enrolment.create_token(URL, MEMBER), Workload()
    with store.transaction() as rows:
        rows.execute(
            "CREATE TRIGGER fault BEFORE UPDATE OF used_at ON tokens BEGIN SELECT RAISE(ABORT, 'disk full'); END"
        )
    with pytest.raises(StoreError, match="disk full"):
        enrolment.join(token.id, token.secret, workload.csr())
    with store.transaction() as rows:
        assert rows.execute("SELECT count(*) FROM certificates").fetchone() == (0,)
        rows.execute("DROP TRIGGER fault")
        rows.execute("CREATE TRIGGER fault BEFORE INSERT ON certificates BEGIN SELECT RAISE(ABORT, 'disk full'); END")
    with pytest.raises(StoreError, match="disk full"):
        enrolment.join(token.id, token.secret, workload.csr())
    with store.transaction() as rows:
        assert rows.execute("SELECT used_at FROM tokens").fetchall() == [(None,)]
        rows.execute("DROP TRIGGER fault")
    enrolment.join(token.id, token.secret, Workload().csr())


def test_a_token_is_burnt_for_good_also_for_a_control_plane_that_starts_anew(tmp_path, authority, clock):
    def reopened(store):
        return Enrolment(store, authority, lambda *_: None, clock)

    workload = Workload()
    with Store(tmp_path / "mesh.db") as store:
        token = reopened(store).create_token(URL, MEMBER)
        issued = reopened(store).join(token.id, token.secret, workload.csr())
    with Store(tmp_path / "mesh.db") as store:
        assert "used already" in str(refusal(reopened(store).join, token.id, token.secret, Workload().csr()))
        assert reopened(store).join(token.id, token.secret, workload.csr()) == issued


@pytest.mark.parametrize(
    "identity",
    [
        "spiffe://cluster.local/ns/mesh-system/sa/control-plane",
        "spiffe://cluster.local/ns/mesh-system/sa/broker",
        "spiffe://other.example/ns/shop/sa/web",
    ],
)
def test_no_token_is_made_for_an_identity_that_no_workload_has(enrolment, identity):
    refusal(enrolment.create_token, URL, Member(SpiffeId.parse(identity), "x", ()))


@pytest.mark.parametrize("ttl_s", [0, -1, 24 * 3600 + 1])
def test_a_token_lives_between_a_second_and_a_day(enrolment, ttl_s):
    assert f"not {ttl_s} s" in str(refusal(enrolment.create_token, URL, MEMBER, ttl_s))


def test_tokens_that_ended_long_ago_are_forgotten(enrolment, store, clock):
    for _ in range(3):
        enrolment.create_token(URL, MEMBER)
    clock.now += 600 + 24 * 3600
    late = enrolment.create_token(URL, MEMBER, 1)
    with store.transaction() as rows:
        assert rows.execute("SELECT count(*) FROM tokens").fetchone() == (4,)
    clock.now += 1
    enrolment.create_token(URL, MEMBER)
    with store.transaction() as rows:
        assert rows.execute("SELECT count(*) FROM tokens").fetchone() == (2,)
    assert "ended 0 s ago" in str(refusal(enrolment.join, late.id, late.secret, Workload().csr()))


def test_a_workload_that_is_declared_otherwise_since_does_not_join(enrolment, declared):
    token = enrolment.create_token(URL, MEMBER)
    declared["shop", "web-1"] = Member(DB, "web-1", ("10.97.0.1",))
    assert "is declared to be" in str(refusal(enrolment.join, token.id, token.secret, Workload().csr()))
    declared["shop", "web-1"] = Member(WEB, "web-1", ("10.97.0.9",))
    told = str(refusal(enrolment.join, token.id, token.secret, Workload().csr()))
    assert "is declared with 10.97.0.9 now, and the token is for 10.97.0.1" in told
    declared["shop", "web-1"] = MEMBER
    assert enrolment.join(token.id, token.secret, Workload().csr()).member == MEMBER


def test_a_workload_may_join_ahead_of_its_declaration(enrolment, declared):
    declared.clear()
    token = enrolment.create_token(URL, MEMBER)
    assert enrolment.join(token.id, token.secret, Workload().csr()).member == MEMBER


# -- renewal


@pytest.fixture
def chain(enrolment):
    token = enrolment.create_token(URL, MEMBER)
    return enrolment.join(token.id, token.secret, Workload().csr()).chain_pem


def test_a_certificate_is_renewed_for_its_identity_with_a_new_key(enrolment, chain):
    workload = Workload()
    for _ in range(3):
        issued = enrolment.renew(der_of(chain), "web-1", workload.csr())
        assert uris(leaf_of(issued.chain_pem)) == [str(WEB)]
        assert leaf_of(issued.chain_pem).public_key() == workload.key.public_key()
        assert leaf_of(issued.chain_pem).serial_number != leaf_of(chain).serial_number
        assert issued.member == MEMBER
        chain, workload = issued.chain_pem, Workload()


def test_who_shows_a_revoked_certificate_gets_no_other(store, authority, clock, chain):
    revoked = {leaf_of(chain).serial_number}
    enrolment = Enrolment(store, authority, lambda *_: MEMBER, clock, revoked=revoked.__contains__)
    assert "revoked; join with a new token" in str(refusal(enrolment.renew, der_of(chain), "web-1", Workload().csr()))
    token = enrolment.create_token(URL, MEMBER)
    joined = enrolment.join(token.id, token.secret, Workload().csr()).chain_pem
    enrolment.renew(der_of(joined), "web-1", Workload().csr())


def test_renewal_for_another_identity_is_refused(enrolment, chain):
    assert str(DB) in str(refusal(enrolment.renew, der_of(chain), "web-1", Workload().csr(DB)))


def test_a_workload_cannot_renew_itself_into_another_of_its_identity(enrolment, chain, declared):
    declared["shop", "web-2"] = Member(WEB, "web-2", ("10.97.0.2",))
    assert enrolment.renew(der_of(chain), "web-2", Workload().csr()).member == MEMBER


def test_a_renewal_takes_up_addresses_that_were_declared_since(enrolment, chain, declared):
    declared["shop", "web-1"] = moved = Member(WEB, "web-1", ("10.97.0.9", "fd00::9"))
    assert enrolment.renew(der_of(chain), "web-1", Workload().csr()).member == moved


def test_a_workload_that_is_declared_no_more_or_otherwise_is_not_renewed(enrolment, chain, declared):
    declared["shop", "web-1"] = Member(DB, "web-1", ("10.97.0.1",))
    assert "is declared any more" in str(refusal(enrolment.renew, der_of(chain), "web-1", Workload().csr()))
    del declared["shop", "web-1"]
    assert "is declared any more" in str(refusal(enrolment.renew, der_of(chain), "web-1", Workload().csr()))
    declared["shop", "web-1"] = MEMBER
    enrolment.renew(der_of(chain), "web-1", Workload().csr())


def test_after_a_restore_a_declared_workload_renews_and_another_does_not(tmp_path, authority, clock, chain):
    declared = {("shop", "web-1"): MEMBER, ("shop", "db-1"): Member(DB, "db-1", ("10.97.0.2",))}
    with Store(tmp_path / "restored.db") as store:
        enrolment = Enrolment(store, authority, lambda namespace, name: declared.get((namespace, name)), clock)
        for unknown in ("web-2", "db-1", ""):
            refused = refusal(enrolment.renew, der_of(chain), unknown, Workload().csr())
            assert f"no workload {unknown!r} of {WEB} is declared" in str(refused)
        assert enrolment.renew(der_of(chain), "web-1", Workload().csr()).member == MEMBER


@pytest.mark.parametrize("account", ["control-plane", "broker"])
def test_the_control_planes_own_certificates_are_not_renewed_over_https(enrolment, authority, account):
    identity = make_id(authority.trust_domain, "mesh-system", account)
    chain = authority.issue(Workload().csr(identity), identity)
    assert "own" in str(refusal(enrolment.renew, der_of(chain), account, Workload().csr(identity)))


@pytest.mark.parametrize("uris", [(str(WEB), str(DB)), (str(WEB), str(WEB)), ("https://example.com",), ()])
def test_a_certificate_names_one_workload_of_the_mesh_or_renews_nothing(enrolment, uris):
    refusal(enrolment.renew, forge(None, uris).der, "web-1", Workload().csr())


def test_a_certificate_of_the_ca_itself_names_nobody(enrolment, authority):
    der = authority.intermediate.public_bytes(serialization.Encoding.DER)
    assert "names no workload" in str(refusal(enrolment.renew, der, "web-1", Workload().csr()))


def test_renewing_in_a_loop_does_not_fill_the_store(enrolment, store, chain):
    serials = []
    for _ in range(40):
        chain = enrolment.renew(der_of(chain), "web-1", Workload().csr()).chain_pem
        serials.append(f"{leaf_of(chain).serial_number:x}")
    with store.transaction() as rows:
        kept = rows.execute("SELECT serial FROM certificates ORDER BY rowid").fetchall()
    assert [serial for (serial,) in kept] == serials[-32:]


def test_certificates_that_have_ended_are_forgotten(enrolment, store, clock, chain):
    clock.now = leaf_of(chain).not_valid_after_utc.timestamp() + 1
    renewed = enrolment.renew(der_of(chain), "web-1", Workload().csr()).chain_pem
    with store.transaction() as rows:
        assert rows.execute("SELECT serial FROM certificates").fetchall() == [(f"{leaf_of(renewed).serial_number:x}",)]


# -- who is known


def test_known_are_those_with_a_certificate_or_a_token(enrolment, clock):
    assert enrolment.identities() == frozenset()
    token = enrolment.create_token(URL, MEMBER)
    enrolment.create_token(URL, Member(DB, "db-1", ()), 60)
    assert enrolment.identities() == {WEB, DB}
    chain = enrolment.join(token.id, token.secret, Workload().csr()).chain_pem
    clock.now += 60
    assert enrolment.identities() == {WEB}
    clock.now = leaf_of(chain).not_valid_after_utc.timestamp()
    assert enrolment.identities() == frozenset()


# -- any order


@cache
def _authority() -> Authority:
    with TemporaryDirectory() as directory:
        return Authority.create(Path(directory) / "ca", "cluster.local")


class Tokens(RuleBasedStateMachine):
    """Against a model of three lines: a token serves its first key until its end, and that key for a minute more."""

    @initialize()
    def begin(self):
        self.directory = TemporaryDirectory()
        self.clock = Clock()
        self.store = Store(Path(self.directory.name) / "mesh.db")
        self.enrolment = Enrolment(self.store, _authority(), lambda *_: None, self.clock)
        self.workloads = [Workload() for _ in range(2)]
        self.tokens = []  # [token, expires_at, used_at, workload, chain]

    @rule(ttl=st.sampled_from([30, 600]))
    def create(self, ttl):
        self.tokens.append([self.enrolment.create_token(URL, MEMBER, ttl), self.clock.now + ttl, None, None, None])

    @rule(seconds=st.sampled_from([1, 29, 31, 60]))
    def wait(self, seconds):
        self.clock.now += seconds

    @rule(index=st.integers(0, 3), who=st.integers(0, 1))
    def join(self, index, who):
        if index >= len(self.tokens):
            return
        token, expires_at, used_at, owner, chain = self.tokens[index]
        good = self.clock.now < expires_at if used_at is None else owner == who and self.clock.now < used_at + 60
        try:
            issued = self.enrolment.join(token.id, token.secret, self.workloads[who].csr())
        except EnrolmentError:
            assert not good
            return
        assert good
        if used_at is None:
            self.tokens[index][2:] = [self.clock.now, who, issued.chain_pem]
        else:
            assert issued.chain_pem == chain

    def teardown(self):
        if hasattr(self, "store"):
            self.store.close()
            self.directory.cleanup()


TestTokens = Tokens.TestCase
TestTokens.settings = settings(max_examples=examples(20), stateful_step_count=20)
