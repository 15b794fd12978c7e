// SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-only
/* cgroup/sendmsg4, sendmsg6: datagrams to mesh addresses only where declared; name queries go to the uProxy. */
#include "dns.h"

char LICENSE[] SEC("license") = "GPL";

/* Returns ALLOW or REFUSE; sets *uproxy_port when the datagram has to go to the uProxy. */
static __always_inline int decide(struct bpf_sock_addr *ctx, const __be32 addr[4], __u16 *uproxy_port)
{
	__u64 netns_cookie = bpf_get_netns_cookie(ctx);
	__u16 port = bpf_ntohs(ctx->user_port);

	*uproxy_port = 0;
	if (!is_name_query(netns_cookie, ctx->protocol, port))
		return datagram_verdict(ctx, netns_cookie, addr, port);
	/* A socket bound to a device does not reach 127.0.0.1, and it cannot be unbound here. */
	if (!ctx->sk || ctx->sk->bound_dev_if)
		return refuse(MESH_REFUSED_PROTOCOL, EPERM);
	*uproxy_port = port_of_nameserver(netns_cookie, addr);
	if (!*uproxy_port)
		return refuse(MESH_REFUSED_NAMESERVERS, EPERM);
	count(MESH_DNS_CAPTURED);
	return ALLOW;
}

/*
 * Hook: sendto() and sendmsg() with an address, on a UDP socket of the workload's app cgroup. A
 * connected socket passes connect4/6 instead.
 * Kernel guarantees: user_ip4, user_ip6, user_port in network order, writable as 32-bit words; the
 * route is looked up afterwards. A v4-mapped address on an AF_INET6 socket comes to sendmsg4.
 * We rely on: bpf_get_netns_cookie being the socket's namespace; recvmsg showing the nameserver.
 * On failure: closed, EPERM.
 */
SEC("cgroup/sendmsg4")
int sendmsg4(struct bpf_sock_addr *ctx)
{
	__u16 uproxy_port;
	__be32 addr[4];
	int verdict;

	map_v4(addr, ctx->user_ip4);
	verdict = decide(ctx, addr, &uproxy_port);
	if (uproxy_port) {
		ctx->user_ip4 = bpf_htonl(0x7f000001);
		ctx->user_port = bpf_htons(uproxy_port);
	}
	return verdict;
}

/* As sendmsg4. */
SEC("cgroup/sendmsg6")
int sendmsg6(struct bpf_sock_addr *ctx)
{
	__u16 uproxy_port;
	__be32 addr[4];
	int verdict;

	addr[0] = ctx->user_ip6[0];
	addr[1] = ctx->user_ip6[1];
	addr[2] = ctx->user_ip6[2];
	addr[3] = ctx->user_ip6[3];
	verdict = decide(ctx, addr, &uproxy_port);
	if (uproxy_port) {
		ctx->user_ip6[0] = 0;
		ctx->user_ip6[1] = 0;
		ctx->user_ip6[2] = 0;
		ctx->user_ip6[3] = bpf_htonl(1);
		ctx->user_port = bpf_htons(uproxy_port);
	}
	return verdict;
}
