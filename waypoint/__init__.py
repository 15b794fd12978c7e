"""The waypoint: the L7 proxy that a label puts between callers and a service.

Words: a *caller* is a workload of the mesh, its connection is one CONNECT stream from its uProxy; a *destination* is
what it dialled, a port of a service or of a workload; a *backend* is where a request goes, an endpoint of a service or
that workload; an *exchange* is one request and its response.
"""
