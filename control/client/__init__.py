"""What a proxy runs of the control plane.

batch    the messages of one load, (topic, payload) each; applied whole or not at all (`state`).
stamp    (epoch, version) of a message: a record never goes back to a smaller one.
member   a workload that has joined a mesh: `membership` says who it is and where its control plane is. `certify` gets
         its certificates, in a child that `certificates` starts.
state    everything this proxy knows of the mesh, with the look-ups that connections need; does no I/O. Address shards
         stay packed in it (`residents`).
replica  what the control plane signed, made into batches (`replica`): what is `listed` under a signed root, whole or
         not at all; an `endpoint_set` by stamps and a manifest; an `inbox` for what nothing lists yet. `libcrypto`
         checks signatures. What it knows may lead further, as a binding to its waypoint (`following`).
snapshot the last good state of a replica, on disk.
line     what keeps a replica in step with the broker (`subscriber`): one connection (`mqtt`) after the other, and on
         each of them `subscriptions` to what the replica wants.
source   where batches come from without a control plane: files (`files`), read by a short-lived child (`render`) so
         that no proxy holds a YAML parser.
"""
