"""TrafficPolicy as people write it."""

from __future__ import annotations

import pytest

from control.api.balancing import (
    Algorithm,
    ConsistentHash,
    Failover,
    HashOf,
    LoadBalancing,
    OutlierDetection,
    Warmup,
)
from control.api.declared import DeclaredTraffic
from control.api.mesh import Mesh
from control.api.policy import Target
from control.api.problems import ResourceErrors
from control.api.records import RecordError, read, write
from control.api.resources import parse
from control.api.topics import TrafficTopic
from control.api.traffic import ConnectionLimits, Fault, RateLimit, Redis, Share, TrafficPolicy
from tests.support.desired import gateway, service
from tests.support.records import TRUST_DOMAIN

HEAD = "apiVersion: mesh.uproxy.dev/v1alpha1\nkind: TrafficPolicy\nmetadata: {name: t, namespace: shop}\n"
GLOBAL = "rateLimits: [{requests: 1, per: 1s, scope: Global}], "
TARGET = "targetRefs: [{group: '', kind: Service, name: web}]"


def spec(text):
    (found,) = parse(f"{HEAD}spec: {{{TARGET}, {text}}}\n", "f.yaml")
    assert isinstance(found, DeclaredTraffic)
    return found.traffic


def test_every_field():
    found = spec(
        "rateLimits: [{requests: 10, per: 1s}, {requests: 5, per: 1m30s, burst: 7, by: Identity, rules: [canary]}, "
        "{requests: 1, per: 10ms, by: Header, header: X-User}], maxConcurrentRequests: 50, "
        "fault: {delay: {duration: 2s, percentage: 5}, abort: {status: 503, percentage: 100}}, "
        "connectionLimits: {maxConnections: 20, maxPendingRequests: 7, maxRequestsPerConnection: 100}, "
        "upgrades: [tcp, SPDY/3.1]"
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
        ConnectionLimits(20, 7, 100),
        upgrades=("spdy/3.1", "tcp"),
    )


def test_where_all_processes_count_together():
    found = spec(
        "rateLimits: [{requests: 1, per: 1s}, {requests: 2, per: 1s, scope: Global}], redis: {service: r, port: 1}"
    )
    assert [limit.everywhere for limit in found.rate_limits] == [False, True]
    assert found.redis == Redis("shop/r", 1, 100, True)
    found = spec(GLOBAL + "redis: {service: r, port: 1, timeout: 1s, failOpen: false}")
    assert found.redis == Redis("shop/r", 1, 1000, False)


