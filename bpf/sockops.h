/* SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-only */
/*
 * Both ends of a socket, as sock_ops has them: local_port in host order, remote_port in network order.
 * An AF_INET6 socket that speaks IPv4 has v4-mapped addresses already.
 */
#ifndef UPROXY_SOCKOPS_H
#define UPROXY_SOCKOPS_H

#include "sock.h"

static __always_inline void local_address(struct bpf_sock_ops *ctx, __be32 addr[4])
{
	if (ctx->family == AF_INET) {
		map_v4(addr, CTX_WORD(ctx, bpf_sock_ops, local_ip4));
		return;
	}
	addr[0] = CTX_WORD(ctx, bpf_sock_ops, local_ip6[0]);
	addr[1] = CTX_WORD(ctx, bpf_sock_ops, local_ip6[1]);
	addr[2] = CTX_WORD(ctx, bpf_sock_ops, local_ip6[2]);
	addr[3] = CTX_WORD(ctx, bpf_sock_ops, local_ip6[3]);
}

static __always_inline void remote_address(struct bpf_sock_ops *ctx, __be32 addr[4])
{
	if (ctx->family == AF_INET) {
		map_v4(addr, CTX_WORD(ctx, bpf_sock_ops, remote_ip4));
		return;
	}
	addr[0] = CTX_WORD(ctx, bpf_sock_ops, remote_ip6[0]);
	addr[1] = CTX_WORD(ctx, bpf_sock_ops, remote_ip6[1]);
	addr[2] = CTX_WORD(ctx, bpf_sock_ops, remote_ip6[2]);
	addr[3] = CTX_WORD(ctx, bpf_sock_ops, remote_ip6[3]);
}

static __always_inline __u16 remote_port(struct bpf_sock_ops *ctx)
{
	return bpf_ntohl(CTX_WORD(ctx, bpf_sock_ops, remote_port));
}

/* A connection as it is on the wire, from the client's side, as the key of `admitted`. */
static __always_inline struct mesh_admitted_key dialled_tuple(struct bpf_sock_ops *ctx,
							      __u64 target_netns)
{
	struct mesh_admitted_key key = { .netns_cookie = target_netns };

	local_address(ctx, key.source);
	remote_address(ctx, key.destination);
	key.source_port = CTX_WORD(ctx, bpf_sock_ops, local_port);
	key.destination_port = remote_port(ctx);
	return key;
}

#endif
