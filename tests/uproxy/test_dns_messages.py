"""Which names are the mesh's, and the bytes of answers, as dnspython and any resolver read them."""

from __future__ import annotations

import dns.flags
import dns.message
import dns.name
import dns.opcode
import dns.rcode
import dns.rdatatype
import pytest
from hypothesis import given
from hypothesis import strategies as st

from control.api.address import parse_address
from uproxy import dns_messages
from uproxy.dns_messages import Kind, MeshName, UnansweredError

V4, OTHER_V4, V6 = map(parse_address, ("240.240.0.1", "240.240.0.2", "fd75::1"))
FULL, SHORT = dns_messages.SERVICE_ZONES


def asked(name: str, record_type: str = "A", **more: object) -> bytes:
    return dns.message.make_query(name, record_type, **more).to_wire()


def meant(name: str, **more: object) -> MeshName | None:
    return dns_messages.mesh_name(dns_messages.read_question(asked(name, **more)))


def answered(query: bytes, *addresses: str) -> dns.message.Message:
    return dns.message.from_wire(dns_messages.answer(query, FULL, addresses))


@pytest.mark.parametrize("name", ["web.shop.svc.cluster.local", "web.shop.svc", "WEB.Shop.SVC.Cluster.LOCAL."])
def test_names_of_services(name):
    found = meant(name)
    assert found is not None
    assert (found.kind, found.namespace, found.service, found.is_short) == (Kind.SERVICE, "shop", "shop/web", False)


@pytest.mark.parametrize("name", ["web.shop", "example.com"])
def test_two_labels_may_be_a_service(name):
    found = meant(name)
    assert found is not None
    assert (found.kind, found.is_short) == (Kind.SERVICE, True)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("svc.cluster.local", Kind.ZONE),
        ("svc", Kind.ZONE),
        ("shop.svc.cluster.local", Kind.NAMESPACE),
        ("shop.svc", Kind.NAMESPACE),
        ("pod.web.shop.svc.cluster.local", Kind.NOTHING),
        ("_http._tcp.web.shop.svc.cluster.local", Kind.NOTHING),
        ("1web.shop.svc.cluster.local", Kind.NOTHING),
        ("sh_op.svc", Kind.NOTHING),
    ],
)
def test_what_else_lies_in_the_zones(name, kind):
    found = meant(name)
    assert found is not None
    assert found.kind is kind


@pytest.mark.parametrize(
    "name", [".", "localhost", "www.example.com", "a_b.shop", "web.shop.svc.example.com", "1a.shop"]
)
def test_names_of_others(name):
    assert meant(name) is None


def test_another_class_than_the_internets_is_nothing_of_the_meshs():
    assert meant("web.shop.svc.cluster.local", rdclass="CH") is None


def test_labels_that_are_not_text_are_no_service():
    wire = asked("xxx.shop.svc").replace(b"xxx", b"\xff\x00\xe9")
    found = dns_messages.mesh_name(dns_messages.read_question(wire))
    assert found is not None
    assert found.kind is Kind.NOTHING


class TestAnswers:
    def test_have_the_addresses_of_the_family_that_is_asked_for(self):
        for record_type, texts in (("A", [V4, OTHER_V4]), ("AAAA", [V6])):
            found = answered(asked("web.shop", record_type), V4, V6, OTHER_V4)
            assert found.rcode() == dns.rcode.NOERROR
            assert sorted(record.address for record in found.answer[0]) == texts
            assert found.answer[0].ttl == 30
            assert not found.authority

    def test_are_authoritative_and_repeat_the_question_as_it_was_written(self):
        query = asked("WeB.sHoP")
        found = answered(query, V4)
        assert dns.message.from_wire(query).is_response(found)
        assert found.flags & (dns.flags.AA | dns.flags.RA | dns.flags.RD) == found.flags & ~dns.flags.QR
        assert b"\x03WeB\x04sHoP" in dns_messages.answer(query, FULL, [V4])
        assert found.answer[0].name == dns.name.from_text("web.shop")

    @pytest.mark.parametrize("record_type", ["AAAA", "MX", "HTTPS", "ANY", "SRV", "SOA"])
    def test_without_data_say_so_and_for_how_long(self, record_type):
        found = answered(asked("web.shop", record_type), V4)
        assert found.rcode() == dns.rcode.NOERROR
        assert not found.answer
        (authority,) = found.authority
        assert (authority.name, authority.ttl, authority[0].minimum) == (FULL, 5, 5)

    def test_without_any_address_are_no_data(self):
        found = answered(asked("web.shop"))
        assert (found.rcode(), found.answer) == (dns.rcode.NOERROR, [])

    def test_for_names_that_do_not_exist(self):
        found = dns.message.from_wire(dns_messages.answer(asked("nobody.shop.svc"), SHORT, None))
        assert found.rcode() == dns.rcode.NXDOMAIN
        assert found.authority[0].name == SHORT

    def test_have_edns_when_the_query_has(self):
        assert answered(asked("web.shop"), V4).edns == -1
        assert answered(asked("web.shop", use_edns=0, payload=4096), V4).edns == 0

    def test_never_need_more_than_every_resolver_takes(self):
        name = ".".join(["x" * 63] * 3 + ["y" * 42, "svc", "cluster"[:7], "local"])[-253:]
        many = [parse_address(f"fd75::{number:x}") for number in range(1, 100)]
        wire = dns_messages.answer(asked(name, "AAAA", use_edns=0, payload=512), FULL, many)
        assert len(wire) <= 512
        assert len(dns.message.from_wire(wire).answer[0]) == dns_messages.MAX_ADDRESSES


