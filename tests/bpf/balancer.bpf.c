// SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-only
/* A balancer of somebody else's, as Cilium's socket LB: rewrites a virtual address at connect(). */
#include <linux/bpf.h>
#include <bpf/bpf_endian.h>
#include <bpf/bpf_helpers.h>

char LICENSE[] SEC("license") = "GPL";

/* In network order, set by the test. */
const volatile __u32 from_addr = 0;
const volatile __u32 to_addr = 0;

SEC("cgroup/connect4")
int balance4(struct bpf_sock_addr *ctx)
{
	if (ctx->user_ip4 == from_addr)
		ctx->user_ip4 = to_addr;
	return 1;
}
