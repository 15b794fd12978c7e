"""Certificates over HTTPS (port 15012): the one door of the control plane that is open to every host.

    GET  /v1/bundle   the roots, in PEM; a joining workload compares them with the digest in its token
    POST /v1/join     a token and a CSR; no client certificate
    POST /v1/renew    a CSR; the client certificate says whose
    POST /v1/token    a waypoint's process that the agent of its node starts; the client certificate is the agent's

A refusal is JSON, {"error": text}: 4xx is for good, 429 and 5xx are worth another try. Whoever dials has 10 s for the
handshake and 30 s for everything; each source may dial so often, and all together so many at once.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import ipaddress
import json
import logging
import socket
import ssl
from collections import Counter
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from aiohttp import web
from aiohttp.abc import AbstractStreamWriter
from aiohttp.http_parser import RawRequestMessage
from aiohttp.streams import StreamReader

from control.server.enrolment import Enrolment, EnrolmentError, Issued

MAX_CONNECTIONS: Final = 512
MAX_BODY_BYTES: Final = 32 * 1024  # a CSR of P-256 has half a kilobyte, and 16 KiB are all that the CA reads
HANDSHAKE_TIMEOUT_S: Final = 10.0
CONNECTION_TIMEOUT_S: Final = 30.0
"""From the handshake's end to the connection's: one exchange takes milliseconds, and a slow sender holds a place."""
SILENCE_S: Final = 1.0
"""After so long without a whole request, a connection makes room for another where there are too many."""

# A host that boots with 100 workloads joins each with two connections, and many hosts may share one address.
SOURCE_BURST: Final = 400
SOURCE_RATE_PER_S: Final = 50.0
_MAX_SOURCES: Final = 10_000

_ACCEPT_PAUSE_S: Final = 1.0

_log = logging.getLogger(__name__)


class Arrivals:
    """Counts who dials how often: a token bucket for each source, which is an IPv4 address or an IPv6 /64."""

    def __init__(self) -> None:
        self._buckets: dict[str, tuple[float, float]] = {}  # source -> (tokens, time of that count), oldest first

    def admit(self, address: str, now: float) -> bool:
        """Whether a connection from this address may go on; `now` in seconds of any steady clock."""
        source = _source(address)
        tokens, counted_at = self._buckets.pop(source, (float(SOURCE_BURST), now))
        tokens = min(SOURCE_BURST, tokens + (now - counted_at) * SOURCE_RATE_PER_S)
        admitted = tokens >= 1
        self._buckets[source] = (tokens - 1 if admitted else tokens, now)
        if len(self._buckets) > _MAX_SOURCES:
            del self._buckets[next(iter(self._buckets))]
        return admitted


def _source(address: str) -> str:
    """What one tenant of a network can choose freely is one source."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv4Address):
        return str(ip)
    if ip.ipv4_mapped is not None:
        return str(ip.ipv4_mapped)
    return str(ipaddress.ip_network((ip, 64), strict=False))


