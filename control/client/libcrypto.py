"""What `ssl` does not offer of the libcrypto that it has loaded anyway: checks what the control plane signed, and says
which cipher suites are preferred.

`cryptography` would cost every proxy 14 MB. The config key is one Ed25519 key that the CA certifies for the control
plane's identity and for signing configuration alone (`control.api.signing`).
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Final, Protocol, cast

from control.api.identity import TrustDomain, make_id
from control.api.index import Trust
from control.api.messages import Envelope
from control.api.policy import DEFAULT_ROOT_NAMESPACE
from control.api.signing import CONFIG_KEY_OID, SIGNATURE, SIGNATURE_BYTES, signed_bytes
from control.client.libcrypto_abi import ffi
from control.client.x509 import X509Error, read_leaf

_ffi: Final = cast("Any", ffi)

KEY_BYTES: Final = 32
"""Of an Ed25519 public key."""

_NID_ED25519: Final = 1087  # OpenSSL, obj_mac.h
_ED25519_INFO: Final = bytes.fromhex("302a300506032b6570032100")
"""SubjectPublicKeyInfo of an Ed25519 key, up to the key itself (RFC 8410 section 4)."""
_MAX_INTERMEDIATES: Final = 2  # our CA makes one; room for a cross-signed root while roots rotate
_TLS_DEFAULTS: Final = (
    b"openssl_conf = all\n[all]\nssl_conf = tls\n[tls]\nsystem_default = contexts\n[contexts]\nCiphersuites = %b\n"
)
_SECURITY_LEVEL: Final = 2  # OpenSSL's: 112 bits, which leaves out SHA-1 and RSA under 2048


class VerifyError(Exception):
    """What claims to be the control plane's is not; the text says why."""


class _LibCrypto(Protocol):
    def EVP_PKEY_new_raw_public_key(self, type_: int, engine: Any, key: bytes, length: int, /) -> Any: ...
    def EVP_PKEY_free(self, key: Any, /) -> None: ...
    def EVP_MD_CTX_new(self) -> Any: ...
    def EVP_MD_CTX_free(self, context: Any, /) -> None: ...
    def EVP_DigestVerifyInit(self, context: Any, key_context: Any, digest: Any, engine: Any, key: Any, /) -> int: ...
    def EVP_DigestVerify(
        self, context: Any, signature: bytes, signature_length: int, message: bytes, length: int, /
    ) -> int: ...
    def d2i_X509(self, reuse: Any, der: Any, length: int, /) -> Any: ...
    def X509_free(self, certificate: Any, /) -> None: ...
    def X509_get_X509_PUBKEY(self, certificate: Any, /) -> Any: ...
    def i2d_X509_PUBKEY(self, key: Any, der: Any, /) -> int: ...
    def OPENSSL_sk_new_null(self) -> Any: ...
    def OPENSSL_sk_push(self, stack: Any, item: Any, /) -> int: ...
    def OPENSSL_sk_free(self, stack: Any, /) -> None: ...
    def X509_STORE_CTX_new(self) -> Any: ...
    def X509_STORE_CTX_free(self, context: Any, /) -> None: ...
    def X509_STORE_CTX_init(self, context: Any, store: Any, leaf: Any, untrusted: Any, /) -> int: ...
    def X509_STORE_CTX_set0_trusted_stack(self, context: Any, trusted: Any, /) -> None: ...
    def X509_STORE_CTX_get0_param(self, context: Any, /) -> Any: ...
    def X509_VERIFY_PARAM_set_time(self, parameters: Any, at: int, /) -> None: ...
    def X509_VERIFY_PARAM_set_depth(self, parameters: Any, depth: int, /) -> None: ...
    def X509_VERIFY_PARAM_set_auth_level(self, parameters: Any, level: int, /) -> None: ...
    def X509_verify_cert(self, context: Any, /) -> int: ...
    def X509_STORE_CTX_get_error(self, context: Any, /) -> int: ...
    def X509_verify_cert_error_string(self, error: int, /) -> Any: ...
    def BIO_new_mem_buf(self, text: bytes, length: int, /) -> Any: ...
    def BIO_free(self, file: Any, /) -> object: ...
    def NCONF_new(self, method: Any, /) -> Any: ...
    def NCONF_load_bio(self, configuration: Any, file: Any, line: Any, /) -> int: ...
    def NCONF_free(self, configuration: Any, /) -> None: ...
    def OPENSSL_load_builtin_modules(self) -> None: ...
    def CONF_modules_load(self, configuration: Any, application: Any, flags: int, /) -> int: ...
    def ERR_clear_error(self) -> None: ...


