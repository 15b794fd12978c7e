#include "channel.h"

#include "common.h"

#include <errno.h>
#include <openssl/err.h>
#include <openssl/ssl.h>
#include <openssl/x509v3.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

static SSL_CTX *context;  /* NULL: no TLS */
static const char *wanted;
static SSL *layers[MAX_FD];

/* Whether the certificate has the SPIFFE id that is wanted, which is a URI and no name that libssl would look for. */
static int is_wanted(X509 *certificate)
{
	GENERAL_NAMES *names = X509_get_ext_d2i(certificate, NID_subject_alt_name, NULL, NULL);
	int found = 0;

	for (int i = 0; i < sk_GENERAL_NAME_num(names); i++) {
		const GENERAL_NAME *name = sk_GENERAL_NAME_value(names, i);

		if (name->type == GEN_URI &&
		    (size_t)ASN1_STRING_length(name->d.uniformResourceIdentifier) == strlen(wanted) &&
		    memcmp(ASN1_STRING_get0_data(name->d.uniformResourceIdentifier), wanted, strlen(wanted)) == 0)
			found = 1;
	}
	GENERAL_NAMES_free(names);
	return found;
}

static int check(int valid, X509_STORE_CTX *store)
{
	if (!valid || X509_STORE_CTX_get_error_depth(store) > 0)
		return valid;
	return is_wanted(X509_STORE_CTX_get_current_cert(store));
}

void channel_use_tls(const char *directory, const char *peer)
{
	char chain[4096], key[4096], bundle[4096];

	snprintf(chain, sizeof(chain), "%s/chain.pem", directory);
	snprintf(key, sizeof(key), "%s/key.pem", directory);
	snprintf(bundle, sizeof(bundle), "%s/bundle.pem", directory);
	wanted = peer;
	context = SSL_CTX_new(TLS_method());
	if (!context || !SSL_CTX_set_min_proto_version(context, TLS1_3_VERSION) ||
	    SSL_CTX_use_certificate_chain_file(context, chain) != 1 ||
	    SSL_CTX_use_PrivateKey_file(context, key, SSL_FILETYPE_PEM) != 1 ||
	    SSL_CTX_load_verify_file(context, bundle) != 1)
		die("the identity in %s: %s", directory, ERR_error_string(ERR_peek_error(), NULL));
	SSL_CTX_set_verify(context, SSL_VERIFY_PEER | SSL_VERIFY_FAIL_IF_NO_PEER_CERT, check);
	/* What could not be sent at once is offered again from where it then lies. */
	SSL_CTX_set_mode(context, SSL_MODE_ENABLE_PARTIAL_WRITE | SSL_MODE_ACCEPT_MOVING_WRITE_BUFFER);
	/* A ticket would not be used: every connection shakes hands in full. */
	SSL_CTX_set_session_cache_mode(context, SSL_SESS_CACHE_OFF);
	SSL_CTX_set_num_tickets(context, 0);
}

static SSL *layer(int fd)
{
	if (!layers[fd]) {
		layers[fd] = SSL_new(context);
		if (!layers[fd] || SSL_set_fd(layers[fd], fd) != 1)
			die("libssl: %s", ERR_error_string(ERR_peek_error(), NULL));
		SSL_set_connect_state(layers[fd]);
	}
	return layers[fd];
}

void channel_accepted(int fd)
{
	if (context)
		SSL_set_accept_state(layer(fd));
}

/* What a socket would have returned. */
static ssize_t outcome(int fd, int done)
{
	if (done > 0)
		return done;
	switch (SSL_get_error(layers[fd], done)) {
	case SSL_ERROR_ZERO_RETURN:
		return 0;
	case SSL_ERROR_WANT_READ:
	case SSL_ERROR_WANT_WRITE:
		errno = EAGAIN;
		return -1;
	case SSL_ERROR_SYSCALL:
		if (!errno)
			errno = ECONNRESET;
		return -1;
	default:
		errno = EPROTO;
		return -1;
	}
}

ssize_t channel_send(int fd, const void *data, size_t size)
{
	if (!context)
		return send(fd, data, size, MSG_NOSIGNAL | MSG_DONTWAIT);
	ERR_clear_error();
	errno = 0;
	return outcome(fd, SSL_write(layer(fd), data, (int)size));
}

ssize_t channel_recv(int fd, void *into, size_t size)
{
	if (!context)
		return recv(fd, into, size, MSG_DONTWAIT);
	ERR_clear_error();
	errno = 0;
	return outcome(fd, SSL_read(layer(fd), into, (int)size));
}

uint32_t channel_wants(int fd)
{
	return context && SSL_want_read(layer(fd)) ? EPOLLIN : EPOLLOUT;
}

void channel_end(int fd)
{
	if (context)
		SSL_shutdown(layer(fd));
	else
		shutdown(fd, SHUT_WR);
}

void channel_close(int fd)
{
	if (context) {
		SSL_free(layers[fd]);
		layers[fd] = NULL;
	}
	close(fd);
}
