// SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-only
/* cgroup/sock_create: no IP socket that the other hooks cannot see. */
#include "sock.h"

char LICENSE[] SEC("license") = "GPL";

#define SOCK_STREAM 1
#define SOCK_DGRAM 2

/*
 * Hook: socket(AF_INET) and socket(AF_INET6) in the workload's app cgroup, in the caller's context,
 * when type and protocol are set.
 * Kernel guarantees: type and protocol as the socket will use them (0 is resolved). AF_PACKET and
 * others are not covered: they need CAP_NET_RAW.
 * We rely on: TCP, MPTCP and UDP passing connect and sendmsg; ping sockets carrying echo requests
 * only. sendmsg does not see those, so with registry-only egress none is made.
 * On failure: closed, EPERM: raw sockets, SCTP, DCCP, UDP-Lite and L2TP would send past capture.
 */
SEC("cgroup/sock_create")
int sock_create(struct bpf_sock *ctx)
{
	__u32 protocol = ctx->protocol;

	if (ctx->type == SOCK_STREAM && (protocol == IPPROTO_TCP || protocol == IPPROTO_MPTCP))
		return ALLOW;
	if (ctx->type == SOCK_DGRAM && protocol == IPPROTO_UDP)
		return ALLOW;
	if (ctx->type == SOCK_DGRAM && (protocol == IPPROTO_ICMP || protocol == IPPROTO_ICMPV6))
		return is_registry_only() ? refuse(MESH_REFUSED_EGRESS, EPERM) : ALLOW;
	return refuse(MESH_REFUSED_PROTOCOL, EPERM);
}
