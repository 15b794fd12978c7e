// SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-only
/* cgroup/connect4, connect6: decides what becomes of a connection that an app dials. */
#include "direct.h"
#include "dns.h"

char LICENSE[] SEC("license") = "GPL";

/*
 * The workload that this copy is attached to. The agent sets it before it loads the programs: the
 * cgroup that a hook runs for has no helper here.
 */
const volatile struct mesh_caller caller = {};

#define SOL_SOCKET 1		/* <asm-generic/socket.h>; the same on x86-64 and arm64 */
#define SO_BINDTODEVICE 25

/* Where an app dials, and what the maps say of it. decide() has the order of the reasons. */
struct destination {
	__be32 addr[4];
	__u16 port;
	__u16 route;
	__u16 is_direct;	/* addr and port are the backend's, and no longer what was dialled */
	__u32 service_id;
	__u32 workload_id;
	__u32 drawn;		/* id of the backend that was drawn, and is not dialled directly */
	__u64 generation;
};

static __always_inline int is_probe(const struct destination *to)
{
	if (to->port != MESH_PORT_PROBE)
		return 0;
	if (is_v4(to->addr))
		return to->addr[3] == bpf_htonl(MESH_PROBE_V4);
	return to->addr[0] == bpf_htonl(MESH_PROBE_V6_0) &&
	       to->addr[1] == bpf_htonl(MESH_PROBE_V6_1) &&
	       to->addr[2] == bpf_htonl(MESH_PROBE_V6_2) &&
	       to->addr[3] == bpf_htonl(MESH_PROBE_V6_3);
}

/*
 * Fills route, ids and generation from the maps. Returns 0 when the mesh does not know the address.
 */
static __always_inline int find(struct destination *to)
{
	struct mesh_service_key service_key = { .port = to->port };
	struct mesh_workload_key workload_key;
	struct mesh_workload *workload;
	struct mesh_service *service;

	__builtin_memcpy(service_key.addr, to->addr, sizeof(service_key.addr));
	service = bpf_map_lookup_elem(&services, &service_key);
	if (service) {
		to->route = service->route;
		to->service_id = service->id;
		to->generation = service->generation;
		return 1;
	}
	__builtin_memcpy(workload_key.addr, to->addr, sizeof(workload_key.addr));
	workload = bpf_map_lookup_elem(&workloads, &workload_key);
	if (workload) {
		to->route = workload->route;
		to->workload_id = workload->id;
		to->generation = workload->generation;
		return 1;
	}
	return 0;
}

/*
 * Remembers on the socket what was dialled; new storage is zero. Returns 0, or -1 when there is no
 * memory for it.
 */
static __always_inline int remember(struct bpf_sock *sk, const struct destination *to)
{
	struct mesh_orig_dst *dst;
	struct sockaddr_in6 *in6;
	struct sockaddr_in *in;

	dst = bpf_sk_storage_get(&captured, sk, NULL, BPF_SK_STORAGE_GET_F_CREATE);
	if (!dst)
		return -1;
	if (is_v4(to->addr)) {
		in = (struct sockaddr_in *)dst->sockaddr;
		in->sin_family = AF_INET;
		in->sin_port = bpf_htons(to->port);
		in->sin_addr.s_addr = to->addr[3];
	} else {
		in6 = (struct sockaddr_in6 *)dst->sockaddr;
		in6->sin6_family = AF_INET6;
		in6->sin6_port = bpf_htons(to->port);
		__builtin_memcpy(&in6->sin6_addr, to->addr, sizeof(to->addr));
	}
	dst->magic = MESH_ORIG_DST_MAGIC;
	dst->version = MESH_ORIG_DST_VERSION;
	dst->route = to->route;
	dst->service_id = to->service_id;
	dst->backend = to->workload_id;
	dst->drawn = to->drawn;
	dst->generation = to->generation;
	return 0;
}

