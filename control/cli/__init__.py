"""`meshctl`: what an operator types.

A command is one function of its parsed arguments that returns the exit status: 0 done, 1 refused or failed, 2 not
understood. Results go to stdout, as a table for people or as JSON for programs; errors go to stderr.
"""
