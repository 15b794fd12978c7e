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
 * path: an agent carries over what has the same shape and meaning, and makes the rest anew.
 */
#ifndef UPROXY_MESH_H
#define UPROXY_MESH_H

#include <linux/types.h>

enum mesh_constant {
	MESH_SCHEMA = 2,

	MESH_PORT_OUTBOUND = 15001,	/* the uProxy's, for what is captured: 127.0.0.1, ::1 */
	MESH_PORT_PLAINTEXT = 15006,	/* the uProxy's, for plaintext to ports that take it: likewise */
	/*
	 * The uProxy's, for name queries: 127.0.0.1 and ::1, one port for each nameserver that the
	 * app asks, so that one socket can ask several.
	 */
	MESH_PORT_DNS = 15053,
	MESH_NAMESERVERS = 8,
	MESH_NAMESERVER_IDLE_S = 30,	/* after which another may have its port */

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

	/* A socket option of ours: the uProxy says which ports are open to plaintext. */
	MESH_SOL = 0x75505859,
	MESH_SO_PLAINTEXT = 1,
	MESH_PLAINTEXT_PORTS = 64,
};

/*
 * Where the kernel sends a captured connection. A hint: the uProxy resolves again, and the stricter
 * wins.
 */
enum mesh_route {
	MESH_ROUTE_TUNNEL = 1,
	MESH_ROUTE_WAYPOINT = 2,
	MESH_ROUTE_PROBE = 3,
	MESH_ROUTE_PLAINTEXT = 4,	/* datagrams only: they leave as they are */
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
	__u32 drawn;		/* of the backend that the kernel drew for a service, 0 if none */
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

/*
 * A port from which a workload answers in datagrams: whoever asked is at an address and port that
 * no configuration knows.
 */
struct mesh_answering_key {
	__u64 netns_cookie;
	__u16 port;
	__u16 pad[3];
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

/* A port of the uProxy for name queries: of IPv4 first, then of IPv6. */
struct mesh_nameserver_key {
	__u64 netns_cookie;
	__u16 slot;		/* 0..2*MESH_NAMESERVERS-1 */
	__u16 pad[3];
};

/* Which nameserver the app asks through it, always at port 53. */
struct mesh_nameserver {
	__be32 addr[4];
	__u64 used_ns;		/* bpf_ktime_get_ns() of the last datagram either way */
};

/*
 * The same-host direct path. Who calls is the cgroup that the socket was made in, together with the
 * socket's network namespace; an address alone grants nothing.
 */

/* The workload that a copy of connect4/6 is attached to: a constant of that copy. */
struct mesh_caller {
	__u64 cgroup;		/* inode of the app cgroup; 0: nobody, who never goes direct */
	__u64 netns_cookie;
};

struct mesh_grant_key {
	__u64 source_cgroup;
	__be32 addr[4];		/* of the destination workload */
	__u16 port;
	__u16 pad[3];
};

struct mesh_grant {
	__u64 expiry_ns;	/* CLOCK_MONOTONIC */
	__u64 target_netns;	/* cookie of the destination's namespace */
	__u64 suspended_ns;	/* when a direct connection last failed; 0: never, the grant holds */
	__u32 source_id;
	__u32 target_id;
};

/* A service that one caller may dial directly: its backends are a range of `backends`. */
struct mesh_direct_key {
	__u64 source_cgroup;
	__be32 addr[4];
	__u16 port;
	__u16 pad[3];
};

struct mesh_direct_service {
	__u32 base;		/* index of the first backend */
	__u32 count;
};

/* Also a slot of an alias table: drawn if a random number is below `keep`, else `alias` is. */
struct mesh_backend {
	__be32 addr[4];
	__u64 netns_cookie;	/* 0: not on this host */
	__u32 id;
	__u32 keep;		/* of 2^32 */
	__u32 alias;		/* index in the range */
	__u16 port;
	__u16 pad;
};

/* A direct connection, on the caller's socket. */
struct mesh_direct {
	__u64 source_cgroup;
	__u64 target_netns;
	__u64 opened_ns;
	__u64 received_at_fin;	/* bytes, when the peer had acknowledged our FIN */
	__be32 dialled[4];
	__be32 target[4];
	__u32 service_id;
	__u32 source_id;
	__u32 target_id;
	__u16 dialled_port;
	__u16 target_port;
};

enum mesh_flow_end {
	MESH_FLOW_CLOSED = 1,	/* both FINs, or ours and then no listener for the rest */
	MESH_FLOW_RESET = 2,	/* established, then reset, timed out or destroyed */
	MESH_FLOW_FAILED = 3,	/* never established */
};

/* What a direct connection was, written when it has closed. */
struct mesh_flow {
	__u64 source_cgroup;
	__u64 source_netns;
	__u64 target_netns;
	__u64 opened_ns;	/* CLOCK_MONOTONIC, when the SYN left */
	__u64 closed_ns;
	__u64 sent;		/* bytes of the application, acknowledged */
	__u64 received;
	__be32 source[4];
	__be32 target[4];
	__be32 dialled[4];
	__u32 service_id;
	__u32 source_id;
	__u32 target_id;
	__u32 srtt_us;
	__u32 retransmits;
	__u16 source_port;
	__u16 target_port;
	__u16 dialled_port;
	__u16 end;		/* enum mesh_flow_end */
	__u32 pad;
};

/* A port of a workload that health probes may dial. */
struct mesh_probe_key {
	__be32 addr[4];
	__u16 port;
	__u16 pad;
};

struct mesh_probe {
	__u64 netns_cookie;	/* of the workload's namespace */
};

/* A listener of a uProxy: one of each port and family is in force. */
struct mesh_listener_key {
	__u64 netns_cookie;
	__u16 port;
	__u16 family;
	__u32 pad;
};

/*
 * Which ports of a workload are open to plaintext too: those listed, or with `others` all but them.
 * The uProxy's own ports never are.
 */
struct mesh_plaintext {
	__u16 others;
	__u16 count;
	__u16 ports[64];	/* MESH_PLAINTEXT_PORTS */
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
	MESH_DIRECT = 12,		/* sent to a granted backend on this host */
	MESH_DIRECT_UNADMITTED = 13,	/* of those: the grant was gone, or `admitted` full, at the SYN */
	MESH_DIRECT_FAILED = 14,	/* of those: never established; the grant is suspended */
	MESH_FLOWS_LOST = 15,		/* direct connections without a record: nobody drained `flows` */
	MESH_PLAINTEXT_SYN = 16,	/* from outside, in plaintext, to a port that takes it */
	MESH_LISTENERS_FULL = 17,	/* no room to know a uProxy's listener */
	MESH_DNS_CAPTURED = 18,
	MESH_REFUSED_NAMESERVERS = 19,	/* more are in use than MESH_NAMESERVERS */
	MESH_PROBE_UNADMITTED = 20,	/* a health probe for which there was no room */
	MESH_COUNTERS = 21,
};

#endif