class TestFailures:
    def test_repeat_the_question(self):
        query = asked("web.shop")
        found = dns.message.from_wire(dns_messages.failure(query, dns.rcode.SERVFAIL))
        assert found.rcode() == dns.rcode.SERVFAIL
        assert dns.message.from_wire(query).is_response(found)

    def test_of_what_cannot_be_read_have_the_header_alone(self):
        cut = asked("web.shop")[:-3]
        found = dns_messages.failure(cut, dns.rcode.FORMERR)
        assert found == cut[:2] + b"\x81\x81" + bytes(8)

    def test_are_not_given_to_what_is_no_query(self):
        assert dns_messages.failure(b"short", dns.rcode.FORMERR) is None
        assert dns_messages.failure(dns_messages.answer(asked("web.shop"), FULL, [V4]), dns.rcode.FORMERR) is None

    @pytest.mark.parametrize("kind", [dns.opcode.NOTIFY, dns.opcode.UPDATE, dns.opcode.STATUS, 15])
    def test_what_is_not_for_resolvers_is_told_so(self, kind):
        query = asked("web.shop")
        query = query[:2] + bytes((query[2] | kind << 3,)) + query[3:]
        with pytest.raises(UnansweredError) as refused:
            dns_messages.read_question(query)
        found = dns_messages.failure(query, refused.value.rcode)
        assert found[:2] == query[:2]
        assert found[2] == query[2] | 0x80
        assert found[3] & 15 == refused.value.rcode

    def test_a_version_of_edns_that_nobody_knows_is_told_so(self):
        query = asked("web.shop", use_edns=1)
        with pytest.raises(UnansweredError) as refused:
            dns_messages.answer(query, FULL, [V4])
        found = dns.message.from_wire(dns_messages.failure(query, refused.value.rcode))
        assert (found.rcode(), found.edns) == (dns.rcode.BADVERS, 0)

    def test_two_questions_are_malformed(self):
        query = dns.message.make_query("web.shop", "A")
        query.question.append(dns.message.make_query("example.com", "A").question[0])
        with pytest.raises(UnansweredError):
            dns_messages.read_question(query.to_wire())


class TestNameserversAnswers:
    query = asked("example.com")

    def answers(self, wire: bytes) -> bool:
        return dns_messages.answers(wire, dns_messages.read_question(self.query))

    def test_are_known_by_their_question_in_any_case(self):
        assert self.answers(dns.message.make_response(dns.message.from_wire(asked("EXAMPLE.com"))).to_wire())

    @pytest.mark.parametrize(
        "other",
        [asked("example.org"), asked("example.com", "AAAA"), asked("a.example.com")],
        ids=["name", "type", "below"],
    )
    def test_to_another_question_are_none(self, other):
        assert not self.answers(dns.message.make_response(dns.message.from_wire(other)).to_wire())

    def test_queries_are_none(self):
        assert not self.answers(self.query)

    def test_errors_may_come_without_a_question(self):
        assert self.answers(b"\0\0\x81\x82" + bytes(8))
        assert not self.answers(b"\0\0\x81\x80" + bytes(8))  # no error
        assert not self.answers(b"\0\0\x81\x82\0\0\0\x01" + bytes(4))  # says something, about what?


@given(
    st.binary(max_size=80) | st.builds(lambda cut, end: asked("web.shop")[:cut] + end, st.integers(0, 30), st.binary())
)
def test_any_bytes_are_a_question_or_malformed(wire):
    """And whatever they are, there is a well-formed answer or none."""
    question = dns_messages.read_question(asked("web.shop"))
    try:
        dns_messages.mesh_name(dns_messages.read_question(wire))
        dns_messages.answer(wire, FULL, [V4])
    except UnansweredError:
        pass
    dns_messages.answers(wire, question)
    failed = dns_messages.failure(wire, dns.rcode.SERVFAIL)
    if failed is not None:
        assert len(failed) <= max(len(wire), 12) + 11  # nothing is made larger, but for an OPT record
        assert dns.message.from_wire(failed).rcode() == dns.rcode.SERVFAIL
