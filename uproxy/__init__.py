"""The micro proxy: mTLS to and from the mesh for one workload, and nothing else.

Words, in the order in which a connection meets them. *Capture* (`redirect`): eBPF brings an application's connection to
this process; the kernel knows its *original destination*. *Plan* (`resolve`): which peers serve it, each a *hop*.
*Demand* (`demand`): what a plan lacks is asked of the control plane, and waited for.
*Tunnel* (`tunnel`, `pool`): one mTLS connection to a peer, which carries many connections as HBONE *streams* (`hbone`).
*Relay* (`relay`): the copy between one application socket and one stream. `outbound` and `inbound` are the two paths,
readable top to bottom; `plane` is the loop that drives them; `run` wires one process together. A *member* (`member`)
has joined a mesh (`joining`) and is configured and certified (`credentials`) by its control plane. Beside them stand
`authz` (who may), `telemetry` and `access_log` (what happened), `admin` (ask the process), `explicit` (no capture),
`launch` (`uproxy exec`) and `node` (the node agent, the only one that loads eBPF).
"""

__version__ = "0.1.0"
