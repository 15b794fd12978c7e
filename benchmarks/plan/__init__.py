"""What each placement of the L7 proxy would cost a mesh whose traffic is known: `meshctl bench plan`.

Traffic      who asks whom how often, from Istio's `istio_requests_total` (traffic.py)
Topology     the instances of each workload: their service account and their node (topology.py)
Coefficient  what a call, or a process, of a placement takes, from a run of the suite `architectures` (model.py)
"""
