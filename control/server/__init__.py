"""What a proxy never imports of the control plane.

CA             the certificate authority of one trust domain: a directory of certificates and encrypted keys.
root           the self-signed certificate that every proxy trusts; its key makes intermediates and rests.
intermediate   signs what proxies present; travels with each leaf, so that roots can stay few.
CSR            a workload's proof that it holds a key; whose key it is, the operator says, not the CSR.
SVID           the certificate of one workload: its SPIFFE ID is the one URI SAN (SPIFFE X.509-SVID).
chain          SVID, then intermediate. bundle: the roots. Both lie beside the workload's key.

Flow: key and CSR (`control.client.csr`, beside the workload) -> `ca.Authority.issue` -> chain and bundle.
"""
