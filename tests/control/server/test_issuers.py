"""Keys that issuers publish: fetched over real HTTPS, kept, and published to waypoints when they change."""

from __future__ import annotations

import asyncio
import base64
import ipaddress
import json
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from aiohttp import web
from cryptography import x509

from control.api.jwt import MAX_JWKS, NO_KEYS, canonical_jwks
from control.api.problems import ResourceErrors
from control.server import issuers
from control.server.ca import Authority
from control.server.core import Core
from control.server.issuers import Issuers
from control.server.signing import ConfigKey
from control.server.store import Store
from tests.support.certificates import forge, usage
from tests.support.desired import service
from tests.support.published import Shelf
from tests.support.waiting import until

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


def jwks(number: int) -> str:
    x = base64.urlsafe_b64encode(bytes([number]) * 32).decode().rstrip("=")
    return json.dumps({"keys": [{"kty": "OKP", "crv": "Ed25519", "x": x}]})


def asking(uri: str, name: str = "users", namespace: str = "shop") -> str:
    return (
        "apiVersion: security.istio.io/v1\nkind: RequestAuthentication\n"
        f"metadata: {{name: {name}, namespace: {namespace}}}\n"
        "spec:\n  targetRefs: [{group: '', kind: Service, name: web}]\n"
        f"  jwtRules: [{{issuer: accounts, jwksUri: '{uri}'}}]\n"
    )


class Plane:
    def __init__(self, directory: Path) -> None:
        self.path, self.ca = directory / "mesh.db", directory / "ca"
        self.authority = Authority.create(self.ca, "cluster.local")
        self.shelf = Shelf()
        self.start()

    def start(self) -> None:
        self.store = Store(self.path)
        self.core = Core(self.store, self.authority, ConfigKey.open(self.ca, self.authority, 1_800_000_000.0))
        self.shelf.connect(self.core)
        self.issuers = Issuers(self.core)

    def restart(self) -> None:
        self.store.close()
        self.start()

    def apply(self, *texts: str) -> list[str]:
        return [str(w) for w in self.core.apply([("t.yaml", "---\n".join(texts))]).warnings]

    def published(self, name: str = "users") -> str:
        self.shelf.drain(self.core)
        found: str = self.shelf.read().records[f"reqauth/shop/{name}"]["rules"][0]["jwks"]
        return found


@pytest.fixture
def plane(tmp_path: Path) -> Plane:
    return Plane(tmp_path)


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(issuers, "LOOK_S", 0.02)
    monkeypatch.setattr(issuers, "RETRY_S", 0.05)
    monkeypatch.setattr(issuers, "REFRESH_S", 0.1)


@asynccontextmanager
async def serving(
    directory: Path, handler: Handler, plane: Plane, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[str]:
    """An issuer, and a control plane that fetches from it."""
    root = forge(None, (), ca=True, key_usage=usage(key_cert_sign=True), purposes=None)
    name = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
    identity = forge(root, (), extra=[(name, False)]).write(directory / "issuer", root.chain_pem)
    monkeypatch.setenv("SSL_CERT_FILE", str(identity / "bundle.pem"))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(identity / "chain.pem", identity / "key.pem")
    app = web.Application()
    app.router.add_get("/keys", handler)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0, ssl_context=context)
    await site.start()
    task = asyncio.get_running_loop().create_task(plane.issuers.run())
    try:
        yield f"https://127.0.0.1:{runner.addresses[0][1]}/keys"
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await runner.cleanup()


def test_they_are_fetched_kept_and_published_when_they_change(
    plane: Plane, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = [jwks(1)]

    async def keys(_: web.Request) -> web.Response:
        return web.Response(text=answers[-1])

    async def main() -> None:
        async with serving(tmp_path, keys, plane, monkeypatch) as uri:
            warnings = plane.apply(service("web"), asking(uri))
            assert any("are fetched now; until they come, tokens of accounts are refused" in one for one in warnings)
            assert plane.published() == NO_KEYS
            await until(lambda: plane.published() == canonical_jwks(jwks(1)))
            answers.append(jwks(2))
            await until(lambda: plane.published() == canonical_jwks(jwks(2)))
            stamp = plane.store.stamp()
            await asyncio.sleep(0.3)
            assert plane.store.stamp() == stamp, "keys that are as they were change nothing"
        assert plane.issuers.problems() == []
        plane.restart()
        plane.apply(service("web", labels="version: v2"), asking(uri))
        assert plane.published() == canonical_jwks(jwks(2)), "kept while nobody can fetch them"

    asyncio.run(main())


@pytest.mark.parametrize(
    ("answer", "problem"),
    [
        (web.Response(status=500), "the answer is 500, not 200"),
        (web.Response(status=302, headers={"location": "/keys"}), "the answer is 302, not 200"),
        (web.Response(text="no"), "is not JSON"),
        (web.Response(text='{"keys": [{"kty": "oct"}]}'), "a symmetric key"),
        (web.Response(body=b"\xff"), "invalid start byte"),
        (web.Response(text=" " * (MAX_JWKS + 1)), f"longer than {MAX_JWKS} bytes"),
    ],
)
def test_what_is_no_key_set_leaves_the_keys_as_they_were(
    plane: Plane, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answer: web.Response, problem: str
) -> None:
    broken: list[bool] = []

    async def keys(_: web.Request) -> web.Response:
        if broken:
            return web.Response(status=answer.status, headers=answer.headers, body=answer.body)
        return web.Response(text=jwks(1))

    async def main() -> None:
        async with serving(tmp_path, keys, plane, monkeypatch) as uri:
            plane.apply(service("web"), asking(uri))
            await until(lambda: plane.published() == canonical_jwks(jwks(1)))
            broken.append(True)
            await until(lambda: any(problem in found for found in plane.issuers.problems()))
            assert plane.published() == canonical_jwks(jwks(1))
            broken.clear()
            await until(lambda: not plane.issuers.problems())

    asyncio.run(main())


def test_who_shows_no_certificate_that_is_trusted_gives_no_keys(
    plane: Plane, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def keys(_: web.Request) -> web.Response:
        return web.Response(text=jwks(1))

    async def main() -> None:
        async with serving(tmp_path, keys, plane, monkeypatch) as uri:
            plane.apply(service("web"), asking(uri.replace("127.0.0.1", "localhost")))
            await until(lambda: any("CERTIFICATE_VERIFY_FAILED" in found for found in plane.issuers.problems()))
            assert plane.published() == NO_KEYS

    asyncio.run(main())


def test_keys_that_nobody_asks_for_any_more_are_forgotten(plane: Plane) -> None:
    one, two = "https://one.example/keys", "https://two.example/keys"
    plane.apply(service("web"), asking(one), asking(two, "others"))
    assert plane.core.key_uris() == {one, two}
    plane.core.take_keys({one: canonical_jwks(jwks(1)), two: canonical_jwks(jwks(2)), "https://x.example": NO_KEYS})
    assert plane.published() == canonical_jwks(jwks(1))
    assert plane.published("others") == canonical_jwks(jwks(2))
    plane.core.delete([("RequestAuthentication", "shop", "others")])
    plane.core.take_keys({})
    assert plane.store.fetched_keys() == {one: canonical_jwks(jwks(1))}
    assert plane.core.key_uris() == {one}


@pytest.mark.parametrize(
    "uri", ["http://issuer.example/keys", "https://", "https:///keys", "https://user@x/keys", "/x"]
)
def test_a_uri_that_anybody_could_answer_is_refused(plane: Plane, uri: str) -> None:
    with pytest.raises(ResourceErrors, match="must begin with https:// and a host"):
        plane.apply(service("web"), asking(uri))
