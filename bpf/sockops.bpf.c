// SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-only
/*
 * sockops, of the app's sockets: files the original destination before the SYN leaves, for
 * sockops_proxy to take.
 */
#include "sock.h"

char LICENSE[] SEC("license") = "GPL";

/* A ring's records are in no map's type: this brings theirs into the BTF. */
const struct mesh_flow *unused_flow __attribute__((unused));

/*
 * The app's own end, as the key of `orig`. An AF_INET6 socket that speaks IPv4 has v4-mapped
 * addresses already.
 */
static __always_inline struct mesh_orig_key local_end(struct bpf_sock_ops *ctx)
{
	struct mesh_orig_key key = { .netns_cookie = bpf_get_netns_cookie(ctx) };

	if (ctx->family == AF_INET) {
		map_v4(key.addr, CTX_WORD(ctx, bpf_sock_ops, local_ip4));
	} else {
		key.addr[0] = CTX_WORD(ctx, bpf_sock_ops, local_ip6[0]);
		key.addr[1] = CTX_WORD(ctx, bpf_sock_ops, local_ip6[1]);
		key.addr[2] = CTX_WORD(ctx, bpf_sock_ops, local_ip6[2]);
		key.addr[3] = CTX_WORD(ctx, bpf_sock_ops, local_ip6[3]);
	}
	key.port = CTX_WORD(ctx, bpf_sock_ops, local_port);
	return key;
}

/*
 * Hook: about 17 calls in the life of each TCP socket of the workload's app cgroup; all but two
 * return at once. TCP_CONNECT_CB comes inside connect(), when the source port is chosen and the SYN
 * is not yet built. STATE_CB comes for every change of state of a socket that asked for it;
 * TCP_CLOSE is the last one, however the connection ended (RST, timeout, close in SYN_SENT,
 * SIGKILL, connect(AF_UNSPEC)), and the address and port are still in the socket then.
 * Kernel guarantees: the socket is locked or owned by the softirq; ctx->sk is a full socket in both
 * calls.
 * We rely on: the 4-tuple (source, 127.0.0.1:15001) being unique in its namespace, so that the
 * source names the connection.
 * On failure: the SYN goes out, the uProxy finds no original destination and refuses: closed.
 */
SEC("sockops")
int sockops_app(struct bpf_sock_ops *ctx)
{
	struct bpf_sock *sk = ctx->sk;
	struct mesh_orig_dst *dst;
	struct mesh_orig_key key;
	__u32 op = ctx->op;

	if (op != BPF_SOCK_OPS_TCP_CONNECT_CB &&
	    !(op == BPF_SOCK_OPS_STATE_CB && ctx->args[1] == BPF_TCP_CLOSE))
		return ALLOW;
	if (!sk)
		return ALLOW;
	dst = bpf_sk_storage_get(&captured, sk, NULL, 0);
	/* Left alone: its source port may be that of another connection, to the uProxy. */
	if (!dst)
		return ALLOW;
	key = local_end(ctx);
	if (op == BPF_SOCK_OPS_STATE_CB) {
		bpf_map_delete_elem(&orig, &key);
		return ALLOW;
	}
	bpf_sock_ops_cb_flags_set(ctx, ctx->bpf_sock_ops_cb_flags | BPF_SOCK_OPS_STATE_CB_FLAG);
	if (bpf_map_update_elem(&orig, &key, dst, BPF_ANY))
		count(MESH_ORIG_FULL);
	return ALLOW;
}
