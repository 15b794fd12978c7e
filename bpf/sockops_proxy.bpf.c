// SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-only
/*
 * sockops, of the uProxy's sockets: its listeners make themselves known, and what it accepts is
 * given its original destination.
 */
#include "sockops.h"

char LICENSE[] SEC("license") = "GPL";

/* The app's end of a captured connection, as the uProxy sees it. */
static __always_inline struct mesh_orig_key remote_end(struct bpf_sock_ops *ctx)
{
	struct mesh_orig_key key = { .netns_cookie = bpf_get_netns_cookie(ctx) };

	remote_address(ctx, key.addr);
	key.port = remote_port(ctx);
	return key;
}

static __always_inline void take_original_destination(struct bpf_sock_ops *ctx, struct bpf_sock *sk)
{
	struct mesh_orig_key key = remote_end(ctx);
	struct mesh_orig_dst *dst = bpf_map_lookup_elem(&orig, &key);

	if (!dst) {
		count(MESH_ORIG_MISSING);
		return;
	}
	if (!bpf_sk_storage_get(&captured, sk, dst, BPF_SK_STORAGE_GET_F_CREATE))
		count(MESH_REFUSED_NO_MEMORY);
	bpf_map_delete_elem(&orig, &key);
}

/*
 * The newest listener of a port and family takes the place of an older one. The kernel takes it out
 * again when it is closed, by whatever.
 */
static __always_inline void announce(struct bpf_sock_ops *ctx)
{
	struct mesh_listener_key key = {
		.netns_cookie = bpf_get_netns_cookie(ctx),
		.port = ctx->local_port,
		.family = ctx->family,
	};

	if (bpf_sock_hash_update(ctx, &listeners, &key, BPF_ANY))
		count(MESH_LISTENERS_FULL);
}

/*
 * Hook: about 17 calls in the life of each TCP socket that was created in the workload's proxy
 * cgroup, or accepted from a listener that was; all but two return at once. TCP_LISTEN_CB comes
 * inside listen(), when the socket listens already. PASSIVE_ESTABLISHED_CB comes when the
 * handshake's last ACK makes the socket, before accept() can return it; with SYN cookies and fast
 * open too.
 * Kernel guarantees: ctx->sk is a full socket in both calls, an accepted one in its listener's
 * namespace and cgroup.
 * We rely on: the app's TCP_CONNECT_CB having run before its SYN.
 * On failure: without an original destination the uProxy refuses; a listener that is not known gets
 * what the kernel's own look-up gives it, and no plaintext. Closed.
 */
SEC("sockops")
int sockops_proxy(struct bpf_sock_ops *ctx)
{
	struct bpf_sock *sk = ctx->sk;
	__u32 port = ctx->local_port;

	if (!sk)
		return ALLOW;
	if (ctx->op == BPF_SOCK_OPS_TCP_LISTEN_CB) {
		if (port == MESH_PORT_OUTBOUND || port == MESH_PORT_PLAINTEXT || port == MESH_PORT_HBONE)
			announce(ctx);
	} else if (ctx->op == BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB) {
		if (port == MESH_PORT_OUTBOUND)
			take_original_destination(ctx, sk);
	}
	return ALLOW;
}
