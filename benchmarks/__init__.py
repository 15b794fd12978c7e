"""Measurements of the mesh, and the lab in which the demo, the end-to-end tests and the measurements run.

Path       one way for bytes from a client to a server: plain TCP, a pair of uProxies, a pair of Envoys.
Pair       two proxies, one at each end of a path, in namespaces that have no name and need no clean-up.
Load       a closed loop of requests over a number of connections, or a bulk transfer, with its timings.
Lab        a whole mesh on one machine: hosts, node agents, workloads with sidecars (benchmarks.lab).

Paths are compared in interleaved rounds of one run on the same cores; only ratios mean anything.
"""
