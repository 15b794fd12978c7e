// SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-only
/*
 * sockops, of the app's sockets: files the original destination before the SYN leaves, for
 * sockops_proxy to take; lets direct connections in at their destination, and records them when they
 * close.
 */
#include "direct.h"
#include "sockops.h"

char LICENSE[] SEC("license") = "GPL";

/* A ring's records are in no map's type: this brings theirs into the BTF. */
const struct mesh_flow *unused_flow __attribute__((unused));

/* The app's own end, as the key of `orig`. */
static __always_inline struct mesh_orig_key local_end(struct bpf_sock_ops *ctx)
{
	struct mesh_orig_key key = { .netns_cookie = bpf_get_netns_cookie(ctx) };

	local_address(ctx, key.addr);
	key.port = CTX_WORD(ctx, bpf_sock_ops, local_port);
	return key;
}

/* An accepted connection, as its client dialled it. */
static __always_inline struct mesh_admitted_key accepted_tuple(struct bpf_sock_ops *ctx)
{
	struct mesh_admitted_key seen = dialled_tuple(ctx, bpf_get_netns_cookie(ctx));
	struct mesh_admitted_key key = seen;

	__builtin_memcpy(key.source, seen.destination, sizeof(key.source));
	__builtin_memcpy(key.destination, seen.source, sizeof(key.destination));
	key.source_port = seen.destination_port;
	key.destination_port = seen.source_port;
	return key;
}

static __always_inline int is_equal(const __be32 one[4], const __be32 other[4])
{
	return one[0] == other[0] && one[1] == other[1] && one[2] == other[2] && one[3] == other[3];
}

/*
 * Whether the SYN of a direct connection may come in at its destination. The grant may have ended
 * since connect() chose, by a little or, with TCP_FASTOPEN_CONNECT, by a lot; another program may
 * have changed the destination; and the source may be an address that is not the workload's.
 */
static __always_inline int admit(struct bpf_sock_ops *ctx, const struct mesh_direct *connection)
{
	struct mesh_admitted_key key = dialled_tuple(ctx, connection->target_netns);
	struct mesh_admitted value = { .since_ns = connection->opened_ns,
				       .kind = MESH_ADMISSION_DIRECT };
	struct mesh_grant *grant;

	if (!is_equal(key.destination, connection->target) ||
	    key.destination_port != connection->target_port)
		return 0;
	grant = grant_of(connection->source_cgroup, connection->target, connection->target_port);
	if (!holds(grant) || grant->target_netns != connection->target_netns)
		return 0;
	if (!is_own(bpf_get_netns_cookie(ctx), key.source))
		return 0;
	return bpf_map_update_elem(&admitted, &key, &value, BPF_ANY) == 0;
}

/*
 * bytes_acked counts our SYN and our FIN, bytes_received the peer's FIN. Which of them there were
 * follows from the last state. In FIN_WAIT2 the peer's FIN has come if anything has: whoever closes
 * there without reading on may be told a byte too few.
 */
static __always_inline void record(struct bpf_sock_ops *ctx, const struct mesh_direct *connection,
				   __u32 last_state)
{
	__u64 sent = ctx->bytes_acked, received = ctx->bytes_received;
	struct mesh_admitted_key key = dialled_tuple(ctx, connection->target_netns);
	struct mesh_flow *flow = bpf_ringbuf_reserve(&flows, sizeof(*flow), 0);

	if (!flow) {
		count(MESH_FLOWS_LOST);
		return;
	}
	flow->end = MESH_FLOW_RESET;
	switch (last_state) {
	case BPF_TCP_SYN_SENT:
		flow->end = MESH_FLOW_FAILED;
		break;
	case BPF_TCP_FIN_WAIT2:
		received -= received != connection->received_at_fin;
		break;
	case BPF_TCP_CLOSE_WAIT:
	case BPF_TCP_CLOSING:
	case BPF_TCP_LAST_ACK:
		received -= 1;
		break;
	}
	if (last_state == BPF_TCP_FIN_WAIT2 || last_state == BPF_TCP_CLOSING ||
	    last_state == BPF_TCP_LAST_ACK) {
		if (ctx->snd_una == ctx->snd_nxt) {
			flow->end = MESH_FLOW_CLOSED;
			sent -= 1;
		}
	}
	if (flow->end != MESH_FLOW_FAILED)
		sent -= 1;
	flow->sent = sent;
	flow->received = received;
	flow->source_cgroup = connection->source_cgroup;
	flow->source_netns = bpf_get_netns_cookie(ctx);
	flow->target_netns = connection->target_netns;
	flow->opened_ns = connection->opened_ns;
	flow->closed_ns = bpf_ktime_get_ns();
	__builtin_memcpy(flow->source, key.source, sizeof(key.source));
	__builtin_memcpy(flow->target, connection->target, sizeof(flow->target));
	__builtin_memcpy(flow->dialled, connection->dialled, sizeof(flow->dialled));
	flow->service_id = connection->service_id;
	flow->source_id = connection->source_id;
	flow->target_id = connection->target_id;
	flow->srtt_us = ctx->srtt_us >> 3;
	flow->retransmits = ctx->total_retrans;
	flow->source_port = key.source_port;
	flow->target_port = connection->target_port;
	flow->dialled_port = connection->dialled_port;
	flow->pad = 0;
	bpf_ringbuf_submit(flow, BPF_RB_NO_WAKEUP);
}

