// SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-only
/* cgroup/getsockopt: tells the uProxy where a captured connection, or query, was headed. */
#include "dns.h"

char LICENSE[] SEC("license") = "GPL";

#define SOL_IP 0
#define SOL_IPV6 41
#define SO_ORIGINAL_DST 80	/* <linux/netfilter_ipv4.h>; the same number for IPv6 */

#define barrier() asm volatile("" ::: "memory")

static __always_inline int answer(struct bpf_sockopt *ctx, __s32 size)
{
	/* clang 14 merges the two stores into one of 8 bytes, which the verifier refuses. */
	ctx->optlen = size;
	barrier();
	ctx->retval = 0;
	return ALLOW;
}

/* Whether a query may not go on to a nameserver: in the mesh, unless a service says so. */
static __always_inline int is_closed_to_queries(__u64 netns_cookie, const __be32 addr[4])
{
	return !is_loopback(addr) && !is_own(netns_cookie, addr) &&
	       range_of(addr) == MESH_RANGE_MESH &&
	       datagram_route(addr, PORT_53) != MESH_ROUTE_PLAINTEXT;
}

/*
 * Which nameserver is asked through a listening socket for name queries, in the same words; with the
 * route of tunnels where nothing else goes, so that no query does. Returns 0 when it is none of
 * these.
 */
static __always_inline int tell_nameserver(struct bpf_sockopt *ctx, struct bpf_sock *sk)
{
	struct mesh_orig_dst *dst = ctx->optval;
	__u64 netns_cookie = bpf_get_netns_cookie(ctx);
	int is_ipv4 = sk->family == AF_INET;
	struct mesh_nameserver *asked;
	struct sockaddr_in6 *in6;
	struct sockaddr_in *in;

	if (sk->protocol != IPPROTO_UDP || (void *)(dst + 1) > ctx->optval_end)
		return 0;
	asked = nameserver_at(netns_cookie, sk->src_port, is_ipv4);
	if (!asked)
		return 0;
	__builtin_memset(dst, 0, sizeof(*dst));
	if (is_ipv4) {
		in = (struct sockaddr_in *)dst->sockaddr;
		in->sin_family = AF_INET;
		in->sin_port = bpf_htons(PORT_53);
		in->sin_addr.s_addr = asked->addr[3];
	} else {
		in6 = (struct sockaddr_in6 *)dst->sockaddr;
		in6->sin6_family = AF_INET6;
		in6->sin6_port = bpf_htons(PORT_53);
		__builtin_memcpy(&in6->sin6_addr, asked->addr, sizeof(asked->addr));
	}
	dst->magic = MESH_ORIG_DST_MAGIC;
	dst->version = MESH_ORIG_DST_VERSION;
	if (is_closed_to_queries(netns_cookie, asked->addr))
		dst->route = MESH_ROUTE_TUNNEL;
	return 1;
}

/*
 * Hook: getsockopt() of any socket created in, or accepted from a listener created in, the
 * workload's proxy cgroup; in the caller's context, after the kernel has answered (here: ENOENT or
 * ENOPROTOOPT, unless nftables redirected the connection).
 * Kernel guarantees: optval..optval_end is the caller's buffer, at most a page, as long as the
 * caller said; optlen may only shrink; retval may only become 0; the return value must be 1, or the
 * call fails with EPERM.
 * We rely on: sock_ops having moved the original destination to this socket before accept()
 * returned it.
 * On failure: the kernel's own answer stands, and the uProxy refuses the connection.
 */
SEC("cgroup/getsockopt")
int getsockopt(struct bpf_sockopt *ctx)
{
	struct mesh_orig_dst *dst;
	void *optval = ctx->optval;
	void *end = ctx->optval_end;

	if (ctx->optname != SO_ORIGINAL_DST || (ctx->level != SOL_IP && ctx->level != SOL_IPV6))
		return ALLOW;
	if (!ctx->sk)
		return ALLOW;
	if (tell_nameserver(ctx, ctx->sk))
		return answer(ctx, sizeof(struct mesh_orig_dst));
	dst = bpf_sk_storage_get(&captured, ctx->sk, NULL, 0);
	if (!dst)
		return ALLOW;
	if (optval + sizeof(struct mesh_orig_dst) <= end) {
		*(struct mesh_orig_dst *)optval = *dst;
		return answer(ctx, sizeof(struct mesh_orig_dst));
	}
	/*
	 * Any other program gets what Linux has answered since 2.4: the sockaddr alone, in its
	 * family's length.
	 */
	if (((struct sockaddr_in *)dst->sockaddr)->sin_family == AF_INET) {
		if (optval + sizeof(struct sockaddr_in) > end)
			return ALLOW;
		*(struct sockaddr_in *)optval = *(struct sockaddr_in *)dst->sockaddr;
		return answer(ctx, sizeof(struct sockaddr_in));
	}
	if (optval + sizeof(struct sockaddr_in6) > end)
		return ALLOW;
	*(struct sockaddr_in6 *)optval = *(struct sockaddr_in6 *)dst->sockaddr;
	return answer(ctx, sizeof(struct sockaddr_in6));
}
