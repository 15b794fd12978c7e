"""Workloads found by namespace and labels, without holding every selector against every workload."""

from __future__ import annotations

from collections.abc import Iterable

from control.api.labels import Labels, selects
from control.api.workload import Workload


class Workloads:
    """An index over workloads; it does not change."""

    def __init__(self, workloads: Iterable[Workload]) -> None:
        self._by_namespace: dict[str, list[Workload]] = {}
        self._by_label: dict[tuple[str, str, str], list[Workload]] = {}
        for workload in workloads:
            self._by_namespace.setdefault(workload.namespace, []).append(workload)
            for name, value in workload.labels.items():
                self._by_label.setdefault((workload.namespace, name, value), []).append(workload)

    def selected(self, namespace: str, selector: Labels) -> list[Workload]:
        """Those of a namespace that a selector selects, in the order they were given."""
        # The rarest label leaves the fewest to look at.
        having = [self._by_label.get((namespace, name, value), []) for name, value in selector.items()]
        candidates = min(having, key=len) if having else self._by_namespace.get(namespace, [])
        return [workload for workload in candidates if selects(selector, workload.labels)]

    def any_selected(self, namespaces: Iterable[str] | None, selector: Labels) -> bool:
        """Whether a selector selects any, in some namespaces or (None) in all."""
        scope = self._by_namespace if namespaces is None else namespaces
        return any(self.selected(namespace, selector) for namespace in scope)
