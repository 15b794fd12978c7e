/* SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-only */
/*
 * What the eBPF programs, the node agent and the uProxy say to each other: structs and constants,
 * nothing else.
 *
 * Three readers: clang compiles it into the objects, bpf/layout.py parses it with cffi, and a test
 * compares both through BTF. cffi drops the lines that start with '#' and knows no expressions:
 * constants are enums. Structs have no implicit hole (hash keys are compared as bytes) and no
 * packed attribute; whoever fills a key starts from zero.
 *
 * Addresses are four words in network order, IPv4 as v4-mapped IPv6, so that there is one key
 * shape. Ports are in host order. Any change here raises MESH_SCHEMA, which is part of the pin
 * path: maps of two schemas never mix.
 */
#ifndef UPROXY_MESH_H
#define UPROXY_MESH_H

#include <linux/types.h>

enum mesh_constant {
	MESH_SCHEMA = 2,

	MESH_PORT_OUTBOUND = 15001,	/* the uProxy's, for what is captured: 127.0.0.1, ::1 */
	MESH_PORT_HBONE = 15008,	/* the one port of a workload that is open to other hosts */
	MESH_PORT_RESERVED_FIRST = 15000,	/* the app may bind none of 15000..15090 */
	MESH_PORT_RESERVED_LAST = 15090,

	/*
	 * 240.240.255.255:15021 and [fd75:5072:6f78::ffff]:15021: captured always, so that a uProxy
	 * can prove capture. Host order.
	 */
	MESH_PORT_PROBE = 15021,
	MESH_PROBE_V4 = 0xf0f0ffff,
	MESH_PROBE_V6_0 = 0xfd755072,
	MESH_PROBE_V6_1 = 0x6f780000,
	MESH_PROBE_V6_2 = 0,
	MESH_PROBE_V6_3 = 0x0000ffff,

	MESH_ORIG_DST_MAGIC = 0x75505859,	/* "uPXY" */
	MESH_ORIG_DST_VERSION = 1,

	/* Seconds for which an admission holds: Linux sends a SYN for 127 s (tcp_syn_retries 6). */
	MESH_ADMITTED_S = 130,
};

/*
 * Where the kernel sends a captured connection. A hint: the uProxy resolves again, and the stricter
 * wins.
 */
enum mesh_route {
	MESH_ROUTE_TUNNEL = 1,
	MESH_ROUTE_WAYPOINT = 2,
	MESH_ROUTE_PROBE = 3,
};

/*
 * What a connection was dialled to: the answer to getsockopt(SO_ORIGINAL_DST) on the uProxy's
 * accepted socket.
 */
struct mesh_orig_dst {
	__u8 sockaddr[28];	/* sockaddr_in (also for v4-mapped; then zeros) or sockaddr_in6 */
	__u32 magic;
	__u16 version;
	__u16 route;		/* enum mesh_route */
	__u32 service_id;	/* of the service dialled, 0 if it was a workload's address */
	__u32 backend;		/* of the workload dialled, 0 if it was a service's address */
	__u32 pad;
	__u64 generation;	/* of the map entry that decided */
	__u64 reserved;
};

/* A captured connection between its SYN and its accept, named by its client side. */
struct mesh_orig_key {
	__u64 netns_cookie;
	__be32 addr[4];
	__u16 port;
	__u16 pad[3];
};

enum mesh_range_kind {
	MESH_RANGE_MESH = 1,		/* VIPs and workloads: known, or refused */
	MESH_RANGE_EXCLUDED = 2,	/* left alone even while the maps are not whole */
};

struct mesh_range_key {
	__u32 prefix_bits;	/* of 128; an IPv4 prefix counts 96 more */
	__be32 addr[4];
};

struct mesh_range {
	__u32 kind;		/* enum mesh_range_kind */
};

struct mesh_service_key {
	__be32 addr[4];
	__u16 port;
	__u16 pad;
};

struct mesh_service {
	__u64 generation;	/* of the maps, when this entry last changed */
	__u32 id;
	__u16 route;		/* enum mesh_route */
	__u16 pad;
};

struct mesh_workload_key {
	__be32 addr[4];
};

struct mesh_workload {
	__u64 generation;
	__u32 id;
	__u16 route;
	__u16 pad;
};

/* A mesh address of the one workload that owns a network namespace. */
struct mesh_own_key {
	__u64 netns_cookie;
	__be32 addr[4];
};

struct mesh_own {
	__u64 netns_ino;	/* how a restarted agent finds the cookie of a pinned link */
};

struct mesh_settings {
	__u64 generation;	/* raised by every change of services or workloads, for good */
	__u32 whole;		/* 1 once a complete configuration was written */
	__u32 registry_only;	/* 1: nothing is left alone outside of all ranges */
};

/* Why a connection may come in without a tunnel. */
enum mesh_admission {
	MESH_ADMISSION_DIRECT = 1,	/* granted: from another workload of this host */
	MESH_ADMISSION_PROBE = 2,	/* a health probe, to a port declared for it */
};

/*
 * One connection from outside a namespace that sk_lookup lets through to the app. Both ends as they
 * are on the wire, with the namespace of the destination.
 */
struct mesh_admitted_key {
	__u64 netns_cookie;
	__be32 source[4];
	__be32 destination[4];
	__u16 source_port;
	__u16 destination_port;
	__u32 pad;
};

struct mesh_admitted {
	__u64 since_ns;		/* bpf_ktime_get_ns() */
	__u32 kind;		/* enum mesh_admission */
	__u32 pad;
};

/* Index of `counters`. Each counts connections, datagrams or calls. */
enum mesh_counter {
	MESH_CAPTURED = 0,
	MESH_PROBED = 1,
	MESH_REFUSED_NOT_WHOLE = 2,	/* the maps were not whole */
	MESH_REFUSED_NO_CONFIG = 3,	/* in a mesh range, and no service or workload there */
	MESH_REFUSED_PROTOCOL = 4,	/* not TCP, to a mesh range; or a kind of socket not seen */
	MESH_REFUSED_BIND = 5,		/* the app asked for a port of the uProxy */
	MESH_REFUSED_NO_MEMORY = 6,	/* no room to remember where the app dialled */
	MESH_ORIG_FULL = 7,		/* `orig` was full: the uProxy refuses this connection */
	MESH_ORIG_MISSING = 8,		/* the uProxy accepted a connection that nobody captured */
	MESH_DROPPED_SYN = 9,		/* from outside, to another port than 15008 */
	MESH_ADMITTED_SYN = 10,		/* from outside, and admitted */
	MESH_REFUSED_EGRESS = 11,	/* outside of all ranges, and the egress is registry-only */
	MESH_COUNTERS = 12,
};

#endif
