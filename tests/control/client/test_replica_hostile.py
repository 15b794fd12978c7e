"""A replica against a broker that means harm, and against unlucky names."""

from __future__ import annotations

from control.api import messages
from control.api.address import IpAddress
from control.api.identity import make_id
from control.api.index import ResidentService
from control.api.messages import Envelope
from control.api.status import ADDRESSES
from control.api.topics import AddressesRootTopic, EndpointTopic, ManifestTopic, RootTopic, format_topic
from control.api.workload import Service, ServicePort
from control.client import endpoint_set
from tests.support import plane
from tests.support.plane import NOW, Broker, ControlPlane, Truth
from tests.support.records import TRUST_DOMAIN

VIP = IpAddress("240.240.0.1")
WEB = make_id(TRUST_DOMAIN, "shop", "web")


class Mesh:
    """A control plane, its broker and one proxy."""

    def __init__(self, proxy):
        self.plane = ControlPlane(int(NOW))
        self.proxy = proxy
        self.broker = Broker(proxy)
        self.truth = Truth()
        self.broker.publish(self.plane.start())

    def put(self, *found):
        self.truth.put(*found)
        self.broker.publish(self.plane.publish(self.truth))

    def want(self, key):
        self.proxy.connect(self.broker.retained)
        self.proxy.replica.want_service(key)
        self.proxy.subscribe(self.broker.retained)
        self.proxy.deliver_all(NOW)

    def stamp(self, topic):
        return messages.decode(self.broker.retained[format_topic(TRUST_DOMAIN, topic)]).stamp


def service(namespace):
    identity = make_id(TRUST_DOMAIN, namespace, "web")
    return Service(namespace, "reviews", (VIP,), (ServicePort("http", 80, 8080, ""),), {}, (identity,))


def test_a_namespace_may_be_called_addr():
    mesh = Mesh(plane.node_agent())
    mesh.put(service("addr"))
    mesh.truth.residents[VIP] = ResidentService("addr", "reviews", (80,))
    mesh.put()
    mesh.want("addr/reviews")
    stamps = {ADDRESSES: mesh.stamp(AddressesRootTopic()), "addr": mesh.stamp(RootTopic("addr"))}
    assert stamps[ADDRESSES] > stamps["addr"]
    assert {name: root[:2] for name, root in mesh.proxy.replica.roots().items()} == stamps

    mesh.proxy.restart(mesh.proxy.replica.dump())
    mesh.proxy.connect(mesh.broker.retained)
    mesh.proxy.deliver_all(NOW)
    assert mesh.proxy.replica.problems() == ()
    assert mesh.proxy.replica.whole


def test_deletions_of_what_never_was_cannot_fill_the_memory():
    mesh = Mesh(plane.uproxy(WEB, "web-1"))
    mesh.put(service("shop"))
    mesh.want("shop/reviews")
    replica, (endpoints,) = mesh.proxy.replica, [one.endpoints for one in mesh.proxy.replica._services.values()]
    epoch, version = mesh.stamp(ManifestTopic("shop", "reviews"))
    for session in range(3):
        for number in range(endpoint_set._MAX_GONE * 2):
            topic = EndpointTopic("shop", "reviews", f"w{session}.{number}")
            tombstone = messages.encode(Envelope(epoch, version + 1, 0, None))
            replica.receive(format_topic(TRUST_DOMAIN, topic), tombstone, NOW)
        assert len(endpoints._gone) == endpoint_set._MAX_GONE
        assert replica._endpoint_bytes == endpoints.bytes == endpoint_set._ENTRY_BYTES * endpoint_set._MAX_GONE
        replica.session_started()
    replica.drop_service("shop/reviews")
    replica.filters()
    assert replica._endpoint_bytes == 0
