"""What a proxy runs of the control plane.

batch    the messages of one load, (topic, payload) each; applied whole or not at all (`state`).
stamp    (epoch, version) of a message: a record never goes back to a smaller one.
residents  who lives at the addresses of one shard, packed.
state    everything this proxy knows of the mesh, with the look-ups that connections need; does no I/O.
source   where batches come from: files (`files`), read by a short-lived child (`render`) so that no proxy holds a
         YAML parser.
"""
