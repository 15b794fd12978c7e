// SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-only
/* cgroup/setsockopt: takes from the uProxy which ports of its workload are open to plaintext. */
#include "sock.h"

char LICENSE[] SEC("license") = "GPL";

/*
 * Hook: setsockopt() of any socket created in, or accepted from a listener created in, the
 * workload's proxy cgroup; in the caller's context, before the kernel looks at the option. An app's
 * sockets are created in another cgroup, so that no app can say it.
 * Kernel guarantees: optval..optval_end is what the caller gave, up to a page; optlen -1 makes the
 * call succeed without the kernel's own handling; the return value must be 1, or the call fails.
 * We rely on: level and option being nobody else's, so that the kernel answers ENOPROTOOPT where
 * this program is not.
 * On failure: closed, the call fails and no port of the workload is open to plaintext.
 */
SEC("cgroup/setsockopt")
int setsockopt(struct bpf_sockopt *ctx)
{
	struct mesh_plaintext *ports = ctx->optval;
	void *end = ctx->optval_end;
	__u64 netns_cookie;

	if (ctx->level != MESH_SOL || ctx->optname != MESH_SO_PLAINTEXT)
		return ALLOW;
	netns_cookie = bpf_get_netns_cookie(ctx);
	if ((void *)(ports + 1) > end || ports->count > MESH_PLAINTEXT_PORTS) {
		bpf_map_delete_elem(&plaintext, &netns_cookie);
		return ALLOW;	/* ENOPROTOOPT, from the kernel */
	}
	/* A new value, never the old one changed in place: sk_lookup sees one or the other. */
	if (bpf_map_update_elem(&plaintext, &netns_cookie, ports, BPF_ANY)) {
		bpf_map_delete_elem(&plaintext, &netns_cookie);
		return ALLOW;
	}
	ctx->optlen = -1;
	return ALLOW;
}
