"""Reads which instances each workload has: their service account and their node.

Two forms: what `kubectl get pods -A -o json` prints, and CSV with the columns namespace, workload, service_account and
node, and a row for each instance.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final, NamedTuple

COLUMNS: Final = ("namespace", "workload", "service_account", "node")
_OVER: Final = ("Succeeded", "Failed")


class PlanError(Exception):
    """Something that was given cannot be planned with: says what, and what would do."""


class Workload(NamedTuple):
    """As Istio's labels call it: the Deployment's name, not the pod's."""

    namespace: str
    name: str

    def __str__(self) -> str:
        return f"{self.namespace}/{self.name}"


class Instance(NamedTuple):
    """One pod, or one process on a machine. `name` tells those of a workload apart."""

    workload: Workload
    name: str
    account: str
    node: str


def read(text: str) -> list[Instance]:
    """Either form. Raises PlanError."""
    found = list(_pods(text) if text.lstrip().startswith("{") else _rows(text))
    if not found:
        raise PlanError("the topology has no instance of any workload")
    return found


def of(workloads: Sequence[Workload], instances: Sequence[Instance]) -> list[Instance]:
    """The instances of these workloads, each of which has to have one. Raises PlanError."""
    wanted = set(workloads)
    found = [one for one in instances if one.workload in wanted]
    missing = sorted(wanted - {one.workload for one in found})
    if missing:
        raise PlanError(
            f"nothing says on which nodes {len(missing)} of {len(wanted)} workloads are, {missing[0]} for one: give "
            f"--topology, as CSV ({','.join(COLUMNS)}) or from kubectl get pods -A -o json"
        )
    return found


def _rows(text: str) -> Iterator[Instance]:
    rows = csv.DictReader(text.splitlines())
    if not set(COLUMNS) <= set(rows.fieldnames or ()):
        raise PlanError(f"the first line of the topology has to name its columns: {','.join(COLUMNS)}")
    for row in rows:
        namespace, workload, account, node = (str(row[name] or "").strip() for name in COLUMNS)
        if not (namespace and workload and account and node):
            raise PlanError(f"line {rows.line_num} of the topology lacks a value: {','.join(COLUMNS)}")
        yield Instance(Workload(namespace, workload), str(rows.line_num), account, node)


def _pods(text: str) -> Iterator[Instance]:
    try:
        listed: Any = json.loads(text)
        for pod in listed["items"]:
            metadata, spec = pod["metadata"], pod["spec"]
            if pod.get("status", {}).get("phase") not in _OVER and spec.get("nodeName"):
                workload = Workload(metadata["namespace"], _owner(metadata))
                yield Instance(workload, metadata["name"], spec.get("serviceAccountName", "default"), spec["nodeName"])
    except ValueError as error:
        raise PlanError(f"the topology begins as JSON and is none: {error}") from error
    except (KeyError, TypeError, AttributeError) as error:
        raise PlanError(f"the topology is no list of pods, which lacks {error}: kubectl get pods -A -o json") from error


def _owner(metadata: Mapping[str, Any]) -> str:
    """What Istio calls the pod's workload: a Deployment's pod belongs to its ReplicaSet, whose name ends in a hash."""
    owner = next((one for one in metadata.get("ownerReferences", ()) if one.get("controller")), None)
    if owner is None:
        return str(metadata["name"])
    ending = f"-{metadata.get('labels', {}).get('pod-template-hash', '')}"
    name = str(owner["name"])
    return name.removesuffix(ending) if owner["kind"] == "ReplicaSet" else name
