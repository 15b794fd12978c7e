"""The shared vocabulary: plain values and pure functions. No I/O, no clock, no logging.

trust domain  the authority that identities live under, as `cluster.local`.
SPIFFE ID     who a workload is: `spiffe://<trust domain>/ns/<namespace>/sa/<service account>`.
proxy hash    the first 32 hex digits of SHA-256(SPIFFE ID): an identity's name where a URI does not fit.
workload      one network namespace with its mesh addresses; key `namespace/name`.
service       a name with virtual addresses (VIPs) and ports; key `namespace/name`.
endpoint      one workload that serves one service: address, identity, target ports.
policy        an AuthorizationPolicy: which identities may reach which ports of the workloads it selects.
waypoint      the L7 proxy that a label puts before a service or workload; a Gateway, and its processes (`gateway`).
binding       how callers reach what is behind a waypoint; bound: what its destinations demand of them (`gateway`).
wish          what labels ask to bind; standing: how far the control plane has brought it (`bindings`).
route         an HTTPRoute: which of a service's requests go where (`route`).
target        a Service or Gateway whose waypoint enforces a policy, rather than the workloads that it selects.
document      one YAML document, read with its line numbers (`document`); imports PyYAML, so proxies never do.
declared ...  a resource as somebody wrote it (`declared`), before its references are checked.
mesh          the declared resources of all namespaces, or of one, references checked and VIPs allocated (`mesh`).
elsewhere     what one namespace must know of the others to be built alone (`mesh`).
record        the body of one message, as of a service or policy, or its tombstone (`records`).
resident      who lives at an address: a service or a workload, by name (`index`).
index         the records of a namespace that decide security, by SHA-256, in 64 shards under one signed root (`index`).
manifest      how many endpoints a service has and which, so that a proxy knows when it has them all (`index`).
signed bytes  what the config key signs of a message (`signing`).
envelope      what surrounds a record on its topic: schema, epoch, version, time of issue (`messages`).
stamp         (epoch, version) of an envelope: orders all versions of a record (`messages`).
topic         where a record is published: `mesh/v1/<trust domain>/...` (`topics`).
status        what a proxy reports of itself: which roots it has applied, what it waits for (`status`).
join token    the right to one workload's first certificate, and the CA's root to trust (`token`).
"""
