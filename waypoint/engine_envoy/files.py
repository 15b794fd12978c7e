"""The files that Envoy reads its configuration from: each is replaced whole, by rename, when its content changes."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Final

from waypoint.engine_envoy.extensions import file_of
from waypoint.engine_envoy.parts import Json, digest, message
from waypoint.engine_envoy.rendering import HBONE, Layout, Rendering
from waypoint.engine_envoy.rules import revoked

_LISTENER = "config.listener.v3.Listener"
_CLUSTER = "config.cluster.v3.Cluster"
_ENDPOINTS = "config.endpoint.v3.ClusterLoadAssignment"
_ROUTES = "config.route.v3.RouteConfiguration"
_FILTER = "config.core.v3.TypedExtensionConfig"
_SECRET = "extensions.transport_sockets.tls.v3.Secret"

REVOKED_CALLERS: Final = "extension_config_discovery.http_filter.revoked"
OWN: Final = "sds.own"
ROOTS: Final = "sds.roots"
"""As the statistics of what Envoy reads are named."""


class Files:
    """Those of one Envoy."""

    def __init__(self, layout: Layout) -> None:
        self._layout = layout
        self._written: dict[str, str] = {}
        """Path -> version."""
        self._revocations: set[int] = set()
        """Of whom is believed: those that something may still read."""
        self.secrets: dict[str, str] = {}
        """Versions of what `write_secrets` has written."""

    def clear(self) -> None:
        """Make room, and remove what processes have left that are gone. Raises OSError."""
        own = self._layout.directory
        for other in own.parent.glob(f"{own.name.rstrip('0123456789')}*"):
            pid = other.name.rpartition("-")[2]
            if other == own or (pid.isdecimal() and not Path("/proc", pid).exists()):
                shutil.rmtree(other)
        own.mkdir(mode=0o700)

    def write_secrets(
        self, chain_and_key: bytes, roots: bytes, revocations: bytes, serials: Collection[int], revocation: int
    ) -> None:
        """The waypoint's own certificate with its key, and whom it believes; PEM. Raises OSError.

        `serials`: of the certificates in `revocations`. `revocation`: of which renderings (`Rendering.revocation`);
        former ones believe the same from now on.
        """
        pem = {"inline_string": chain_and_key.decode("ascii")}
        own = message(_SECRET, name="own", tls_certificate=dict.fromkeys(_HALVES, pem))
        context: Json = {"trusted_ca": {"inline_string": roots.decode("ascii")}}
        if revocations:
            context["crl"] = {"inline_string": revocations.decode("ascii")}
            context["only_verify_leaf_cert_crl"] = True
        believed = message(_SECRET, name="roots", validation_context=context)
        self._revocations.add(revocation)
        self.secrets = {
            REVOKED_CALLERS: self._replace("revoked", "", [message(_FILTER, **revoked(serials))]),
            OWN: self._replace("own", "", [own]),
        }
        for one in self._revocations:
            self.secrets[ROOTS] = self._replace("roots", str(one), [believed])

    def write_bootstrap(self, bootstrap: Json) -> Path:
        """Raises OSError."""
        path = self._layout.directory / "bootstrap.json"
        _write(path, bootstrap)
        return path

    def write_places(self, rendering: Rendering) -> dict[str, str]:
        """Everything but the routes of places that there were before. Returns the versions (see `versions`)."""
        versions: dict[str, str] = {}
        for module in rendering.modules.values():
            path = file_of(self._layout.directory, module)
            if str(path) not in self._written:
                _write_bytes(path, module.content)
                self._written[str(path)] = module.name
        for name, endpoints in rendering.endpoints.items():
            versions[f"cluster.{name}"] = self._replace("endpoints", name, [message(_ENDPOINTS, **endpoints)])
        versions["cluster_manager.cds"] = self._replace("clusters", "", _all(_CLUSTER, rendering.clusters))
        tokens = self._replace("tokens", "", [message(_FILTER, **rendering.tokens)])
        if rendering.routes.keys() - {HBONE}:  # else there is no place of HTTP, and Envoy does not ask for them
            versions["extension_config_discovery.http_filter.tokens"] = tokens
        for name, routes in rendering.routes.items():
            if self._layout.file("routes", name) not in self._written:
                versions.update(self.write_routes({name: routes}))
        versions["listener_manager.lds"] = self._replace("listeners", "", _all(_LISTENER, rendering.listeners))
        return versions

    def write_routes(self, routes: Mapping[str, Json]) -> dict[str, str]:
        """What holds at places. Returns the versions. Raises OSError."""
        return {
            f"rds.{name}": self._replace("routes", name, [message(_ROUTES, **content)])
            for name, content in routes.items()
        }

    def sweep(self, rendering: Rendering) -> None:
        """Remove what nothing of a rendering reads."""
        kept = {self._layout.file(kind) for kind in ("own", "revoked", "clusters", "listeners", "tokens")}
        self._revocations = {rendering.revocation, max(self._revocations)}
        kept |= {self._layout.file("roots", str(one)) for one in self._revocations}
        kept |= {self._layout.file("routes", name) for name in (*rendering.routes, "probe")}
        kept |= {self._layout.file("endpoints", name) for name in rendering.endpoints}
        kept |= {str(file_of(self._layout.directory, module)) for module in rendering.modules.values()}
        for path in [path for path in self._written if path not in kept]:
            del self._written[path]
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)

    def _replace(self, kind: str, name: str, resources: Iterable[Json]) -> str:
        """The version, which is the content."""
        path = self._layout.file(kind, name)
        listed = list(resources)
        version = digest(listed)
        if self._written.get(path) != version:
            _write(Path(path), {"version_info": version, "resources": listed})
            self._written[path] = version
        return version


_HALVES = ("certificate_chain", "private_key")


def _all(kind: str, resources: Mapping[str, Json]) -> list[Json]:
    return [message(kind, **resources[name]) for name in sorted(resources)]


def _write(path: Path, content: Json) -> None:
    _write_bytes(path, json.dumps(content).encode())


def _write_bytes(path: Path, content: bytes) -> None:
    """By rename: Envoy looks for files that were moved here."""
    fresh = path.with_name(f".{path.name}")
    with os.fdopen(os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
        file.write(content)
    os.rename(fresh, path)