def _load() -> _LibCrypto:
    """The libcrypto of `ssl`: looking a name up in an extension module looks through what it is linked to as well."""
    specification = importlib.util.find_spec("_ssl")
    origin = specification.origin if specification is not None else None
    return cast("_LibCrypto", _ffi.dlopen(None if origin == "built-in" else origin))


_lib: Final = _load()
_NULL: Final = _ffi.NULL


class ConfigVerifier:
    """Whether messages were signed by the mesh's control plane. Holds one key at a time: of the newest `trust`."""

    def __init__(self, trust_domain: TrustDomain, roots: Callable[[], Sequence[bytes]]) -> None:
        """`roots` gives the DER certificates of the mesh's roots as they are now; rotation changes them."""
        self._identity = str(make_id(trust_domain, DEFAULT_ROOT_NAMESPACE, "control-plane"))
        self._roots = roots
        self._key: bytes | None = None
        self._not_before = 0
        self._not_after = 0

    @property
    def ready(self) -> bool:
        """Whether there is a key to check with."""
        return self._key is not None

    def trust(self, content: Trust, now: float) -> bool:
        """Takes up the key of a certificate that proves itself; whether it is another one than before.

        Raises VerifyError, and then the key of before stays. `now` is Unix time.
        """
        leaf_der, *intermediates = content.certificates
        try:
            leaf = read_leaf(leaf_der)
        except X509Error as error:
            raise VerifyError(f"the config key's certificate: {error.detail}") from None
        if leaf.uri_sans != (self._identity,):
            raise VerifyError(
                f"the config key is certified for {', '.join(leaf.uri_sans) or 'nobody'}, not the control plane"
            )
        if leaf.extended_key_usage != (CONFIG_KEY_OID,):
            raise VerifyError("the config key's certificate is not for signing configuration alone")
        if leaf.is_ca or leaf.key_usage != frozenset({"digitalSignature"}):
            raise VerifyError("the config key's certificate may sign more than configuration")
        verify_chain(leaf_der, intermediates, self._roots(), int(now))
        key = ed25519_key(leaf_der)
        changed = key != self._key
        self._key, self._not_before, self._not_after = key, leaf.not_before, leaf.not_after
        return changed

    def check(self, topic: str, envelope: Envelope, now: float) -> None:
        """Raises VerifyError unless the control plane signed this message for this topic. `now` is Unix time."""
        if self._key is None:
            raise VerifyError("no config key is known yet")
        if not self._not_before <= now <= self._not_after:
            raise VerifyError("the config key's certificate is not valid now: check the clocks here and there")
        signature = envelope.body.get(SIGNATURE) if envelope.body is not None else None
        if not isinstance(signature, bytes) or len(signature) != SIGNATURE_BYTES:
            raise VerifyError("unsigned")
        if not verify_ed25519(self._key, signed_bytes(topic, envelope), signature):
            raise VerifyError("altered, or signed by another key")


def verify_ed25519(key: bytes, message: bytes, signature: bytes) -> bool:
    """Whether a signature (RFC 8032, pure Ed25519) over a message is by this public key; some 0.1 ms."""
    if len(key) != KEY_BYTES or len(signature) != SIGNATURE_BYTES:
        return False
    with (
        _owned(_lib.EVP_PKEY_new_raw_public_key(_NID_ED25519, _NULL, key, len(key)), _lib.EVP_PKEY_free) as public,
        _owned(_lib.EVP_MD_CTX_new(), _lib.EVP_MD_CTX_free) as context,
    ):
        return (
            _lib.EVP_DigestVerifyInit(context, _NULL, _NULL, _NULL, public) == 1
            and _lib.EVP_DigestVerify(context, signature, len(signature), message, len(message)) == 1
        )