def test_as_many_requests_as_with_envoy_wait_for_a_connection_where_nobody_says():
    assert spec("connectionLimits: {maxConnections: 20}").connection_limits == ConnectionLimits(20, 1024, 0)
    assert spec("connectionLimits: {maxRequestsPerConnection: 2}").connection_limits == ConnectionLimits(0, 0, 2)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("upgrades: [h2c]", "upgrades[0]: would carry requests past every policy; it is never taken"),
        ("upgrades: [TLS/1.3]", "would carry requests past every policy"),
        ("upgrades: [HTTP/2.0]", "would carry requests past every policy"),
        ("upgrades: [WebSocket]", "is always taken; remove it"),
        ("upgrades: ['a b']", "must be the name of a protocol"),
        ("upgrades: ['a/b/c']", "must be the name of a protocol"),
        ("upgrades: [a, A]", "upgrades: names one twice; remove one"),
        ("upgrades: [a, b, c, d, e, f, g, h, i]", "upgrades: has 9; at most 8 are taken"),
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
        ("rateLimits: [{requests: 1, per: 1s, scope: Global}]", "redis: is missing: a rate limit of scope Global"),
        ("maxConcurrentRequests: 1, redis: {service: r, port: 1}", "redis: counts rate limits of scope Global, and"),
        (GLOBAL + "redis: {port: 1}", "redis.service: is missing; it must be the name of a Service"),
        (GLOBAL + "redis: {service: r}", "redis.port: is missing; it must be a port"),
        (GLOBAL + "redis: {service: r, port: 1, timeout: 11s}", "redis.timeout: must be from 1ms to 10s"),
        (GLOBAL + "redis: {service: r, port: 1, password: x}", "redis.password: unknown field"),
        ("connectionLimits: {}", "connectionLimits.maxConnections: is missing; write it or maxRequestsPerConnection"),
        ("connectionLimits: {maxPendingRequests: 1}", "maxPendingRequests: needs maxConnections"),
        ("connectionLimits: {maxConnections: 0}", "maxConnections: 0 is out of range"),
        ("fault: {}", "spec: says nothing; write rateLimits"),
        ("loadBalancer: {}", "loadBalancer: unknown field"),
        ("loadBalancing: {}", "loadBalancing: says nothing; write simple"),
        ("loadBalancing: {simple: LEAST_CONN}", "LEAST_CONN is refused: Istio has renamed it; write LEAST_REQUEST"),
        ("loadBalancing: {simple: PASSTHROUGH}", "PASSTHROUGH is refused: a waypoint always chooses"),
        ("loadBalancing: {simple: FASTEST}", "'FASTEST' must be LEAST_REQUEST or ROUND_ROBIN or RANDOM"),
        ("loadBalancing: {warmupDurationSecs: 3s}", "warmupDurationSecs: is refused: Istio has replaced it"),
        ("loadBalancing: {consistentHash: {}}", "must say exactly one of httpHeaderName"),
        ("loadBalancing: {consistentHash: {useSourceIp: true, httpHeaderName: x}}", "exactly one of httpHeaderName"),
        ("loadBalancing: {simple: RANDOM, consistentHash: {useSourceIp: true}}", "stands beside consistentHash"),
        ("loadBalancing: {consistentHash: {useSourceIp: true, maglev: {}}}", "maglev: is refused: an endpoint has 100"),
        ("loadBalancing: {consistentHash: {httpCookie: {ttl: 1s}}}", "name: is missing; it must be the cookie's name"),
        ("loadBalancing: {consistentHash: {httpCookie: {name: a b}}}", "name: 'a b' is no cookie's name"),
        ("loadBalancing: {consistentHash: {httpCookie: {name: a, path: /}}}", "path: needs a ttl"),
        ("loadBalancing: {consistentHash: {httpCookie: {name: a, ttl: 1s, path: a}}}", "'a' is no cookie's path"),
        ("loadBalancing: {consistentHash: {httpCookie: {name: a, ttl: 1s, path: /;b}}}", "'/;b' is no cookie's path"),
        ("loadBalancing: {simple: RANDOM, warmup: {duration: 1s}}", "warmup: needs `simple: LEAST_REQUEST`"),
        ("loadBalancing: {warmup: {duration: 0s}}", "duration: is no time at all"),
        ("loadBalancing: {warmup: {duration: 1s, aggression: 0.5}}", "aggression: 0.5 must be a number from 1 to 10"),
        ("loadBalancing: {warmup: {duration: 1s, aggression: 1.005}}", "with up to two decimals"),
        ("loadBalancing: {warmup: {duration: 1s, aggression: .nan}}", "with up to two decimals"),
        ("loadBalancing: {warmup: {duration: 1s, aggression: fast}}", "aggression: must be a number"),
        ("loadBalancing: {localityLbSetting: {distribute: []}}", "distribute: is refused: shares by locality"),
        ("loadBalancing: {localityLbSetting: {failoverPriority: [a]}}", "failoverPriority: is refused"),
        ("loadBalancing: {localityLbSetting: {failover: [{from: eu, to: eu}]}}", "to: is where it comes from"),
        ("loadBalancing: {localityLbSetting: {failover: [{from: eu/1, to: us}]}}", "from: must be a region alone"),
        (
            "loadBalancing: {localityLbSetting: {failover: [{from: a, to: b}, {from: a, to: c}]}}",
            "from: a stands twice",
        ),
        (
            "loadBalancing: {localityLbSetting: {enabled: false, failover: [{from: a, to: b}]}}",
            "beside `enabled: false`",
        ),
        ("outlierDetection: {consecutiveErrors: 3}", "consecutiveErrors: is refused: Istio has replaced it"),
        ("outlierDetection: {interval: 0s}", "interval: is no time at all"),
        ("outlierDetection: {maxEjectionPercent: 101}", "maxEjectionPercent: 101 is out of range"),
        ("outlierDetection: {consecutiveLocalOriginFailures: 3}", "needs `splitExternalLocalOriginErrors: true`"),
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


def test_how_endpoints_are_chosen():
    assert spec("loadBalancing: {simple: ROUND_ROBIN}").load_balancing == LoadBalancing(Algorithm.ROUND_ROBIN)
    text = "loadBalancing: {warmup: {duration: 30s, minimumPercent: 5, aggression: 1.5}, "
    found = spec(text + "localityLbSetting: {failover: [{from: us, to: eu}, {from: eu, to: us}]}}").load_balancing
    failover = (Failover("eu", "us"), Failover("us", "eu"))
    assert found == LoadBalancing(Algorithm.LEAST_REQUEST, None, Warmup(30_000, 5, 150), True, failover)
    for text, hashed in (
        ("httpHeaderName: X-User", ConsistentHash(HashOf.HEADER, "x-user")),
        ("httpQueryParameterName: User", ConsistentHash(HashOf.PARAMETER, "User")),
        ("httpCookie: {name: Id}", ConsistentHash(HashOf.COOKIE, "Id")),
        ("httpCookie: {name: Id, ttl: 0s, path: /a}", ConsistentHash(HashOf.COOKIE, "Id", 0, "/a")),
        ("useSourceIp: true", ConsistentHash(HashOf.ADDRESS)),
        ("useSourceIdentity: true", ConsistentHash(HashOf.IDENTITY)),
    ):
        assert spec(f"loadBalancing: {{consistentHash: {{{text}}}}}").load_balancing == LoadBalancing(hash=hashed)
    assert spec("outlierDetection: {}").outlier_detection == OutlierDetection(5, 0, 5, False, 10_000, 30_000, 10, 0)
    text = "consecutive5xxErrors: 0, consecutiveGatewayErrors: 2, splitExternalLocalOriginErrors: true, "
    text += "consecutiveLocalOriginFailures: 3, interval: 5s, baseEjectionTime: 1m, maxEjectionPercent: 100, "
    found = spec(f"outlierDetection: {{{text}minHealthPercent: 50}}").outlier_detection
    assert found == OutlierDetection(0, 2, 3, True, 5000, 60_000, 100, 50)


