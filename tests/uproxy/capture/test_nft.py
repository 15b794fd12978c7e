"""The rules by themselves; `tests/mesh/test_nft.py` has what they do."""

import subprocess

import pytest

from uproxy.capture import nft
from uproxy.capture.ranges import MeshRanges

RULES = nft.rules(65534, MeshRanges.parse(["10.99.0.0/16", "fd99::/64"], ["10.99.5.0/24"]))


def checked_without_protocols(rules: str) -> str:
    """What nft has against rules on a host where no package has put /etc/protocols."""
    hidden = "mount --bind /dev/null /etc/protocols && exec nft --check --file -"
    command = ["unshare", "--mount", "--net", "sh", "-c", hidden]
    return subprocess.run(command, input=rules, capture_output=True, text=True, check=False).stderr


@pytest.mark.root
def test_the_rules_load_where_no_protocol_has_a_name():
    assert checked_without_protocols(RULES) == ""
    assert "Could not resolve protocol name" in checked_without_protocols(RULES.replace("icmpv6", "ipv6-icmp"))
