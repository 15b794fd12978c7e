"""The control plane, in four parts, and `durable`, which writes their files whole or not at all.

api       the vocabulary both planes share: identities, labels, resources, policy, records, topics. Pure.
client    what a proxy runs: where its configuration comes from, the state it keeps of it, its key and CSR.
server    what a proxy never imports: desired state, publication, certificates, the broker.
cli       `meshctl`.

Flow: YAML (`api.resources`) -> checked mesh (`api.mesh`) -> records on topics (`api.records`, `api.messages`,
`api.topics`) -> a proxy's `client.state`.
"""
