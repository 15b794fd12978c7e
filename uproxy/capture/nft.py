"""Capture by nftables in the workload's network namespace, for kernels without the eBPF hooks: its rules.

NAT brings what the application dials in the mesh to the uProxy, which asks conntrack where it was going
(SO_ORIGINAL_DST). The rules live and die with the namespace: nothing that ends, or is killed, opens it. The uProxy is
known by its uid, for want of better: so the application must not be root, who could take the rules away.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Sequence
from typing import Final

from control.api.address import HBONE_PORT
from uproxy.capture.ranges import MeshRanges, Network
from uproxy.redirect import OUTBOUND_PORT, PROBE_PORT, PROBE_V4, PROBE_V6

RESERVED_PORTS: Final = "15000-15090"
"""The uProxy's own: nobody else's answers leave them (bpf/bind.bpf.c keeps applications from binding them at all)."""

_MARK: Final = 0x75505859  # on the uProxy's own connections, in conntrack: any number that nobody else uses
_TIMEOUT_S: Final = 20.0
_SYSTEM_PATH: Final = "/usr/sbin:/sbin"  # a plain `su`, and cron, leave out where `nft` is

# Where a rule asks who owns a packet's socket it does not match what has no owner: what the kernel goes on sending for
# a connection whose process has closed it. The mark tells whose those are.
_RULES: Final = """\
table inet uproxy {{
	chain dial {{
		type nat hook output priority -100; policy accept;
		meta skuid {uid} return
		ip daddr {probe_v4} tcp dport {probe_port} redirect to :{outbound}
		ip6 daddr {probe_v6} tcp dport {probe_port} redirect to :{outbound}
		fib daddr type local return
		meta l4proto tcp jump to_uproxy
	}}
	chain to_uproxy {{
{redirects}
	}}
	chain leave {{
		type filter hook output priority 0; policy accept;
		meta l4proto {{ tcp, udp }} th sport {reserved} meta skuid != {uid} counter drop
		fib daddr type local accept
		meta skuid {uid} ct state new ct mark set {mark:#x}
		meta skuid {uid} accept
		meta skuid != {uid} goto in_the_open
		ct mark {mark:#x} accept
		tcp flags & rst == rst accept
		goto in_the_open
	}}
	chain in_the_open {{
		meta l4proto {{ icmp, icmpv6 }} accept
{refusals}
	}}
	chain enter {{
		type filter hook input priority 0; policy accept;
		iif lo accept
		meta l4proto {{ udp, icmp, icmpv6 }} accept
		tcp dport {hbone} ct state new ct mark set {mark:#x}
		tcp dport {hbone} accept
		tcp flags & (syn | ack) != syn ct direction reply accept
		meta l4proto tcp counter reject with tcp reset
		counter drop
	}}
}}
"""


class NftError(Exception):
    """The rules cannot be put in force; the text says what is missing and how to mend it."""


def rules(uid: int, ranges: MeshRanges) -> str:
    """For one workload, whose uProxy has this uid. The longest prefix decides, as in the other capture."""
    blocks = sorted(ranges.networks().items(), key=lambda block: (-block[0].prefixlen, str(block[0])))
    return _RULES.format(
        uid=uid,
        mark=_MARK,
        probe_v4=PROBE_V4,
        probe_v6=PROBE_V6,
        probe_port=PROBE_PORT,
        outbound=OUTBOUND_PORT,
        reserved=RESERVED_PORTS,
        hbone=HBONE_PORT,
        redirects=_by_block(blocks, f"meta l4proto tcp redirect to :{OUTBOUND_PORT}"),
        refusals=_by_block(blocks, "counter drop"),
    )


def _by_block(blocks: Sequence[tuple[Network, bool]], verdict: str) -> str:
    return "\n".join(
        f"\t\t{'ip' if block.version == 4 else 'ip6'} daddr {block} {verdict if of_mesh else 'return'}"
        for block, of_mesh in blocks
    )


def load(text: str) -> None:
    """Put rules in force in the calling thread's network namespace, all at once. Raises NftError, and nothing is."""
    try:
        done = subprocess.run(
            ["nft", "-f", "-"],
            input=text,
            capture_output=True,
            text=True,
            timeout=_TIMEOUT_S,
            check=False,
            env={"PATH": f"{os.environ.get('PATH', os.defpath)}:{_SYSTEM_PATH}", "LANG": "C.UTF-8"},
        )
    except FileNotFoundError:
        raise NftError("the program `nft` is not installed: apt-get install nftables") from None
    except subprocess.TimeoutExpired:
        raise NftError(f"`nft` did not answer within {_TIMEOUT_S:g} s") from None
    if done.returncode:
        said = done.stderr.strip().splitlines()
        raise NftError(f"nft: {said[0] if said else f'status {done.returncode}'}; the kernel may lack nf_tables or NAT")
