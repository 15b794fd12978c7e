// SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-only
/*
 * sk_lookup: what may reach a workload's listeners from outside its namespace: its uProxy's HBONE
 * port.
 */
#include "sock.h"

char LICENSE[] SEC("license") = "GPL";

/*
 * Cookie of the namespace this copy is attached to: there is no helper for it here. The agent sets
 * it before it loads the program.
 */
const volatile __u64 self_netns_cookie = 0;

static __always_inline int is_local(const __be32 addr[4])
{
	return is_loopback(addr) || is_own(self_netns_cookie, addr);
}

static __always_inline int is_admitted(const struct mesh_admitted_key *key)
{
	struct mesh_admitted *entry = bpf_map_lookup_elem(&admitted, key);
	/* This CPU's clock may be a little behind the one that wrote (ktime_get_mono_fast_ns). */
	__u64 now = bpf_ktime_get_ns() + 1000000;

	return entry && now - entry->since_ns < MESH_ADMITTED_S * 1000000000ULL;
}

/*
 * Hook: for every TCP segment or UDP datagram that belongs to no established (connected) socket of
 * the namespace, before the listeners are searched: SYNs, their retransmissions, and the ACK of a
 * SYN cookie. In softirq.
 * Kernel guarantees: local_port in host order, addresses in network order. SK_DROP answers TCP with
 * RST. From the wire, loopback addresses and IPv4 packets whose source is an address of this
 * namespace never get here (martians); a forged IPv6 source of our own does, but the answer goes to
 * ourselves, so that no handshake completes.
 * We rely on: one workload being one namespace, so that whoever is local may reach whatever is
 * local.
 * On failure: closed, RST. Nothing is accepted first and reset later: that would already have read
 * plaintext.
 */
SEC("sk_lookup")
int inbound(struct bpf_sk_lookup *ctx)
{
	struct mesh_admitted_key key = { .netns_cookie = self_netns_cookie };
	__be32 *local = key.destination, *remote = key.source;

	if (ctx->protocol != IPPROTO_TCP || ctx->local_port == MESH_PORT_HBONE)
		return SK_PASS;
	if (ctx->family == AF_INET) {
		map_v4(local, CTX_WORD(ctx, bpf_sk_lookup, local_ip4));
		map_v4(remote, CTX_WORD(ctx, bpf_sk_lookup, remote_ip4));
	} else {
		local[0] = CTX_WORD(ctx, bpf_sk_lookup, local_ip6[0]);
		local[1] = CTX_WORD(ctx, bpf_sk_lookup, local_ip6[1]);
		local[2] = CTX_WORD(ctx, bpf_sk_lookup, local_ip6[2]);
		local[3] = CTX_WORD(ctx, bpf_sk_lookup, local_ip6[3]);
		remote[0] = CTX_WORD(ctx, bpf_sk_lookup, remote_ip6[0]);
		remote[1] = CTX_WORD(ctx, bpf_sk_lookup, remote_ip6[1]);
		remote[2] = CTX_WORD(ctx, bpf_sk_lookup, remote_ip6[2]);
		remote[3] = CTX_WORD(ctx, bpf_sk_lookup, remote_ip6[3]);
	}
	if (is_local(local) && is_local(remote))
		return SK_PASS;
	key.destination_port = ctx->local_port;
	key.source_port = bpf_ntohs(ctx->remote_port);
	if (is_admitted(&key)) {
		count(MESH_ADMITTED_SYN);
		return SK_PASS;
	}
	count(MESH_DROPPED_SYN);
	return SK_DROP;
}