def test_of_two_that_choose_for_one_service_the_second_is_warned_of():
    other = HEAD.replace("name: t", "name: u") + f"spec: {{{TARGET}, loadBalancing: {{simple: RANDOM}}}}\n"
    texts = (
        service("web", labels="istio.io/use-waypoint: wp"),
        gateway("wp"),
        f"{HEAD}spec: {{{TARGET}, loadBalancing: {{simple: RANDOM}}, outlierDetection: {{}}}}\n",
        other,
    )
    built = Mesh.build([one for n, text in enumerate(texts) for one in parse(text, f"{n}.yaml")], "cluster.local")
    found = [str(warning) for warning in built.warnings if "loadBalancing" in str(warning)]
    assert len(found) == 1
    assert "3.yaml" in found[0]
    assert "TrafficPolicy shop/t says it of Service shop/web too, and comes first by name" in found[0]


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
        ("rate_limits", [[*LIMIT, False]], "each must be"),
        ("rate_limits", [[*LIMIT, 1]], "each must be"),
        ("rate_limits", [[*LIMIT, True]], "redis: it is there for rate limits that all processes count"),
        ("redis", ["shop/redis", 6379, 100, True], "redis: it is there for rate limits that all processes count"),
        ("redis", ["shop/redis", 6379, 100], "redis must be"),
        ("redis", ["shop/redis", 6379, 0, True], "redis is 0"),
        ("redis", ["redis", 6379, 1, True], "must be namespace/name"),
        ("connections", [1, 1], "connections must be"),
        ("connections", [1, 0, 0], "requests wait where connections are limited"),
        ("connections", [0, 1, 1], "requests wait where connections are limited"),
        ("connections", [0, 0, 0], "limits nothing"),
        ("loadBalancing", {"algorithm": "FAST"}, "algorithm is 'FAST'"),
        ("loadBalancing", {"algorithm": "RANDOM", "more": 1}, "unknown fields: more"),
        ("loadBalancing", {"algorithm": "RANDOM", "hash": ["useSourceIp", "x", None, ""]}, "a name belongs to"),
        ("loadBalancing", {"algorithm": "RANDOM", "hash": ["httpHeaderName", "x", 1, ""]}, "only a cookie that is set"),
        ("loadBalancing", {"algorithm": "RANDOM", "hash": ["httpCookie", "x", None, "/"]}, "only a cookie that is set"),
        ("loadBalancing", {"algorithm": "RANDOM", "hash": ["httpCookie", "x y", 1, ""]}, "no cookie's name"),
        ("loadBalancing", {"algorithm": "RANDOM", "hash": ["httpCookie"]}, "hash must be"),
        ("loadBalancing", {"algorithm": "RANDOM", "warmup": [0, 1, 100]}, "warmup is 0"),
        ("loadBalancing", {"algorithm": "RANDOM", "warmup": [1]}, "warmup must be"),
        ("loadBalancing", {"algorithm": "RANDOM", "local": False}, "local is false"),
        ("loadBalancing", {"algorithm": "RANDOM", "failover": [["a", "b"]]}, "failover needs local"),
        ("loadBalancing", {"algorithm": "RANDOM", "local": True, "failover": [["a", "a"]]}, "another region"),
        ("upgrades", [], "upgrades has 0"),
        ("upgrades", ["SPDY/3.1"], "must be the name of a protocol"),
        ("upgrades", ["h2c"], "past every policy"),
        ("upgrades", ["b", "a"], "must be in order"),
        ("outlierDetection", [1, 2, 3], "must have eight values"),
        ("outlierDetection", [1, 0, 5, 1, 1, 1, 1, 1], "must be bool"),
        ("outlierDetection", [1, 0, 5, True, 0, 1, 1, 1], "outlierDetection is 0"),
    ],
)
def test_each_wrong_value_of_a_record_is_refused_by_name(field, value, problem):
    topic = TrafficTopic("shop", "t")
    body = write(TrafficPolicy("shop", "t", (Target("Service", "shop/web"),), max_requests=1))
    with pytest.raises(RecordError, match=problem):
        read(topic, {**body, field: value}, TRUST_DOMAIN)
