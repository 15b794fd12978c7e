"""`meshctl`: what an operator types.

A command is one function of its parsed arguments that returns the exit status: 0 done, 1 refused or failed, 2 not
understood, 3 answered and not all is as it should be, 4 no control plane. Results go to stdout, as a table for people
or as JSON for programs; errors go to stderr. What changes or asks a mesh goes through the control plane's socket
(`client`); `ca` and `validate` need none.
"""
