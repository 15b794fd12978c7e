// SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-only
/*
 * sk_lookup: what may reach a workload's listeners from outside its namespace: its uProxy's HBONE
 * port, what was admitted, and plaintext to ports that take it, which goes to the uProxy.
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

/* Whether a port is open to plaintext. */
static __always_inline int takes_plaintext(__u32 port)
{
	__u64 netns_cookie = self_netns_cookie;
	struct mesh_plaintext *open = bpf_map_lookup_elem(&plaintext, &netns_cookie);

	if (!open || (port >= MESH_PORT_RESERVED_FIRST && port <= MESH_PORT_RESERVED_LAST))
		return 0;
	for (int i = 0; i < MESH_PLAINTEXT_PORTS && i < open->count; i++) {
		if (open->ports[i] == port)
			return !open->others;
	}
	return !!open->others;
}

/*
 * Gives the connection to the uProxy's newest listener of a port, also when the older one listens
 * still. Returns 0 when there is none.
 */
static __always_inline int give(struct bpf_sk_lookup *ctx, __u16 port)
{
	struct mesh_listener_key key = {
		.netns_cookie = self_netns_cookie,
		.port = port,
		.family = ctx->family,
	};
	struct bpf_sock *listener = bpf_map_lookup_elem(&listeners, &key);
	long failed;

	if (!listener)
		return 0;
	failed = bpf_sk_assign(ctx, listener, BPF_SK_LOOKUP_F_NO_REUSEPORT);
	bpf_sk_release(listener);
	return !failed;
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
 * On failure: closed, RST; for the uProxy's own ports, what the kernel's look-up finds, which is
 * the uProxy too, since no app may bind them. Nothing is accepted first and reset later: that would already have read
 * plaintext.
 */
SEC("sk_lookup")
int inbound(struct bpf_sk_lookup *ctx)
{
	struct mesh_admitted_key key = { .netns_cookie = self_netns_cookie };
	__be32 *local = key.destination, *remote = key.source;

	if (ctx->protocol != IPPROTO_TCP)
		return SK_PASS;
	if (ctx->local_port == MESH_PORT_HBONE) {
		give(ctx, MESH_PORT_HBONE);
		return SK_PASS;
	}
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
	if (is_local(local) && is_local(remote)) {
		if (ctx->local_port == MESH_PORT_OUTBOUND)
			give(ctx, MESH_PORT_OUTBOUND);
		return SK_PASS;
	}
	key.destination_port = ctx->local_port;
	key.source_port = bpf_ntohs(ctx->remote_port);
	if (is_admitted(&key)) {
		count(MESH_ADMITTED_SYN);
		return SK_PASS;
	}
	if (takes_plaintext(ctx->local_port) && give(ctx, MESH_PORT_PLAINTEXT)) {
		count(MESH_PLAINTEXT_SYN);
		return SK_PASS;
	}
	count(MESH_DROPPED_SYN);
	return SK_DROP;
}
