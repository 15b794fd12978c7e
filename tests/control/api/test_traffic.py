"""TrafficPolicy as people write it."""

from __future__ import annotations

import pytest

from control.api.declared import DeclaredTraffic
from control.api.mesh import Mesh
from control.api.policy import Target
from control.api.problems import ResourceErrors
from control.api.records import RecordError, read, write
from control.api.resources import parse
from control.api.topics import TrafficTopic
from control.api.traffic import Fault, RateLimit, Share, TrafficPolicy
from tests.support.desired import gateway, service
from tests.support.records import TRUST_DOMAIN

HEAD = "apiVersion: mesh.uproxy.dev/v1alpha1\nkind: TrafficPolicy\nmetadata: {name: t, namespace: shop}\n"
TARGET = "targetRefs: [{group: '', kind: Service, name: web}]"


def spec(text):
    (found,) = parse(f"{HEAD}spec: {{{TARGET}, {text}}}\n", "f.yaml")
    assert isinstance(found, DeclaredTraffic)
    return found.traffic


def test_every_field():
    found = spec(
        "rateLimits: [{requests: 10, per: 1s}, {requests: 5, per: 1m30s, burst: 7, by: Identity, rules: [canary]}, "
        "{requests: 1, per: 10ms, by: Header, header: X-User}], maxConcurrentRequests: 50, "
        "fault: {delay: {duration: 2s, percentage: 5}, abort: {status: 503, percentage: 100}}"
    )
    assert found == TrafficPolicy(
        "shop",
        "t",
        (Target("Service", "shop/web"),),
        (
            RateLimit(10, 1000, 10),
            RateLimit(5, 90_000, 7, Share.IDENTITY, "", ("canary",)),
            RateLimit(1, 10, 1, Share.HEADER, "x-user"),
        ),
        50,
        (Fault(5, delay_ms=2000), Fault(100, status=503)),
    )


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("rateLimits: [{requests: 1}]", "rateLimits[0].per: is missing; it must be a duration"),
        ("rateLimits: [{per: 1s}]", "rateLimits[0].requests: is missing; it must be a number"),
        ("rateLimits: [{requests: 0, per: 1s}]", "requests: 0 is out of range: 1 to 1000000"),
        ("rateLimits: [{requests: 1, per: 0s}]", "per: is no time at all"),
        ("rateLimits: [{requests: 1, per: 1}]", "per: must be text"),
        ("rateLimits: [{requests: 1, per: 1s, by: Header}]", "header: is missing; `by: Header` needs"),
        ("rateLimits: [{requests: 1, per: 1s, header: x}]", "header: needs `by: Header`"),
        ("rateLimits: [{requests: 1, per: 1s, by: Header, header: 'a b'}]", "header: 'a b' is no header's name"),
        ("rateLimits: [{requests: 1, per: 1s, by: Path}]", "by: 'Path' must be All or Identity or Header"),
        ("rateLimits: [{requests: 1, per: 1s, rules: [a, a]}]", "rules: names one twice"),
        ("rateLimits: [" + ", ".join(["{requests: 1, per: 1s}"] * 17) + "]", "rateLimits: has 17; at most 16"),
        ("maxConcurrentRequests: 0", "maxConcurrentRequests: 0 is out of range"),
        ("fault: {delay: {duration: 1s}}", "fault.delay.percentage: is missing"),
        ("fault: {delay: {duration: 0s, percentage: 1}}", "duration: is no time at all"),
        ("fault: {abort: {percentage: 1}}", "fault.abort.status: is missing"),
        ("fault: {abort: {status: 99, percentage: 1}}", "status: 99 is out of range"),
        ("fault: {}", "spec: says nothing; write rateLimits"),
        ("loadBalancer: {}", "loadBalancer: unknown field"),
    ],
)
def test_what_is_not_taken_is_refused_by_name(text, problem):
    with pytest.raises(ResourceErrors) as caught:
        spec(text)
    assert any(problem in str(error) for error in caught.value.errors), [str(error) for error in caught.value.errors]


def test_one_without_targets_is_refused():
    with pytest.raises(ResourceErrors, match="targetRefs: is missing: this needs a waypoint"):
        parse(f"{HEAD}spec: {{maxConcurrentRequests: 1}}\n", "f.yaml")


def test_it_is_no_reason_to_keep_the_way_around_a_waypoint_closed():
    """As of routes, and unlike of authorisation: nobody gets what is not theirs by going directly."""
    texts = (service("web", labels="istio.io/use-waypoint: wp"), gateway("wp"))
    built = Mesh.build(
        [
            *(one for number, text in enumerate(texts) for one in parse(text, f"{number}.yaml")),
            *parse(f"{HEAD}spec: {{{TARGET}, maxConcurrentRequests: 1}}\n", "f.yaml"),
        ],
        "cluster.local",
    )
    assert "mesh/v1/cluster.local/traffic/shop/t" in built.records()
    assert not any(wish.guarded for wish in built.wishes.values())
    assert not any("f.yaml" in str(warning) for warning in built.warnings)


LIMIT = [1, 1000, 1, "All", "", []]


@pytest.mark.parametrize(
    ("field", "value", "problem"),
    [
        ("targets", [], "targets is empty"),
        ("rate_limits", [[1, 1000, 1, "All", ""]], "each must be"),
        ("rate_limits", [LIMIT] * 17, "has 17; at most 16"),
        ("rate_limits", [[0, *LIMIT[1:]]], "rate_limits is 0"),
        ("rate_limits", [[1, 1000, 1, "All", "x", []]], "a header belongs to Header"),
        ("rate_limits", [[1, 1000, 1, "Header", "", []]], "a header belongs to Header"),
        ("rate_limits", [[1, 1000, 1, "Header", "X", []]], "no header's name in lower case"),
        ("rate_limits", [[1, 1000, 1, "All", "", ["a", "a"]]], "names one twice"),
        ("max_requests", -1, "max_requests is -1"),
        ("faults", [[0, 1, 0]], "faults is 0"),
        ("faults", [[1, 0, 0]], "faults is 0"),
        ("faults", [[1, 5, 503]], "each must be"),
    ],
)
def test_each_wrong_value_of_a_record_is_refused_by_name(field, value, problem):
    topic = TrafficTopic("shop", "t")
    body = write(TrafficPolicy("shop", "t", (Target("Service", "shop/web"),), max_requests=1))
    with pytest.raises(RecordError, match=problem):
        read(topic, {**body, field: value}, TRUST_DOMAIN)
