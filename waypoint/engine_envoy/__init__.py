"""The second engine of a waypoint: a real Envoy that serves the same resources (annotation `mesh.uproxy.dev/engine`).

*rendering*: what the state says, as Envoy's resources. *place*: one port that callers may ask for, which has an
internal listener of its own. *exit*: the internal listener through which connections to backends of one identity leave,
each as a CONNECT. *delivery*: bringing Envoy from one rendering to the next; it is *in force* when requests are served
by it.
"""