/* A native connect has no second backend to try: after a failure the tunnel, which has, is used. */
static __always_inline void suspend(const struct mesh_direct *connection)
{
	struct mesh_grant *grant = grant_of(connection->source_cgroup, connection->target,
					    connection->target_port);

	count(MESH_DIRECT_FAILED);
	if (grant)
		grant->suspended_ns = bpf_ktime_get_ns();
}

/* A direct connection that has closed. opened_ns is 0 from then on: it is closed only once. */
static __always_inline void finish(struct bpf_sock_ops *ctx, struct mesh_direct *connection)
{
	struct mesh_admitted_key key = dialled_tuple(ctx, connection->target_netns);
	__u32 last_state = ctx->args[0];

	if (!connection->opened_ns)
		return;
	bpf_map_delete_elem(&admitted, &key);
	if (last_state == BPF_TCP_SYN_SENT)
		suspend(connection);
	record(ctx, connection, last_state);
	connection->opened_ns = 0;
}

/*
 * Hook: about 17 calls in the life of each TCP socket of the workload's app cgroup; all but a few
 * return at once. TCP_CONNECT_CB comes inside connect(), when the source port is chosen and the SYN
 * is not yet built. STATE_CB comes for every change of state of a socket that asked for it;
 * TCP_CLOSE is the last one, however the connection ended (RST, timeout, close in SYN_SENT,
 * SIGKILL, connect(AF_UNSPEC)), and the address and port are still in the socket then.
 * PASSIVE_ESTABLISHED_CB comes on the server's side, when no SYN and no cookie of that connection
 * will ask sk_lookup again.
 * Kernel guarantees: the socket is locked or owned by the softirq; ctx->sk is a full socket in all
 * these calls.
 * We rely on: the 4-tuple (source, 127.0.0.1:15001) being unique in its namespace, so that the
 * source names the connection; connect having removed what an earlier connection left.
 * On failure: the SYN goes out, the uProxy finds no original destination, or the destination's
 * sk_lookup no admission, and refuses: closed.
 */
SEC("sockops")
int sockops_app(struct bpf_sock_ops *ctx)
{
	struct mesh_admitted_key accepted;
	struct mesh_direct *connection;
	struct bpf_sock *sk = ctx->sk;
	struct mesh_orig_dst *dst;
	struct mesh_orig_key key;
	__u32 op = ctx->op;

	if (op != BPF_SOCK_OPS_TCP_CONNECT_CB && op != BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB &&
	    !(op == BPF_SOCK_OPS_STATE_CB &&
	      (ctx->args[1] == BPF_TCP_CLOSE || ctx->args[1] == BPF_TCP_FIN_WAIT2)))
		return ALLOW;
	if (!sk)
		return ALLOW;
	if (op == BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB) {
		accepted = accepted_tuple(ctx);
		if (!is_loopback(accepted.source))
			bpf_map_delete_elem(&admitted, &accepted);
		return ALLOW;
	}
	dst = bpf_sk_storage_get(&captured, sk, NULL, 0);
	if (dst) {
		if (op == BPF_SOCK_OPS_STATE_CB && ctx->args[1] == BPF_TCP_FIN_WAIT2)
			return ALLOW;
		key = local_end(ctx);
		if (op == BPF_SOCK_OPS_STATE_CB) {
			bpf_map_delete_elem(&orig, &key);
			return ALLOW;
		}
		bpf_sock_ops_cb_flags_set(ctx,
					  ctx->bpf_sock_ops_cb_flags | BPF_SOCK_OPS_STATE_CB_FLAG);
		if (bpf_map_update_elem(&orig, &key, dst, BPF_ANY))
			count(MESH_ORIG_FULL);
		return ALLOW;
	}
	connection = bpf_sk_storage_get(&direct, sk, NULL, 0);
	/* Left alone: its source port may be that of another connection, to the uProxy. */
	if (!connection)
		return ALLOW;
	if (op == BPF_SOCK_OPS_STATE_CB) {
		if (ctx->args[1] == BPF_TCP_FIN_WAIT2)
			connection->received_at_fin = ctx->bytes_received;
		else
			finish(ctx, connection);
		return ALLOW;
	}
	bpf_sock_ops_cb_flags_set(ctx, ctx->bpf_sock_ops_cb_flags | BPF_SOCK_OPS_STATE_CB_FLAG);
	connection->opened_ns = bpf_ktime_get_ns();
	if (!admit(ctx, connection))
		count(MESH_DIRECT_UNADMITTED);
	return ALLOW;
}
