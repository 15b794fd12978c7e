"""`python -m control.client.render FILE...`: resources in YAML to messages, in a child of a proxy.

A proxy must not hold a YAML parser (memory, and the attack surface of a large C library), so it starts this, reads
frames from its standard output and lets it go. A frame is a length (4 bytes, network order) and msgpack
[topic, payload].
Exit status: 0 all written; 2 the resources are refused, with every error on standard error.
"""

from __future__ import annotations

import argparse
import resource
import struct
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import msgpack

from control.api import document, index, messages, resources, topics
from control.api.declared import Resource
from control.api.identity import IdentityError
from control.api.mesh import Mesh
from control.api.messages import Body, Envelope, MessageError
from control.api.policy import DEFAULT_ROOT_NAMESPACE
from control.api.problems import ResourceError, ResourceErrors
from control.api.topics import AddressesTopic

REFUSED: Final = 2

_CPU_LIMIT_S: Final = 120  # ten times what 10,000 services with 100,000 endpoints take


def main(argv: Sequence[str] | None = None) -> int:
    """Writes the messages of the resources in some files. Returns the exit status."""
    options = _parser().parse_args(argv)
    resource.setrlimit(resource.RLIMIT_CPU, (_CPU_LIMIT_S, _CPU_LIMIT_S))
    try:
        mesh = Mesh.build(read_files(options.files), options.trust_domain, options.root_namespace)
        bodies = {**mesh.records(), **_address_shards(mesh)}
        frames = [_frame(topic, _encode(topic, options, body)) for topic, body in bodies.items()]
    except (ResourceErrors, IdentityError, MessageError) as error:
        print(error, file=sys.stderr)
        return REFUSED
    for warning in mesh.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    sys.stdout.buffer.writelines(frames)
    sys.stdout.buffer.flush()
    return 0


def read_files(paths: Sequence[Path]) -> list[Resource]:
    """The resources of some files, and of the YAML files right inside some directories. Raises ResourceErrors."""
    errors: list[ResourceError] = []
    found: list[Resource] = []
    pending = list(paths)  # a directory puts its files at the end
    for path in pending:
        try:
            if path.is_dir():
                pending += sorted(file for file in path.iterdir() if _is_ours(file))
            else:
                found += resources.parse(_read(path), str(path))
        except ResourceErrors as error:
            errors += error.errors
        except OSError as error:
            errors.append(ResourceError(str(path), 0, "", f"cannot be read: {error.strerror}"))
        except UnicodeDecodeError as error:
            errors.append(ResourceError(str(path), 0, "", f"byte {error.start} is not UTF-8; save it as UTF-8"))
    if errors:
        raise ResourceErrors(errors)
    return found


def _address_shards(mesh: Mesh) -> dict[str, Body]:
    """Topic -> body of the address shards. Nobody signs them: whoever can write the files is trusted anyway."""
    return {
        topics.format_topic(mesh.trust_domain, AddressesTopic(shard)): index.write(content)
        for shard, content in index.shard_addresses(mesh.residents()).items()
    }


def _is_ours(file: Path) -> bool:
    """Whether a directory's entry is a YAML file, and no editor's hidden copy of one."""
    return file.suffix in (".yaml", ".yml") and not file.name.startswith(".") and not file.is_dir()


def _read(path: Path) -> str:
    """The text of a file, not more than is read anyway; the parser refuses what is too long."""
    with path.open(encoding="utf-8-sig", errors="strict") as file:
        return file.read(document.MAX_CHARACTERS + 1)


def _encode(topic: str, options: argparse.Namespace, body: Body) -> bytes:
    try:
        return messages.encode(Envelope(options.epoch, options.version, options.issued_at, body))
    except MessageError as error:
        raise MessageError(f"{topic}: {error}") from None


def _frame(topic: str, payload: bytes) -> bytes:
    pair: bytes = msgpack.packb([topic, payload], use_bin_type=True)
    return struct.pack("!I", len(pair)) + pair


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m control.client.render", description=__doc__)
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE", help="YAML file, or directory of such")
    parser.add_argument("--trust-domain", required=True)
    parser.add_argument("--root-namespace", default=DEFAULT_ROOT_NAMESPACE)
    parser.add_argument("--epoch", required=True, type=int)
    parser.add_argument("--version", required=True, type=int)
    parser.add_argument("--issued-at", required=True, type=int, help="Unix time in seconds")
    return parser


if __name__ == "__main__":
    sys.exit(main())
