// SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-only
/* cgroup/sendmsg4, sendmsg6: no datagram to a mesh address. */
#include "sock.h"

char LICENSE[] SEC("license") = "GPL";

/*
 * Hook: sendto() and sendmsg() with an address, on a UDP socket of the workload's app cgroup. A
 * connected socket passes connect4/6 instead.
 * Kernel guarantees: user_ip4, user_ip6, user_port in network order. A v4-mapped address on an
 * AF_INET6 socket comes to sendmsg4.
 * We rely on: bpf_get_netns_cookie being the socket's namespace.
 * On failure: closed, EPERM.
 */
SEC("cgroup/sendmsg4")
int sendmsg4(struct bpf_sock_addr *ctx)
{
	__be32 addr[4];

	map_v4(addr, ctx->user_ip4);
	return datagram_verdict(bpf_get_netns_cookie(ctx), addr, bpf_ntohs(ctx->user_port));
}

/* As sendmsg4. */
SEC("cgroup/sendmsg6")
int sendmsg6(struct bpf_sock_addr *ctx)
{
	__be32 addr[4];

	addr[0] = ctx->user_ip6[0];
	addr[1] = ctx->user_ip6[1];
	addr[2] = ctx->user_ip6[2];
	addr[3] = ctx->user_ip6[3];
	return datagram_verdict(bpf_get_netns_cookie(ctx), addr, bpf_ntohs(ctx->user_port));
}
