"""Names as Kubernetes takes them."""

from __future__ import annotations

import pytest

from control.api.names import wrong_dns_label, wrong_port_name, wrong_service_name, wrong_subdomain
from control.api.problems import shown


@pytest.mark.parametrize(
    ("wrong", "right", "bad"),
    [
        (
            wrong_dns_label,
            ["a", "9a", "shop-1", "x" * 63],
            ["", "-a", "a-", "A", "a.b", "a_b", "x" * 64, "a\n", "+", "#"],
        ),
        (wrong_service_name, ["a", "shop-1", "x" * 63], ["", "9a", "-a", "a-", "A", "a.b", "x" * 64, "a\n"]),
        (
            wrong_subdomain,
            ["a", "9.a-b.c", "x" * 63 + ".y"],
            ["", ".", "a.", "a..b", "-a", "A", "a/b", "a." * 130, "x" * 64],
        ),
        (wrong_port_name, ["http", "a1", "http-2"], ["", "80", "-a", "a-", "a--b", "HTTP", "x" * 16, "a.b"]),
    ],
)
def test_names_are_right_or_refused_with_their_text(wrong, right, bad):
    assert [name for name in right if wrong(name)] == []
    assert [name for name in bad if not wrong(name)] == []
    assert all(shown(name) in wrong(name) for name in bad)
