"""Gateway API's cases of GRPCRoute, as far as they are about routing; each test has its case's name.

To a waypoint a call is a request for a path, whichever HTTP it comes by: these come by HTTP/1.1.
"""

from collections import Counter

from tests.support.conformance import Suite, route, to

ECHO = "gateway_api_conformance.echo_basic.grpcecho.GrpcEcho"


def grpc(*rules: str, hostnames: str = "") -> str:
    return route(*rules, kind="GRPCRoute", hostnames=hostnames)


def call(suite: Suite, method: str, **headers: str) -> str | int:
    """Which version answers."""
    return suite.ask(f"/{ECHO}/{method}", "POST", body=b"\0\0\0\0\0", **headers).by


def test_grpc_route_exact_method_matching(suite: Suite) -> None:
    suite.apply(
        grpc(
            f"{{matches: [{{method: {{service: {ECHO}, method: Echo}}}}], backendRefs: [{to('v1')}]}}",
            f"{{matches: [{{method: {{service: {ECHO}, method: EchoTwo}}}}], backendRefs: [{to('v2')}]}}",
        )
    )
    assert [call(suite, method) for method in ("Echo", "EchoTwo", "EchoThree", "echo")] == ["v1", "v2", 404, 404]


def test_grpc_route_method_precedence(suite: Suite) -> None:
    """Most characters of the service, then of the method, then most headers."""
    suite.apply(
        grpc(
            f"{{matches: [{{method: {{method: Echo}}}}], backendRefs: [{to('v3')}]}}",
            f"{{matches: [{{method: {{service: {ECHO}}}}}], backendRefs: [{to('v2')}]}}",
            f"{{matches: [{{method: {{service: {ECHO}, method: Echo}}}}], backendRefs: [{to('v1')}]}}",
            f"{{matches: [{{method: {{service: {ECHO}}}, headers: [{{name: version, value: x}}]}}], "
            f"backendRefs: [{to('v3')}]}}",
        )
    )
    assert [call(suite, "Echo"), call(suite, "Other"), call(suite, "Other", version="x")] == ["v1", "v2", "v3"]
    assert suite.ask("/pkg.Other/Echo", "POST").by == "v3"
    assert suite.ask("/pkg.Other/Echo/more", "POST").by == 404


def test_grpc_route_header_matching(suite: Suite) -> None:
    def rule(version: str, *asked: str) -> str:
        pairs = ", ".join(f"{{name: {name}, value: {value}}}" for name, value in (one.split("=") for one in asked))
        return f"{{matches: [{{headers: [{pairs}]}}], backendRefs: [{to(version)}]}}"

    suite.apply(
        grpc(
            rule("v1", "version=one"),
            rule("v2", "version=two"),
            rule("v1", "version=two", "color=orange"),
            rule("v1", "color=blue"),
            rule("v2", "color=red"),
        )
    )
    for given, wanted in (
        ({"version": "one"}, "v1"),
        ({"version": "two"}, "v2"),
        ({"version": "two", "color": "orange"}, "v1"),
        ({"color": "orange"}, 404),
        ({"color": "blue"}, "v1"),
        ({"color": "red"}, "v2"),
        ({"color": "purple"}, 404),
    ):
        assert call(suite, "Echo", **given) == wanted, given


def test_grpc_route_listener_hostname_matching(suite: Suite) -> None:
    suite.apply(grpc(f"{{backendRefs: [{to('v2')}]}}", hostnames="['*.bar.com', foo.com]"))
    found = [call(suite, "Echo", host=host) for host in ("a.bar.com", "foo.com:80", "bar.com", "x.foo.com")]
    assert found == ["v2", "v2", 404, 404]


def test_grpc_route_named_rule(suite: Suite) -> None:
    suite.apply(grpc(f"{{name: named, backendRefs: [{to('v2')}]}}"))
    assert call(suite, "Echo", x_request_id="named") == "v2"
    assert suite.record_of("named").route == "named"


def test_grpc_route_request_header_modifier(suite: Suite) -> None:
    modifier = "{set: [{name: X-Set, value: s}], add: [{name: x-add, value: a}], remove: [x-remove]}"
    suite.apply(
        grpc(
            f"{{filters: [{{type: RequestHeaderModifier, requestHeaderModifier: {modifier}}}], "
            f"backendRefs: [{to('v1')}]}}"
        )
    )
    headers = suite.ask(f"/{ECHO}/Echo", "POST", x_set="x", x_add="x", x_remove="x").echoed["headers"]
    assert (headers["x-set"], headers["x-add"], headers.get("x-remove")) == ("s", "x,a", None)


def test_mesh_grpc_route_weight(suite: Suite) -> None:
    suite.apply(grpc(f"{{backendRefs: [{to('v1', 70)}, {to('v2', 30)}, {to('v3', 0)}]}}"))
    for _ in range(10):
        found = Counter(call(suite, "Echo") for _ in range(300))
        if abs(found["v1"] - 210) <= 15:
            break
    assert abs(found["v1"] - 210) <= 15
    assert found["v3"] == 0


def test_routes_of_both_kinds_stand_beside_each_other(suite: Suite) -> None:
    suite.apply(
        route(f"{{matches: [{{path: {{value: /}}}}], backendRefs: [{to('v1')}]}}", name="http"),
        grpc(f"{{matches: [{{method: {{service: {ECHO}}}}}], backendRefs: [{to('v2')}]}}"),
    )
    assert [suite.ask("/other").by, call(suite, "Echo")] == ["v1", "v2"]


def test_messages_are_counted(suite: Suite) -> None:
    suite.apply(grpc(f"{{backendRefs: [{to('v1')}]}}"))
    body = b"\0\0\0\0\3abc" + b"\0\0\0\0\0"
    named = {"content_type": "application/grpc", "x_request_id": "counted"}
    assert suite.ask(f"/{ECHO}/Echo", "POST", body=body, **named).by == "v1"
    counted = suite.record_of("counted").request_messages
    assert counted is not None
    assert counted.count == 2
