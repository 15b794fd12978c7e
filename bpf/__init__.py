"""Capture in the kernel: eBPF programs, the header both sides read, and libbpf through cffi.

Knows nothing of the mesh's resources: it sees addresses, ports and numbers. Only the node agent imports it.

Hook: a place in the kernel where a program runs; one `.bpf.c` file each. Program: one function of such a file. Object:
the compiled file. Map: memory that programs and the agent share. Link: an attachment of a program to a cgroup or
network namespace; it lasts as long as somebody holds it. Pin: a name in bpffs that holds a map or a link, so that it
outlives the agent.

`layout` parses `mesh.h`; `libbpf` and `libc` wrap the C libraries; `bpffs` keeps the pin directory safe; `loader` turns
objects into pinned maps and programs; `maps` gives the maps types.

The way of one connection: the app's connect() asks `connect` (left alone, refused, or sent to 127.0.0.1:15001);
`sockops` files what was dialled under the source port before the SYN, and moves it to the socket that the uProxy
accepts; `getsockopt` tells the uProxy; `getpeername` shows the app what it dialled. `bind`, `sendmsg` and `sock_create`
close the ways around; `sendmsg` and `recvmsg` let name queries go to the uProxy; `sk_lookup` closes the way in, but for
the uProxy, whose listeners make themselves known (`sockops_proxy`), and for what it lets in (`setsockopt`).
"""