def server_context(identity_dir: Path) -> ssl.SSLContext:
    """TLS 1.3 with the control plane's own certificate; asks for a client certificate, and takes none but the mesh's.

    Raises OSError and ssl.SSLError when the directory holds no usable identity.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.load_cert_chain(identity_dir / "chain.pem", identity_dir / "key.pem")
    context.load_verify_locations(identity_dir / "bundle.pem")
    context.verify_mode = ssl.CERT_OPTIONAL
    context.num_tickets = 0  # a resumed session would carry a client certificate past its end
    return context


@dataclass(frozen=True, slots=True)
class Doors:
    """Where workloads find the control plane, as they are told when they join."""

    control: str
    """`https://host:15012`."""
    brokers: tuple[str, ...]
    """`mqtts://host:8883`, any of which will do."""


class CertificateServer:
    """Serves `Enrolment` over HTTPS."""

    def __init__(self, enrolment: Enrolment, doors: Doors, context: ssl.SSLContext) -> None:
        self._enrolment = enrolment
        self._doors = doors
        self.context = context
        """Of the connections to come; replaced when the control plane's certificate is renewed."""
        self.issued = 0
        """Certificates."""
        self.refused: Counter[int] = Counter()
        """Status -> requests for one that were refused."""
        self._arrivals = Arrivals()
        self._handshakes = 0
        self._silent: dict[object, tuple[float, Callable[[], object]]] = {}
        """Connections that have not asked for a certificate yet, oldest first: since when, and what ends them."""
        # One at a time, as the store is written; and not in the loop's own threads, which the publisher needs too.
        self._worker = ThreadPoolExecutor(1, "certificates")

    async def run(self, listening: socket.socket) -> None:
        """Serve a listening, non-blocking socket until cancelled."""
        loop = asyncio.get_running_loop()
        server = web.Server(self._answer, request_factory=_request, access_log=None, auto_decompress=False)
        try:
            async with asyncio.TaskGroup() as group:
                while True:
                    try:
                        connection, peer = await loop.sock_accept(listening)
                    except ConnectionAbortedError:
                        continue
                    except OSError as error:  # no descriptors or memory left: others must give some back first
                        _log.warning("certificates: cannot accept a connection: %s", error.strerror)
                        await asyncio.sleep(_ACCEPT_PAUSE_S)
                        continue
                    crowded = len(server.connections) + self._handshakes >= MAX_CONNECTIONS
                    if not self._arrivals.admit(peer[0], loop.time()) or (crowded and not await self._make_room()):
                        connection.close()
                    else:
                        self._handshakes += 1
                        opening = group.create_task(self._open(connection, server))
                        self._silent[connection] = loop.time(), opening.cancel
        finally:
            await server.shutdown(timeout=1.0)
            self._worker.shutdown(wait=False)

    async def _make_room(self) -> bool:
        """Ends the connection that has been silent for longest, if that is long."""
        now = asyncio.get_running_loop().time()
        for silent, (since, end) in list(self._silent.items()):
            if now - since < SILENCE_S:
                break
            del self._silent[silent]
            if not (isinstance(silent, asyncio.BaseTransport) and silent.is_closing()):
                end()
                await asyncio.sleep(0)
                return True
        return False

    async def _open(self, connection: socket.socket, server: web.Server) -> None:
        """The handshake; then the connection is the server's, for a while."""
        loop = asyncio.get_running_loop()
        try:
            transport, _ = await loop.connect_accepted_socket(
                server,
                connection,
                ssl=self.context,
                ssl_handshake_timeout=HANDSHAKE_TIMEOUT_S,
                ssl_shutdown_timeout=HANDSHAKE_TIMEOUT_S,
            )
        except OSError as error:  # ssl.SSLError is one
            _log.info("certificates: a handshake failed: %s", error)
        else:
            self._silent[transport] = loop.time(), transport.abort
            loop.call_later(CONNECTION_TIMEOUT_S, self._end, transport)
        finally:
            self._silent.pop(connection, None)
            self._handshakes -= 1

    def _end(self, transport: asyncio.Transport) -> None:
        self._silent.pop(transport, None)
        _end(transport)

    async def _answer(self, request: web.BaseRequest) -> web.StreamResponse:
        response = await self._response(request)
        if request.path in ("/v1/join", "/v1/renew"):
            if response.status == 200:
                self.issued += 1
            else:
                self.refused[response.status] += 1
        return response

    async def _response(self, request: web.BaseRequest) -> web.StreamResponse:
        try:
            match request.method, request.path:
                case "GET", "/v1/bundle":
                    return web.Response(body=self._enrolment.bundle_pem, content_type="application/x-pem-file")
                case "POST", "/v1/join":
                    body = await _body(request, ("id", "secret", "csr"))
                    self._silent.pop(request.transport, None)
                    secret = _secret(body["secret"])
                    return await self._issued(self._enrolment.join, body["id"], secret, body["csr"].encode())
                case "POST", "/v1/renew":
                    certificate = _client_certificate(request)
                    body = await _body(request, ("workload", "csr"))
                    self._silent.pop(request.transport, None)
                    return await self._issued(
                        self._enrolment.renew, certificate, body["workload"], body["csr"].encode()
                    )
                case "POST", "/v1/token":
                    certificate = _client_certificate(request)
                    body = await _body(request, ("namespace", "workload"))
                    self._silent.pop(request.transport, None)
                    token = await asyncio.get_running_loop().run_in_executor(
                        self._worker,
                        self._enrolment.token_for_placed,
                        certificate,
                        self._doors.control,
                        body["namespace"],
                        body["workload"],
                    )
                    return web.json_response({"token": token.encode()})
        except EnrolmentError as error:
            _log.warning("certificates: refused %s to %s: %s", request.path, request.remote, error)
            return _refusal(error.status, str(error))
        except Exception:
            _log.exception("certificates: %s failed", request.path)
            return _refusal(500, "the control plane failed at this; its log says why. Try again later")
        return _refusal(404, "there is GET /v1/bundle, and POST /v1/join, /v1/renew and /v1/token")

    async def _issued(self, issue: Callable[..., Issued], *arguments: object) -> web.Response:
        """The answer to whoever gets a certificate, which is made in the worker."""
        issued = await asyncio.get_running_loop().run_in_executor(self._worker, issue, *arguments)
        identity = issued.member.identity
        return web.json_response(
            {
                "chain": issued.chain_pem.decode("ascii"),
                "bundle": self._enrolment.bundle_pem.decode("ascii"),
                "membership": {
                    "trust_domain": identity.trust_domain,
                    "namespace": identity.namespace,
                    "service_account": identity.service_account,
                    "workload": issued.member.workload,
                    "addresses": list(issued.member.addresses),
                    "control": self._doors.control,
                    "brokers": list(self._doors.brokers),
                },
            }
        )