/* A UDP socket, or one for ICMP. As decide(). */
static __always_inline int decide_datagrams(struct bpf_sock_addr *ctx, struct bpf_sock *sk,
					    __u64 netns_cookie, const struct destination *to,
					    __u16 *uproxy_port)
{
	char no_device[1] = "";

	if (!is_name_query(netns_cookie, ctx->protocol, to->port))
		return datagram_verdict(ctx, netns_cookie, to->addr, to->port);
	*uproxy_port = port_of_nameserver(netns_cookie, to->addr);
	if (!*uproxy_port)
		return refuse(MESH_REFUSED_NAMESERVERS, EPERM);
	if (remember(sk, to)) {
		*uproxy_port = 0;
		return refuse(MESH_REFUSED_NO_MEMORY, EPERM);
	}
	/* As for TCP: bound to a device, it would not reach 127.0.0.1. */
	if (sk->bound_dev_if)
		bpf_setsockopt(ctx, SOL_SOCKET, SO_BINDTODEVICE, no_device, sizeof(no_device));
	count(MESH_DNS_CAPTURED);
	return ALLOW;
}

/* One of the backends of a service that this caller dials directly, by weight; NULL if it does not. */
static __always_inline struct mesh_backend *draw(const struct destination *to)
{
	struct mesh_direct_key key = { .source_cgroup = caller.cgroup, .port = to->port };
	struct mesh_direct_service *service;
	struct mesh_backend *slot;
	__u32 at, base;

	__builtin_memcpy(key.addr, to->addr, sizeof(key.addr));
	service = bpf_map_lookup_elem(&direct_services, &key);
	if (!service)
		return NULL;
	base = service->base;
	at = base + ((__u64)bpf_get_prandom_u32() * service->count >> 32);
	slot = bpf_map_lookup_elem(&backends, &at);
	if (slot && bpf_get_prandom_u32() >= slot->keep) {
		at = base + slot->alias;
		slot = bpf_map_lookup_elem(&backends, &at);
	}
	return slot;
}

/*
 * Whether the connection goes to a backend on this host without a proxy; then `to` is the backend.
 * What is drawn, local and granted does; all else is tunnelled. sock_ops asks for the grant again.
 */
static __always_inline int go_direct(struct bpf_sock *sk, __u64 netns_cookie,
				     struct destination *to)
{
	struct mesh_backend *backend = NULL;
	struct mesh_direct *connection;
	struct mesh_grant *grant;
	__be32 target[4];
	__u16 port = to->port;

	/* A process may have left its workload's namespace; what is granted is granted in there. */
	if (!caller.cgroup || netns_cookie != caller.netns_cookie)
		return 0;
	__builtin_memcpy(target, to->addr, sizeof(target));
	if (to->service_id) {
		backend = draw(to);
		if (!backend)
			return 0;
		to->drawn = backend->id;
		if (!backend->netns_cookie)
			return 0;
		__builtin_memcpy(target, backend->addr, sizeof(target));
		port = backend->port;
		/* A socket speaks the family that it has dialled. */
		if (is_v4(target) != is_v4(to->addr))
			return 0;
	}
	grant = grant_of(caller.cgroup, target, port);
	if (!holds(grant) || (backend && grant->target_netns != backend->netns_cookie))
		return 0;
	connection = bpf_sk_storage_get(&direct, sk, NULL, BPF_SK_STORAGE_GET_F_CREATE);
	if (!connection)
		return 0;
	connection->source_cgroup = caller.cgroup;
	connection->target_netns = grant->target_netns;
	connection->source_id = grant->source_id;
	connection->target_id = grant->target_id;
	connection->service_id = to->service_id;
	connection->dialled_port = to->port;
	connection->target_port = port;
	__builtin_memcpy(connection->dialled, to->addr, sizeof(to->addr));
	__builtin_memcpy(connection->target, target, sizeof(target));
	__builtin_memcpy(to->addr, target, sizeof(target));
	to->port = port;
	to->is_direct = 1;
	return 1;
}

/*
 * Returns ALLOW or REFUSE; sets *uproxy_port when the caller has to point the connection at the
 * uProxy.
 */
