"""Requests while routes, weights and policy change: each is served by one configuration, whole."""

import pytest

from tests.support.conformance import Suite, prefix, route


def configuration(number: int) -> tuple[str, str]:
    """Number n: `/even` is denied if n is even, else routed, and `/odd` the other way round; so neither is ever 404.

    All that is routed is told n on its way there and back, and which backend was chosen.
    """
    denied, routed = ("/even", "/odd") if number % 2 == 0 else ("/odd", "/even")
    told = "{type: %s, %s: {set: [{name: x-configuration, value: '%d'}]}}"
    both = ", ".join(
        told % (kind, kind[0].lower() + kind[1:], number)
        for kind in ("RequestHeaderModifier", "ResponseHeaderModifier")
    )
    backends = ", ".join(
        f"{{name: echo-{version}, port: 8080, weight: {weight}, filters: [{{type: ResponseHeaderModifier, "
        f"responseHeaderModifier: {{set: [{{name: x-backend, value: {version}}}]}}}}]}}"
        for version, weight in (("v1", number % 3), ("v2", 1), ("v3", number % 5))
    )
    policy = (
        "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {name: deny, namespace: shop}\n"
        "spec:\n  targetRefs: [{group: '', kind: Service, name: echo}]\n  action: DENY\n"
        f"  rules: [{{to: [{{operation: {{paths: ['{denied}']}}}}]}}]\n"
    )
    return route(f"{{matches: {prefix(routed)}, filters: [{both}], backendRefs: [{backends}]}}"), policy


@pytest.mark.parametrize(("each", "least"), [(100, 20), pytest.param(1250, 100, marks=pytest.mark.soak)])
def test_each_request_is_served_by_one_configuration(suite: Suite, each: int, least: int) -> None:
    suite.apply(*configuration(0))
    load = suite.load(["/even", "/odd"] * 4, each)
    changes = 0
    while not load.done() or changes < least:
        changes += 1
        suite.apply(*configuration(changes))
    answers = load.result(60)
    assert len(answers) == 8 * each
    seen = set()
    for path, answer in answers:
        assert answer.status in (200, 403), (path, answer)
        if answer.status == 200:
            echoed, headers = answer.echoed, answer.headers
            seen.add(headers["x-configuration"])
            assert echoed["headers"]["x-configuration"] == headers["x-configuration"]
            assert echoed["name"] == headers["x-backend"]
            assert int(headers["x-configuration"]) % 2 == (path == "/even")
    assert len(seen) > 5, "the configuration has changed while they were served"


def test_what_would_not_hold_together_would_be_seen(suite: Suite) -> None:
    """The same, where the policy of one configuration meets the routes of another."""
    suite.apply(configuration(0)[0], configuration(1)[1])
    assert {answer.status for _, answer in suite.load(["/even"], 3).result(30)} == {404}
