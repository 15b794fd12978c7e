"""What a proxy never imports of the control plane.

CA             the certificate authority of one trust domain: a directory of certificates and encrypted keys (`ca`).
root           the self-signed certificate that every proxy trusts; its key makes intermediates and rests.
intermediate   signs what proxies present; travels with each leaf, so that roots can stay few.
CSR            a workload's proof that it holds a key; whose key it is, token, certificate or operator say, not the CSR.
SVID           the certificate of one workload: its SPIFFE ID is the one URI SAN (SPIFFE X.509-SVID).
chain          SVID, then intermediate. bundle: the roots. Both lie beside the workload's key.
config key     signs what decides security; certified by the CA for nothing else (`signing`).

store          one SQLite file: what was applied, what is published, tokens, certificates (`store`).
registry       desired state: plans a change set whole, or refuses it (`registry`).
publication    which messages make the published state equal to the desired one, in which order (`publication`).
core           all of these as one object, without network (`core`).
publisher      makes the broker hold what the core says, and hears what proxies report (`publisher`).
broker         nats-server, our child (`brokers`), or one that somebody else runs (`foreign`); `rights`: its clients'.

token          a right to one certificate; member: whom it is for (`enrolment`, `members`).
door           where a workload finds the control plane: certificates over HTTPS (`https`), and the broker.
row            what is to be said of one proxy (`proxies`).

Flow of configuration: operator -> `api` (Unix socket) -> `core` -> `publisher` -> broker -> proxies, whose status comes
back the same way. Flow of identity: token -> `https` -> `enrolment` -> `ca` -> chain and bundle. `serve` wires it all.
"""
