"""The `uproxy` command: `run` (the proxy), `exec` (a workload with a sidecar), `upgrade`, `fork-server`, `node` (the
agent).
"""

from __future__ import annotations

import argparse
import sys
from importlib import import_module

import uproxy

_COMMANDS = {
    "run": ("uproxy.run", "run the micro proxy of one workload"),
    "exec": ("uproxy.launch", "run a command as a workload of the mesh, with a sidecar and capture"),
    "upgrade": ("uproxy.upgrade", "replace the sidecar of a workload by one of the software that is installed now"),
    "fork-server": ("uproxy.fork_server", "start this host's micro proxies from one process, which saves memory"),
    "node": ("uproxy.node.agent", "run the node agent: eBPF programs and maps of this host"),
}


def main() -> int:
    """Hand over to the command; each has its own options and --help."""
    parser = argparse.ArgumentParser("uproxy", description="The mesh's data plane: micro proxy, launcher, node agent.")
    parser.add_argument("--version", action="version", version=f"uproxy {uproxy.__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, (_, text) in _COMMANDS.items():
        commands.add_parser(name, help=text, add_help=False)
    arguments = sys.argv[1:]
    # Only the first word is ours: what follows belongs to the command, `exec -- CMD` included.
    options = parser.parse_args(arguments[:1])
    module, _ = _COMMANDS[options.command]
    status: int = import_module(module).main(arguments[1:])
    return status


if __name__ == "__main__":
    sys.exit(main())
