// SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-only
/* cgroup/recvmsg4, recvmsg6: an answer comes from the nameserver that was asked. */
#include "dns.h"

char LICENSE[] SEC("license") = "GPL";

/*
 * Hook: recvfrom() and recvmsg() on a UDP socket of the workload's app cgroup, when the caller wants
 * to know the sender; after the datagram has been taken from the socket.
 * Kernel guarantees: user_ip4, user_ip6, user_port in network order, writable; the return value must
 * be 1.
 * We rely on: no other socket than the uProxy's having one of its ports, which bind denies to apps.
 * On failure: open, the app sees the uProxy's address, and a resolver drops the answer.
 */
SEC("cgroup/recvmsg4")
int recvmsg4(struct bpf_sock_addr *ctx)
{
	struct mesh_nameserver *asked;

	if (ctx->user_ip4 != bpf_htonl(0x7f000001))
		return ALLOW;
	asked = nameserver_at(bpf_get_netns_cookie(ctx), bpf_ntohs(ctx->user_port), 1);
	if (!asked)
		return ALLOW;
	asked->used_ns = bpf_ktime_get_ns();
	ctx->user_ip4 = asked->addr[3];
	ctx->user_port = bpf_htons(PORT_53);
	return ALLOW;
}

/* As recvmsg4; an AF_INET6 socket that asked over IPv4 has it v4-mapped. */
SEC("cgroup/recvmsg6")
int recvmsg6(struct bpf_sock_addr *ctx)
{
	struct mesh_nameserver *asked;
	__be32 addr[4];
	int is_ipv4;

	addr[0] = ctx->user_ip6[0];
	addr[1] = ctx->user_ip6[1];
	addr[2] = ctx->user_ip6[2];
	addr[3] = ctx->user_ip6[3];
	is_ipv4 = is_v4(addr);
	if (addr[3] != bpf_htonl(is_ipv4 ? 0x7f000001 : 1) || !is_loopback(addr))
		return ALLOW;
	asked = nameserver_at(bpf_get_netns_cookie(ctx), bpf_ntohs(ctx->user_port), is_ipv4);
	if (!asked)
		return ALLOW;
	asked->used_ns = bpf_ktime_get_ns();
	ctx->user_ip6[0] = asked->addr[0];
	ctx->user_ip6[1] = asked->addr[1];
	ctx->user_ip6[2] = asked->addr[2];
	ctx->user_ip6[3] = asked->addr[3];
	ctx->user_port = bpf_htons(PORT_53);
	return ALLOW;
}
