// SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-only
/* sockops, of whoever probes workloads' health: admits what it dials, at ports declared for it. */
#include "sockops.h"

char LICENSE[] SEC("license") = "GPL";

static __always_inline void admit(struct bpf_sock_ops *ctx, struct bpf_sock *sk)
{
	struct mesh_admitted value = { .kind = MESH_ADMISSION_PROBE };
	struct mesh_admitted_key key = dialled_tuple(ctx, 0); /* whose is told by the map */
	struct mesh_probe_key target = { .port = key.destination_port };
	struct mesh_probe *probe;

	__builtin_memcpy(target.addr, key.destination, sizeof(target.addr));
	probe = bpf_map_lookup_elem(&probe_ports, &target);
	if (!probe)
		return;
	key.netns_cookie = probe->netns_cookie;
	value.since_ns = bpf_ktime_get_ns();
	/* Whatever is admitted is remembered before, so that it is taken out again. */
	bpf_sock_ops_cb_flags_set(ctx, ctx->bpf_sock_ops_cb_flags | BPF_SOCK_OPS_STATE_CB_FLAG);
	if (!bpf_sk_storage_get(&probing, sk, &key, BPF_SK_STORAGE_GET_F_CREATE) ||
	    bpf_map_update_elem(&admitted, &key, &value, BPF_ANY))
		count(MESH_PROBE_UNADMITTED);
}

/*
 * Hook: as sockops_app, for sockets created in a cgroup of probers or below it.
 * Kernel guarantees: at TCP_CONNECT_CB both ends are chosen, and the SYN is not built yet.
 * We rely on: an address being one workload's on this node, and nobody translating addresses
 * between a prober and a workload of the same host.
 * On failure: closed, the SYN is dropped like any other.
 */
SEC("sockops")
int sockops_probe(struct bpf_sock_ops *ctx)
{
	struct bpf_sock *sk = ctx->sk;
	struct mesh_admitted_key *key;

	if (!sk)
		return ALLOW;
	if (ctx->op == BPF_SOCK_OPS_TCP_CONNECT_CB) {
		admit(ctx, sk);
	} else if (ctx->op == BPF_SOCK_OPS_STATE_CB && ctx->args[1] == BPF_TCP_CLOSE) {
		key = bpf_sk_storage_get(&probing, sk, NULL, 0);
		if (key) {
			bpf_map_delete_elem(&admitted, key);
			bpf_sk_storage_delete(&probing, sk);
		}
	}
	return ALLOW;
}
