/* SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-only */
/* Name queries: to the uProxy, with the nameserver that was asked told by the port. */
#ifndef UPROXY_DNS_H
#define UPROXY_DNS_H

#include "sock.h"

#define PORT_53 53

static __always_inline int is_name_query(__u64 netns_cookie, __u32 protocol, __u16 port)
{
	return protocol == IPPROTO_UDP && port == PORT_53 &&
	       bpf_map_lookup_elem(&dns_captured, &netns_cookie) != NULL;
}

static __always_inline int is_same(const __be32 one[4], const __be32 other[4])
{
	return one[0] == other[0] && one[1] == other[1] && one[2] == other[2] && one[3] == other[3];
}

/*
 * The uProxy's port for queries to a nameserver: the one it has, else the next free one, else that of
 * the nameserver that nobody has asked for longest, if that is long. 0 when there is none. Ports are
 * taken in order and freed all at once, so the first free one ends the search.
 */
static __always_inline __u16 port_of_nameserver(__u64 netns_cookie, const __be32 addr[4])
{
	struct mesh_nameserver_key key = { .netns_cookie = netns_cookie };
	struct mesh_nameserver entry = { .used_ns = bpf_ktime_get_ns() };
	__u64 oldest_ns = entry.used_ns - MESH_NAMESERVER_IDLE_S * 1000000000ULL;
	__u16 first = is_v4(addr) ? 0 : MESH_NAMESERVERS;
	struct mesh_nameserver *found;
	int index, oldest = -1;

	__builtin_memcpy(entry.addr, addr, sizeof(entry.addr));
	for (index = 0; index < MESH_NAMESERVERS; index++) {
		key.slot = first + index;
		found = bpf_map_lookup_elem(&nameservers, &key);
		if (!found && !bpf_map_update_elem(&nameservers, &key, &entry, BPF_NOEXIST))
			return MESH_PORT_DNS + index;
		if (!found)	/* another CPU was quicker */
			found = bpf_map_lookup_elem(&nameservers, &key);
		if (!found)
			return 0;
		if (is_same(found->addr, addr)) {
			found->used_ns = entry.used_ns;
			return MESH_PORT_DNS + index;
		}
		if ((__s64)(found->used_ns - oldest_ns) < 0) {
			oldest_ns = found->used_ns;
			oldest = index;
		}
	}
	if (oldest < 0)
		return 0;
	key.slot = first + oldest;
	if (bpf_map_update_elem(&nameservers, &key, &entry, BPF_EXIST))
		return 0;
	return MESH_PORT_DNS + oldest;
}

/* Whom the app asked through a port of its uProxy; NULL for any other port. */
static __always_inline struct mesh_nameserver *nameserver_at(__u64 netns_cookie, __u16 port,
							     int is_ipv4)
{
	struct mesh_nameserver_key key = { .netns_cookie = netns_cookie };

	if (port < MESH_PORT_DNS || port >= MESH_PORT_DNS + MESH_NAMESERVERS)
		return NULL;
	key.slot = port - MESH_PORT_DNS + (is_ipv4 ? 0 : MESH_NAMESERVERS);
	return bpf_map_lookup_elem(&nameservers, &key);
}

#endif
