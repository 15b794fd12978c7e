"""The node agent: one per host, the only process with eBPF privileges. It holds no workload's key.

State (of the mesh, from files) → `sync` → kernel maps. Launcher → `client` → Unix socket → `server` → `workloads` →
programs on the workload's cgroups and namespace. `agent` wires it together.

Registration: what a launcher says of a workload before its first process runs: name, addresses, two cgroups, one
network namespace. App cgroup: the application's; its connections are captured. Proxy cgroup: its uProxy's; not
captured. Whole: the maps hold a complete configuration; until then nothing leaves a workload.

Everything is pinned: with the agent dead the mesh stays closed and the last configuration stays in force.
"""
