// SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-only
/* cgroup/bind4, bind6: keeps the uProxy's ports out of the app's reach. */
#include "sock.h"

char LICENSE[] SEC("license") = "GPL";

static __always_inline int verdict(struct bpf_sock_addr *ctx)
{
	__u16 port = bpf_ntohs(ctx->user_port);

	if (port < MESH_PORT_RESERVED_FIRST || port > MESH_PORT_RESERVED_LAST)
		return ALLOW;
	return refuse(MESH_REFUSED_BIND, EACCES);
}

/*
 * Hook: bind() of a socket created in the workload's app cgroup, in the caller's context. An app
 * that listened on 15001 or 15008 while its uProxy restarts would take the workload's traffic.
 * Kernel guarantees: user_port in network order; 0 (the kernel chooses, from
 * net.ipv4.ip_local_port_range) passes.
 * We rely on: the ephemeral range lying above 15090, as it does by default.
 * On failure: closed, EACCES, as for the privileged ports.
 */
SEC("cgroup/bind4")
int bind4(struct bpf_sock_addr *ctx)
{
	return verdict(ctx);
}

/* As bind4. */
SEC("cgroup/bind6")
int bind6(struct bpf_sock_addr *ctx)
{
	return verdict(ctx);
}
