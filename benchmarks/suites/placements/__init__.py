"""Where an L7 proxy may live: the same application, policy and identities behind five placements of proxies.

Member     a workload as it stands in one placement: its service account, and its address there.
Placement  a subject: which proxies there are, who goes through which, and what they hold.
Pass       one reading of a request as HTTP by one proxy. A sidecar makes one at each end, a waypoint one in all.
Entry      where a caller's requests go: its proxy's listener, or with uProxies the service itself, since eBPF captures.
Proof      that a placement routes, refuses and tells who calls, before anything of it is measured.
"""
