"""The lab: a mesh of real network namespaces on one machine, for the demo, the end-to-end tests and the benchmarks.

Lab        everything that is made, under one id: namespaces, cgroups, pins and files carry it in their names.
Host       a network namespace with an address on the underlay, routes to the other hosts and a node agent.
Underlay   a namespace with the bridge that joins the hosts; what crosses it is what a network would see.
Workload   a command started by `uproxy exec` on a host: its own namespace, address, cgroups and sidecar.
Twin       a namespace plumbed as a workload's is, without capture or sidecar: the path to compare with.
Capture    a tcpdump on the underlay, and the search for what must not be in it.
Node       the kernel's half of a host without an agent: programs and maps that a benchmark fills itself.
Remains    what is left of a lab whose owner is dead; the reaper, and every later lab, removes it.

Direction: topology starts the product's own commands (`uproxy node`, `uproxy exec`) and never reaches into them.
"""