static __always_inline int decide(struct bpf_sock_addr *ctx, struct destination *to,
				  __u16 *uproxy_port)
{
	struct bpf_sock *sk = ctx->sk;
	__u64 netns_cookie = bpf_get_netns_cookie(ctx);
	char no_device[1] = "";
	__u32 range;

	*uproxy_port = 0;
	if (!sk)
		return refuse(MESH_REFUSED_NO_MEMORY, ECONNREFUSED);
	/*
	 * Also for connections that are left alone: connect(AF_UNSPEC) runs no hook, and what it
	 * leaves must not outlive it.
	 */
	bpf_sk_storage_delete(&captured, sk);
	bpf_sk_storage_delete(&direct, sk);
	if (ctx->protocol != IPPROTO_TCP)
		return decide_datagrams(ctx, sk, netns_cookie, to, uproxy_port);

	if (is_probe(to)) {
		to->route = MESH_ROUTE_PROBE;
	} else {
		if (is_loopback(to->addr) || is_own(netns_cookie, to->addr))
			return ALLOW;
		range = range_of(to->addr);
		if (range == MESH_RANGE_EXCLUDED)
			return ALLOW;
		if (!maps_whole())
			return refuse(MESH_REFUSED_NOT_WHOLE, ECONNREFUSED);
		if (range != MESH_RANGE_MESH)
			return is_registry_only() ? refuse(MESH_REFUSED_EGRESS, ECONNREFUSED) : ALLOW;
		if (!find(to))
			return refuse(MESH_REFUSED_NO_CONFIG, ECONNREFUSED);
		if (to->route == MESH_ROUTE_TUNNEL && go_direct(sk, netns_cookie, to)) {
			count(MESH_DIRECT);
			return ALLOW;
		}
	}
	if (remember(sk, to))
		return refuse(MESH_REFUSED_NO_MEMORY, ECONNREFUSED);
	/* A socket bound to a device would lose its SYN to 127.0.0.1 in a black hole. */
	if (sk->bound_dev_if)
		bpf_setsockopt(ctx, SOL_SOCKET, SO_BINDTODEVICE, no_device, sizeof(no_device));
	count(to->route == MESH_ROUTE_PROBE ? MESH_PROBED : MESH_CAPTURED);
	*uproxy_port = MESH_PORT_OUTBOUND;
	return ALLOW;
}

/*
 * Hook: connect() and sendto(MSG_FASTOPEN), in the caller's context with the socket locked, for
 * sockets created in the workload's app cgroup or below it, whatever cgroup the caller is in. Not
 * run for connect(AF_UNSPEC), nor again while a non-blocking connect is in progress.
 * MPTCP: run once, with the subflow's socket.
 * Kernel guarantees: user_ip4, user_ip6 and user_port in network order, writable as 32-bit words;
 * the route is looked up afterwards, with what we wrote. A return of 0 fails the call with the
 * value set by bpf_set_retval (else EPERM).
 * We rely on: sk_storage of ctx->sk living as long as the socket; bpf_get_netns_cookie being the
 * socket's namespace.
 * On failure: closed, the call is refused.
 */
SEC("cgroup/connect4")
int connect4(struct bpf_sock_addr *ctx)
{
	struct destination to = { .port = bpf_ntohs(ctx->user_port) };
	__u16 uproxy_port;
	int verdict;

	map_v4(to.addr, ctx->user_ip4);
	verdict = decide(ctx, &to, &uproxy_port);
	if (uproxy_port) {
		ctx->user_ip4 = bpf_htonl(0x7f000001);
		ctx->user_port = bpf_htons(uproxy_port);
	}
	if (to.is_direct) {
		ctx->user_ip4 = to.addr[3];
		ctx->user_port = bpf_htons(to.port);
	}
	return verdict;
}

/*
 * As connect4. An AF_INET6 socket that dials a v4-mapped address speaks IPv4 afterwards: it goes to
 * ::ffff:127.0.0.1.
 */
SEC("cgroup/connect6")
int connect6(struct bpf_sock_addr *ctx)
{
	struct destination to = { .port = bpf_ntohs(ctx->user_port) };
	__u16 uproxy_port;
	int verdict;

	to.addr[0] = ctx->user_ip6[0];
	to.addr[1] = ctx->user_ip6[1];
	to.addr[2] = ctx->user_ip6[2];
	to.addr[3] = ctx->user_ip6[3];
	verdict = decide(ctx, &to, &uproxy_port);
	if (uproxy_port) {
		int mapped = is_v4(to.addr);

		ctx->user_ip6[0] = 0;
		ctx->user_ip6[1] = 0;
		ctx->user_ip6[2] = mapped ? bpf_htonl(0xffff) : 0;
		ctx->user_ip6[3] = mapped ? bpf_htonl(0x7f000001) : bpf_htonl(1);
		ctx->user_port = bpf_htons(uproxy_port);
	}
	if (to.is_direct) {
		ctx->user_ip6[0] = to.addr[0];
		ctx->user_ip6[1] = to.addr[1];
		ctx->user_ip6[2] = to.addr[2];
		ctx->user_ip6[3] = to.addr[3];
		ctx->user_port = bpf_htons(to.port);
	}
	return verdict;
}
