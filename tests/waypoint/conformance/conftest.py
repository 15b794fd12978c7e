"""One waypoint for the cases of a module, of each engine, and beside the workload."""

from collections.abc import Iterator

import pytest

from tests.support.conformance import BESIDE, ENGINES, NotBesideError, Suite, running_suite

ELSEWHERE = {
    "test_a_body_goes_along_as_far_as_is_asked",
    "test_a_service_behind_the_waypoint_is_told_that_the_waypoint_asks",
    "test_http_route_invalid_cross_namespace_backend_ref",
    "test_http_route_invalid_non_existent_backend_ref",
    "test_http_route_invalid_reference_grant",
    "test_http_route_partially_invalid_via_invalid_reference_grant",
    "test_http_route_reference_grant",
    "test_it_is_asked_after_tokens_and_before_other_policies_each_service_once",
    "test_mesh_consumer_route",
    "test_mesh_frontend_hostname",
    "test_only_what_is_said_of_a_request_is_told",
    "test_routes_see_what_an_authorization_adds",
    "test_what_a_service_allows_goes_on_with_what_it_says",
    "test_what_a_service_denies_is_answered_as_it_says",
    "test_what_is_no_answer_refuses_unless_it_is_said_otherwise",
    "test_without_an_extension_nobody_passes",
}
"""What needs another placement than beside the workload, and is refused there by name: a service that is asked, a route
to another Service, and one of callers.
"""


@pytest.fixture(scope="module", params=ENGINES)
def running(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Suite]:
    with running_suite(tmp_path_factory.mktemp("conformance"), request.param) as found:
        yield found


@pytest.fixture
def suite(running: Suite, request: pytest.FixtureRequest) -> Suite:
    """Without what an earlier case has applied."""
    if running.engine == BESIDE and request.node.originalname in ELSEWHERE:
        request.applymarker(pytest.mark.xfail(raises=NotBesideError, strict=True, reason="refused by name"))
    running.apply()
    for echo in running.echoes.values():
        echo.seen.clear()
    running.judged.clear()
    return running
