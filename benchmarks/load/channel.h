/* Connections that carry bytes as they are, or in mutual TLS where the application does it by itself.
 *
 * As send and recv of a socket that does not block: -1 with EAGAIN where nothing goes now. TLS is 1.3 only, by libssl,
 * with its defaults; both ends show a certificate of the same CA, and each wants a certain SPIFFE id of the other.
 */
#ifndef LOAD_CHANNEL_H
#define LOAD_CHANNEL_H

#include <stdint.h>
#include <sys/types.h>

/* A message in TLS fits in one record, so that no part of one is left inside of libssl. */
#define MOST_IN_TLS ((size_t)16384)

/* From now on all connections are in TLS. `directory`: chain.pem, key.pem, bundle.pem; `peer`: a SPIFFE id. */
void channel_use_tls(const char *directory, const char *peer);

/* Those that are accepted have the server's part. */
void channel_accepted(int fd);

ssize_t channel_send(int fd, const void *data, size_t size);
ssize_t channel_recv(int fd, void *into, size_t size);

/* What a channel_send waits for that went no further: EPOLLOUT, or EPOLLIN amid a handshake. */
uint32_t channel_wants(int fd);

/* Nothing more is sent; the peer's bytes still come. */
void channel_end(int fd);

void channel_close(int fd);

#endif