def verify_chain(leaf: bytes, intermediates: Sequence[bytes], roots: Sequence[bytes], at: int) -> None:
    """Raises VerifyError unless the certificates (DER) lead from the leaf to a root, all valid at a Unix time."""
    if len(intermediates) > _MAX_INTERMEDIATES:
        raise VerifyError(f"{len(intermediates)} intermediate certificates; at most {_MAX_INTERMEDIATES} are looked at")
    with (
        _certificates([leaf]) as (first,),
        _certificates(intermediates) as untrusted,
        _certificates(roots) as trusted,
        _stack(untrusted) as untrusted_stack,
        _stack(trusted) as trusted_stack,
        _owned(_lib.X509_STORE_CTX_new(), _lib.X509_STORE_CTX_free) as context,
    ):
        if _lib.X509_STORE_CTX_init(context, _NULL, first, untrusted_stack) != 1:
            raise MemoryError("X509_STORE_CTX_init")
        _lib.X509_STORE_CTX_set0_trusted_stack(context, trusted_stack)
        parameters = _lib.X509_STORE_CTX_get0_param(context)
        _lib.X509_VERIFY_PARAM_set_time(parameters, at)
        _lib.X509_VERIFY_PARAM_set_depth(parameters, _MAX_INTERMEDIATES)
        _lib.X509_VERIFY_PARAM_set_auth_level(parameters, _SECURITY_LEVEL)
        if _lib.X509_verify_cert(context) != 1:
            reason: bytes = _ffi.string(_lib.X509_verify_cert_error_string(_lib.X509_STORE_CTX_get_error(context)))
            raise VerifyError(f"the certificate does not lead to the mesh's root: {reason.decode()}")


def ed25519_key(certificate: bytes) -> bytes:
    """The public key in a certificate (DER). Raises VerifyError when it is none of Ed25519."""
    with _certificates([certificate]) as (one,):
        public = _lib.X509_get_X509_PUBKEY(one)
        length = _lib.i2d_X509_PUBKEY(public, _NULL)
        if length == len(_ED25519_INFO) + KEY_BYTES:
            buffer = _ffi.new("unsigned char[]", length)
            _lib.i2d_X509_PUBKEY(public, _ffi.new("unsigned char **", buffer))
            info = bytes(_ffi.buffer(buffer))
            if info.startswith(_ED25519_INFO):
                return info.removeprefix(_ED25519_INFO)
    raise VerifyError("the config key is no Ed25519 key")


def prefer_cipher_suites(names: Sequence[str]) -> None:
    """The TLS 1.3 suites of all SSL contexts that this process makes from now on, the preferred one first.

    It takes the place of what openssl.cnf says of TLS, and of nothing else there (config(5), "SSL Configuration").
    Where OpenSSL does not take it, its own order stays.
    """
    text = _TLS_DEFAULTS % ":".join(names).encode()
    with (
        _owned(_lib.BIO_new_mem_buf(text, len(text)), _lib.BIO_free) as file,
        _owned(_lib.NCONF_new(_NULL), _lib.NCONF_free) as configuration,
    ):
        _lib.OPENSSL_load_builtin_modules()
        if _lib.NCONF_load_bio(configuration, file, _NULL) == 1:
            _lib.CONF_modules_load(configuration, _NULL, 0)


@contextmanager
def _owned(pointer: Any, free: Callable[[Any], object]) -> Iterator[Any]:
    """Frees what OpenSSL made, and leaves no error of ours in its queue for `ssl` to find."""
    if pointer == _NULL:
        _lib.ERR_clear_error()
        raise MemoryError("OpenSSL has no memory")
    try:
        yield pointer
    finally:
        free(pointer)
        _lib.ERR_clear_error()


@contextmanager
def _certificates(ders: Sequence[bytes]) -> Iterator[list[Any]]:
    """Certificates parsed by OpenSSL. Raises VerifyError."""
    parsed: list[Any] = []
    try:
        for der in ders:
            parsed.append(_parsed(der))
        yield parsed
    finally:
        for certificate in parsed:
            _lib.X509_free(certificate)
        _lib.ERR_clear_error()


def _parsed(der: bytes) -> Any:
    start = _ffi.from_buffer("unsigned char[]", der)
    at = _ffi.new("const unsigned char **", start)
    certificate = _lib.d2i_X509(_NULL, at, len(der))
    if certificate == _NULL:
        raise VerifyError("a certificate that cannot be read")
    if at[0] != start + len(der):
        _lib.X509_free(certificate)
        raise VerifyError("bytes follow a certificate")
    return certificate


@contextmanager
def _stack(items: Sequence[Any]) -> Iterator[Any]:
    """A stack of pointers, which it does not own."""
    with _owned(_lib.OPENSSL_sk_new_null(), _lib.OPENSSL_sk_free) as stack:
        for item in items:
            if _lib.OPENSSL_sk_push(stack, item) == 0:
                raise MemoryError("OpenSSL has no memory")
        yield stack
