/* SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-only */
/* What connect and sock_ops both ask of a grant. */
#ifndef UPROXY_DIRECT_H
#define UPROXY_DIRECT_H

#include "sock.h"

static __always_inline struct mesh_grant *grant_of(__u64 source_cgroup, const __be32 addr[4],
						   __u16 port)
{
	struct mesh_grant_key key = { .source_cgroup = source_cgroup, .port = port };

	__builtin_memcpy(key.addr, addr, sizeof(key.addr));
	return bpf_map_lookup_elem(&grants, &key);
}

static __always_inline int holds(const struct mesh_grant *grant)
{
	return grant && !grant->suspended_ns && grant->expiry_ns > bpf_ktime_get_ns();
}

#endif