def _end(transport: asyncio.Transport) -> None:
    # One that is closed already may have let go of what `abort` needs (Python 3.11).
    if not transport.is_closing():
        transport.abort()


def _request(
    message: RawRequestMessage,
    payload: StreamReader,
    protocol: web.RequestHandler,
    writer: AbstractStreamWriter,
    task: asyncio.Task[None],
) -> web.BaseRequest:
    """aiohttp's own, with our bound on the body."""
    loop = asyncio.get_running_loop()
    return web.BaseRequest(message, payload, protocol, writer, task, loop, client_max_size=MAX_BODY_BYTES)


async def _body(request: web.BaseRequest, fields: tuple[str, ...]) -> Mapping[str, str]:
    """The JSON object of a request, with exactly these fields, each of them text. Raises EnrolmentError."""
    try:
        body = json.loads(await request.read())
    except web.HTTPRequestEntityTooLarge:
        raise EnrolmentError(413, f"the request has more than {MAX_BODY_BYTES} bytes") from None
    except (ValueError, RecursionError):
        raise EnrolmentError(400, "the request is not JSON") from None
    if (
        type(body) is not dict
        or body.keys() != set(fields)
        or not all(type(value) is str and value.isascii() for value in body.values())
    ):
        raise EnrolmentError(400, f"the request must be a JSON object of texts: {', '.join(fields)}")
    return body


def _secret(text: str) -> bytes:
    try:
        return base64.b64decode(text + "=" * (-len(text) % 4), altchars=b"-_", validate=True)
    except (ValueError, binascii.Error):
        raise EnrolmentError(400, "the secret is not base64url") from None


def _client_certificate(request: web.BaseRequest) -> bytes:
    """DER of the certificate that the client proved to hold, which TLS has verified. Raises EnrolmentError."""
    connection = request.get_extra_info("ssl_object")
    certificate = connection.getpeercert(binary_form=True) if connection is not None else None
    if certificate is None:
        raise EnrolmentError(401, "this needs the current certificate: dial with it, or join with a new token")
    return bytes(certificate)


def _refusal(status: int, text: str) -> web.Response:
    return web.json_response({"error": text}, status=status)
