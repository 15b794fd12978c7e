// SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-only
/*
 * cgroup/getpeername4, getpeername6: an app sees the address that it dialled, not the uProxy's nor
 * that of the backend that was chosen.
 */
#include "sock.h"

char LICENSE[] SEC("license") = "GPL";

/*
 * Hook: getpeername() of a connected socket of the workload's app cgroup, after the kernel has
 * filled in 127.0.0.1:15001, [::1]:15001 or the backend of a direct connection.
 * Kernel guarantees: user_ip4, user_ip6, user_port readable and writable in network order; the
 * return value must be 1. An unconnected socket fails with ENOTCONN before the hook.
 * We rely on: connect having removed what an earlier connection left on the socket.
 * On failure: open, the app sees the address that the kernel has.
 */
SEC("cgroup/getpeername4")
int getpeername4(struct bpf_sock_addr *ctx)
{
	struct mesh_orig_dst *dst = bpf_sk_storage_get(&captured, ctx->sk, NULL, 0);
	struct mesh_direct *connection;
	struct sockaddr_in *in;

	if (!dst) {
		connection = bpf_sk_storage_get(&direct, ctx->sk, NULL, 0);
		if (connection) {
			ctx->user_ip4 = connection->dialled[3];
			ctx->user_port = bpf_htons(connection->dialled_port);
		}
		return ALLOW;
	}
	in = (struct sockaddr_in *)dst->sockaddr;
	if (in->sin_family != AF_INET)
		return ALLOW;
	ctx->user_ip4 = in->sin_addr.s_addr;
	ctx->user_port = in->sin_port;
	return ALLOW;
}

/*
 * As getpeername4. What was dialled as ::ffff:1.2.3.4 is remembered as sockaddr_in and shown as it
 * was dialled.
 */
SEC("cgroup/getpeername6")
int getpeername6(struct bpf_sock_addr *ctx)
{
	struct mesh_orig_dst *dst = bpf_sk_storage_get(&captured, ctx->sk, NULL, 0);
	struct mesh_direct *connection;
	struct sockaddr_in6 *in6;
	struct sockaddr_in *in;
	__be32 addr[4];
	__be16 port;

	if (dst) {
		in = (struct sockaddr_in *)dst->sockaddr;
		in6 = (struct sockaddr_in6 *)dst->sockaddr;
		if (in->sin_family == AF_INET)
			map_v4(addr, in->sin_addr.s_addr);
		else
			__builtin_memcpy(addr, &in6->sin6_addr, sizeof(addr));
		port = in->sin_port;
	} else {
		connection = bpf_sk_storage_get(&direct, ctx->sk, NULL, 0);
		if (!connection)
			return ALLOW;
		__builtin_memcpy(addr, connection->dialled, sizeof(addr));
		port = bpf_htons(connection->dialled_port);
	}
	ctx->user_ip6[0] = addr[0];
	ctx->user_ip6[1] = addr[1];
	ctx->user_ip6[2] = addr[2];
	ctx->user_ip6[3] = addr[3];
	ctx->user_port = port;
	return ALLOW;
}
