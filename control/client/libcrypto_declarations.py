"""What `libcrypto` calls in OpenSSL; run as a program, this makes `libcrypto_abi` from it.

cffi can parse these declarations at each start too, but that costs every proxy 24 ms and 1.7 MB for a C parser.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Final

from cffi import FFI

TARGET: Final = Path(__file__).with_name("libcrypto_abi.py")

_HEADER: Final = '''"""Made by `python -m control.client.libcrypto_declarations`; edit that."""

# ruff: noqa
# mypy: ignore-errors
# fmt: off
'''

_DECLARATIONS: Final = """
typedef ... EVP_PKEY;
typedef ... EVP_MD_CTX;
typedef ... X509;
typedef ... X509_PUBKEY;
typedef ... X509_STORE_CTX;
typedef ... X509_VERIFY_PARAM;
typedef ... OPENSSL_STACK;
typedef ... BIO;
typedef ... CONF;

EVP_PKEY *EVP_PKEY_new_raw_public_key(int type, void *engine, const unsigned char *key, size_t length);
void EVP_PKEY_free(EVP_PKEY *key);
EVP_MD_CTX *EVP_MD_CTX_new(void);
void EVP_MD_CTX_free(EVP_MD_CTX *context);
int EVP_DigestVerifyInit(EVP_MD_CTX *context, void *key_context, void *digest, void *engine, EVP_PKEY *key);
int EVP_DigestVerify(EVP_MD_CTX *context, const unsigned char *signature, size_t signature_length,
                     const unsigned char *message, size_t length);

X509 *d2i_X509(X509 **reuse, const unsigned char **der, long length);
void X509_free(X509 *certificate);
X509_PUBKEY *X509_get_X509_PUBKEY(const X509 *certificate);
int i2d_X509_PUBKEY(X509_PUBKEY *key, unsigned char **der);

OPENSSL_STACK *OPENSSL_sk_new_null(void);
int OPENSSL_sk_push(OPENSSL_STACK *stack, const void *item);
void OPENSSL_sk_free(OPENSSL_STACK *stack);

X509_STORE_CTX *X509_STORE_CTX_new(void);
void X509_STORE_CTX_free(X509_STORE_CTX *context);
int X509_STORE_CTX_init(X509_STORE_CTX *context, void *store, X509 *leaf, OPENSSL_STACK *untrusted);
void X509_STORE_CTX_set0_trusted_stack(X509_STORE_CTX *context, OPENSSL_STACK *trusted);
X509_VERIFY_PARAM *X509_STORE_CTX_get0_param(X509_STORE_CTX *context);
void X509_VERIFY_PARAM_set_time(X509_VERIFY_PARAM *parameters, int64_t at);
void X509_VERIFY_PARAM_set_depth(X509_VERIFY_PARAM *parameters, int depth);
void X509_VERIFY_PARAM_set_auth_level(X509_VERIFY_PARAM *parameters, int level);
int X509_verify_cert(X509_STORE_CTX *context);
int X509_STORE_CTX_get_error(X509_STORE_CTX *context);
const char *X509_verify_cert_error_string(long error);

BIO *BIO_new_mem_buf(const void *text, int length);
int BIO_free(BIO *file);
CONF *NCONF_new(void *method);
int NCONF_load_bio(CONF *configuration, BIO *file, long *line);
void NCONF_free(CONF *configuration);
void OPENSSL_load_builtin_modules(void);
int CONF_modules_load(const CONF *configuration, const char *application, unsigned long flags);

void ERR_clear_error(void);
"""


def generate() -> str:
    """The text of `libcrypto_abi`."""
    ffi = FFI()
    ffi.set_source(f"{__package__}.{TARGET.stem}", None)
    ffi.cdef(_DECLARATIONS)
    with tempfile.TemporaryDirectory() as directory:
        made = Path(directory, TARGET.name)
        ffi.emit_python_code(str(made))
        return _HEADER + made.read_text(encoding="ascii").partition("\n")[2]


if __name__ == "__main__":
    TARGET.write_text(generate(), encoding="ascii")
