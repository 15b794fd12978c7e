/* SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-only */
/* Addresses and ports of sockets, and what kind of place an address is. */
#ifndef UPROXY_SOCK_H
#define UPROXY_SOCK_H

#include <stddef.h>
#include <linux/bpf.h>
#include <linux/errno.h>
#include <linux/in.h>
#include <linux/in6.h>
#include <bpf/bpf_endian.h>
#include <bpf/bpf_helpers.h>

#include "maps.h"
#include "mesh.h"

#define AF_INET 2	/* <sys/socket.h> does not compile for this target */
#define AF_INET6 10

#define ALLOW 1		/* what a cgroup hook returns */
#define REFUSE 0

/*
 * clang merges a context field that is read in both arms of a branch into arithmetic on the context
 * pointer, which the verifier refuses; volatile does not stop it, an opaque load does.
 */
#define CTX_WORD(ctx, type, field)                                                                 \
	({                                                                                         \
		__u32 word_;                                                                       \
		asm volatile("%0 = *(u32 *)(%1 + %2)"                                              \
			     : "=r"(word_)                                                         \
			     : "r"(ctx), "i"(offsetof(struct type, field)));                       \
		word_;                                                                             \
	})

static __always_inline void map_v4(__be32 addr[4], __be32 ip4)
{
	addr[0] = 0;
	addr[1] = 0;
	addr[2] = bpf_htonl(0xffff);
	addr[3] = ip4;
}

static __always_inline int is_v4(const __be32 addr[4])
{
	return addr[0] == 0 && addr[1] == 0 && addr[2] == bpf_htonl(0xffff);
}

/*
 * 127/8 and ::1, and the unspecified addresses, which connect() turns into loopback or the socket's
 * own address.
 */
static __always_inline int is_loopback(const __be32 addr[4])
{
	if (is_v4(addr))
		return addr[3] == 0 || (addr[3] & bpf_htonl(0xff000000)) == bpf_htonl(0x7f000000);
	return addr[0] == 0 && addr[1] == 0 && addr[2] == 0 &&
	       (addr[3] == 0 || addr[3] == bpf_htonl(1));
}

static __always_inline int is_own(__u64 netns_cookie, const __be32 addr[4])
{
	struct mesh_own_key key = { .netns_cookie = netns_cookie };

	__builtin_memcpy(key.addr, addr, sizeof(key.addr));
	return bpf_map_lookup_elem(&own, &key) != NULL;
}

/* enum mesh_range_kind, or 0 outside all ranges. */
static __always_inline __u32 range_of(const __be32 addr[4])
{
	struct mesh_range_key key = { .prefix_bits = 128 };
	struct mesh_range *range;

	__builtin_memcpy(key.addr, addr, sizeof(key.addr));
	range = bpf_map_lookup_elem(&ranges, &key);
	return range ? range->kind : 0;
}

static __always_inline int maps_whole(void)
{
	__u32 zero = 0;
	struct mesh_settings *current = bpf_map_lookup_elem(&settings, &zero);

	return current && current->whole;
}

/* Whether only the mesh and what is excluded from it may be reached. */
static __always_inline int is_registry_only(void)
{
	__u32 zero = 0;
	struct mesh_settings *current = bpf_map_lookup_elem(&settings, &zero);

	return current && current->registry_only;
}

/*
 * The hook's return value that makes the system call fail with `error`. bpf_set_retval: Linux 6.1 in
 * connect, sendmsg, bind and sock_create.
 */
static __always_inline int refuse(__u32 counter, int error)
{
	count(counter);
	bpf_set_retval(-error);
	return REFUSE;
}

/* enum mesh_route of datagrams to a mesh address, or 0 when no service declares the port there. */
static __always_inline __u32 datagram_route(const __be32 addr[4], __u16 port)
{
	struct mesh_service_key key = { .port = port };
	struct mesh_service *service;

	__builtin_memcpy(key.addr, addr, sizeof(key.addr));
	service = bpf_map_lookup_elem(&datagrams, &key);
	return service ? service->route : 0;
}

/*
 * Whether the configuration lets a UDP socket send to a mesh address: a service declares the port
 * there, or the one that the socket answers from.
 */
static __always_inline int is_declared(struct bpf_sock_addr *ctx, __u64 netns_cookie,
				       const __be32 addr[4], __u16 port)
{
	struct mesh_answering_key from = { .netns_cookie = netns_cookie };
	__u32 route;

	if (ctx->protocol != IPPROTO_UDP || !maps_whole())
		return 0;
	route = datagram_route(addr, port);
	if (route)
		return route == MESH_ROUTE_PLAINTEXT;
	if (!ctx->sk)
		return 0;
	from.port = ctx->sk->src_port;
	return bpf_map_lookup_elem(&answering, &from) != NULL;
}

/*
 * Whether a datagram, or any protocol but TCP, may go to `addr`. There is no tunnel for datagrams:
 * into the mesh they go in plaintext, where that is declared, or not at all. EPERM, as from a
 * firewall: ECONNREFUSED would read as an answer of the peer.
 */
static __always_inline int datagram_verdict(struct bpf_sock_addr *ctx, __u64 netns_cookie,
					    const __be32 addr[4], __u16 port)
{
	__u32 range;

	if (is_loopback(addr) || is_own(netns_cookie, addr))
		return ALLOW;
	range = range_of(addr);
	if (range == MESH_RANGE_EXCLUDED)
		return ALLOW;
	if (range == MESH_RANGE_MESH) {
		if (is_declared(ctx, netns_cookie, addr, port))
			return ALLOW;
		return refuse(MESH_REFUSED_PROTOCOL, EPERM);
	}
	if (!maps_whole() && port != 53)	/* names may be looked up before that */
		return refuse(MESH_REFUSED_NOT_WHOLE, EPERM);
	if (is_registry_only())
		return refuse(MESH_REFUSED_EGRESS, EPERM);
	return ALLOW;
}

#endif
