/* SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-only */
/*
 * Every map, shared by all programs and all workloads of a node. The agent makes them, pins them
 * and gives the same ones to every object. None holds an identity: that is the certificate's
 * business.
 */
#ifndef UPROXY_MAPS_H
#define UPROXY_MAPS_H

#include <linux/bpf.h>
#include <bpf/bpf_helpers.h>

#include "mesh.h"

/*
 * Written by the agent before any cgroup is attached; read by connect and sendmsg. Longest prefix
 * wins.
 */
struct {
	__uint(type, BPF_MAP_TYPE_LPM_TRIE);
	__uint(max_entries, 1024);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, struct mesh_range_key);
	__type(value, struct mesh_range);
} ranges SEC(".maps");

/*
 * Written by the agent's sync; read by connect. Not preallocated: an entry is replaced as a whole,
 * readers see the old or the new one.
 */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 131072);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, struct mesh_service_key);
	__type(value, struct mesh_service);
} services SEC(".maps");

/* Likewise, for connections to a workload's own address, at any port. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 262144);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, struct mesh_workload_key);
	__type(value, struct mesh_workload);
} workloads SEC(".maps");

/*
 * Where datagrams may go in the mesh, in plaintext: virtual addresses and workloads' own, each with
 * a port that a service declares so. Written by the agent's sync; read by connect and sendmsg.
 */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 65536);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, struct mesh_service_key);
	__type(value, struct mesh_service);
} datagrams SEC(".maps");

/* Likewise, from which ports of this host's workloads they are answered. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 65536);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, struct mesh_answering_key);
	__type(value, __u32);
} answering SEC(".maps");

/*
 * Written by the agent when a workload registers, removed when it goes; read by connect, sendmsg
 * and sk_lookup.
 */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 16384);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, struct mesh_own_key);
	__type(value, struct mesh_own);
} own SEC(".maps");

/* One entry, written by the agent; read by connect and sendmsg. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct mesh_settings);
} settings SEC(".maps");

/*
 * Where a socket was dialled. connect writes it on the app's socket, sock_ops on the uProxy's
 * accepted one; getpeername, sock_ops and getsockopt read it. Dies with its socket; on the app's
 * side with the next connect() too, so that no reconnect inherits it.
 */
struct {
	__uint(type, BPF_MAP_TYPE_SK_STORAGE);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, int);
	__type(value, struct mesh_orig_dst);
} captured SEC(".maps");

/*
 * The way from the app's socket to the accepted one. Written by sock_ops before the SYN leaves,
 * moved at the accept, deleted at the latest when the app's socket closes. Full means refused,
 * never evicted: see MESH_ORIG_FULL.
 */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 65536);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, struct mesh_orig_key);
	__type(value, struct mesh_orig_dst);
} orig SEC(".maps");

/*
 * Connections that sk_lookup lets through. Written by sock_ops on the client's side before the SYN
 * leaves, deleted when the client's socket closes; holds for MESH_ADMITTED_S even if nobody deletes
 * it. Not one-shot: sk_lookup runs for every retransmission, and for the ACK of a SYN cookie. Full
 * means refused, never evicted.
 */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 65536);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, struct mesh_admitted_key);
	__type(value, struct mesh_admitted);
} admitted SEC(".maps");

/*
 * Who may dial what directly: written by the agent, which deletes or replaces entries at once when
 * they no longer hold; sock_ops suspends one whose connection failed. Full means tunnelled.
 */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 65536);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, struct mesh_grant_key);
	__type(value, struct mesh_grant);
} grants SEC(".maps");

/*
 * Which services a caller may dial directly, and their backends. Written by the agent: first the
 * backends of a free range, then the one entry that names it, so that readers see the old or the new
 * ones; a range that was let go is not written again for a second.
 */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 16384);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, struct mesh_direct_key);
	__type(value, struct mesh_direct_service);
} direct_services SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 65536);
	__uint(map_flags, BPF_F_MMAPABLE);
	__type(key, __u32);
	__type(value, struct mesh_backend);
} backends SEC(".maps");

/* Written by connect on the socket of a direct connection; goes as `captured` does. */
struct {
	__uint(type, BPF_MAP_TYPE_SK_STORAGE);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, int);
	__type(value, struct mesh_direct);
} direct SEC(".maps");

/*
 * struct mesh_flow of each direct connection that has closed. The agent drains it by a timer and is
 * never woken; what does not fit is counted.
 */
struct {
	__uint(type, BPF_MAP_TYPE_RINGBUF);
	__uint(max_entries, 1 << 20);
} flows SEC(".maps");

/*
 * The uProxies' listeners: sock_ops puts them in when they begin to listen, the kernel takes them
 * out when they are closed. Read by sk_lookup only: nothing is ever redirected through this map.
 */
struct {
	__uint(type, BPF_MAP_TYPE_SOCKHASH);
	__uint(max_entries, 16384);
	__type(key, struct mesh_listener_key);
	__type(value, __u64);
} listeners SEC(".maps");

/*
 * By netns cookie: written by the setsockopt hook for a uProxy, read by sk_lookup, removed by the
 * agent when the workload goes. Without a listener at 15006 it opens nothing.
 */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 16384);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, __u64);
	__type(value, struct mesh_plaintext);
} plaintext SEC(".maps");

/*
 * Namespaces whose name queries go to their uProxy. Written by the agent when a workload registers,
 * removed when it goes; read by connect and sendmsg.
 */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 16384);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, __u64);
	__type(value, __u32);
} dns_captured SEC(".maps");

/*
 * Whom the app asks through which port of its uProxy. Written by connect and sendmsg, read by
 * recvmsg and getsockopt; removed by the agent with the workload. Full means refused.
 */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 65536);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, struct mesh_nameserver_key);
	__type(value, struct mesh_nameserver);
} nameservers SEC(".maps");

/* Written by the agent when a workload registers, removed when it goes; read by sockops_probe. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 16384);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, struct mesh_probe_key);
	__type(value, struct mesh_probe);
} probe_ports SEC(".maps");

/* What is admitted for a prober's socket. Written and read by sockops_probe; dies with the socket. */
struct {
	__uint(type, BPF_MAP_TYPE_SK_STORAGE);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, int);
	__type(value, struct mesh_admitted_key);
} probing SEC(".maps");

/* Written by every program, read by the agent. */
struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, MESH_COUNTERS);
	__type(key, __u32);
	__type(value, __u64);
} counters SEC(".maps");

static __always_inline void count(__u32 counter)
{
	__u64 *n = bpf_map_lookup_elem(&counters, &counter);

	if (n)
		__sync_fetch_and_add(n, 1);	/* these hooks may be preempted on this CPU */
}

#endif
