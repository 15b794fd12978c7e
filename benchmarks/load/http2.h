/* As much of HTTP/2 (RFC 9113) as the generator and its server need: one request at a time on a connection, whose answer
 * is as long as its body; or a gRPC call, with trailers.
 *
 * Fields are literals without Huffman codes (RFC 7541 6.2.2), and no peer may use its dynamic table, so that no state of
 * HPACK is kept. What is not understood is an error, and none is overlooked: a window that is never opened again, too.
 */
#ifndef LOAD_HTTP2_H
#define LOAD_HTTP2_H

#include <stddef.h>
#include <stdint.h>

/* Of all that one side sends or receives at once: requests, answers and frames are small. */
#define MAX_FRAMES 8192
#define MAX_BODY_BYTES 4096

#define PREFACE "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
#define PREFACE_LENGTH (sizeof(PREFACE) - 1)

struct http2_question {
	const char *path, *host;
	int grpc;
	size_t body;
};

/* One side of a connection. All zeros is a new one. */
struct http2 {
	int64_t window;      /* bytes that the peer takes on the connection */
	uint32_t consumed;   /* bytes that it was not told yet are read */
	uint32_t stream;     /* of the last request; 0: the connection is new */
	uint8_t acknowledge; /* its settings */
	uint8_t pinged, going_away, grpc;
	char ping[8];
	/* Of the answer, at the client. */
	uint8_t ended, trailed;
	unsigned status;
	size_t received;
};

/* Encodes the question that all connections ask, each time with another id. */
void http2_prepare(const struct http2_question *question);

/* The next request, and what is owed before it; its length. `into` has room for MAX_FRAMES. */
size_t http2_ask(struct http2 *http2, char *into);

/* Reads the whole frames of an answer. Returns their length; `wrong` is NULL, or what is wrong with them. */
size_t http2_read_answer(struct http2 *http2, const char *data, size_t length, const char **wrong);

/* What is wrong with an answer that has ended, or NULL. */
const char *http2_verdict(const struct http2 *http2);

/* Answers the requests in whole frames, into room for 8 * MAX_FRAMES: fields may have been short. Returns how much was
 * read, or -1 for what is no request. */
long http2_serve(struct http2 *http2, const char *data, size_t length, char *into, size_t *made);

#endif
