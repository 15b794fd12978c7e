"""What a proxy runs of the control plane.

batch    the messages of one load, (topic, payload) each; applied whole or not at all (`state`).
stamp    (epoch, version) of a message: a record never goes back to a smaller one.
state    everything this proxy knows of the mesh, with the look-ups that connections need; does no I/O. Address shards
         stay packed in it (`residents`).
replica  what the control plane signed, made into batches (`replica`): what is `listed` under a signed root, whole or
         not at all; an `endpoint_set` by stamps and a manifest; an `inbox` for what nothing lists yet. `libcrypto`
         checks signatures.
snapshot the last good state of a replica, on disk.
source   where batches come from: files (`files`), read by a short-lived child (`render`) so that no proxy holds a
         YAML parser.
"""
