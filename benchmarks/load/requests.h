/* Requests and answers on a number of connections: as fast as they go, or at times that were fixed in advance.
 *
 * A closed loop sends the next request on a connection when the last is answered: it measures capacity. An open loop
 * takes its times from a seeded generator, and counts each latency from the time that was intended: a server that
 * stalls delays all requests that were due meanwhile, and all of that shows. No request is left out for being late; one
 * that finds no free connection waits for one.
 *
 * A failed request is counted with its reason, and its connection is made anew for the next one. Only when nothing at
 * all is answered for 10 s, or an echo differs from what was sent, does the program end.
 */
#ifndef LOAD_REQUESTS_H
#define LOAD_REQUESTS_H

#include "bulk.h"
#include "common.h"
#include "histogram.h"
#include "http2.h"

#define MAX_CONNECTIONS 60000
#define MAX_REASONS 16

struct requests {
	struct address target;
	int connections;
	size_t size;           /* of an echo, in bytes; 0: HTTP */
	const char *question;  /* an HTTP/1.1 request, with places for its id */
	size_t question_length;
	int http2;             /* what http2_prepare was told, in its place */
	int fresh;             /* a new connection for each request */
	double rate;           /* a second, all connections together; 0: closed loop */
	int poisson;           /* or at even distances */
	uint64_t seed;
};

struct reason {
	char text[96];
	uint64_t count;
};

struct findings {
	struct histogram latency;   /* of what was answered within the window (closed), or due within it (open) */
	struct histogram lateness;  /* of sends, while a connection was free: the generator's own fault */
	struct histogram punctual;  /* the latencies of an open loop less that: they would have been no shorter than this */
	uint64_t scheduled, answered, failed;  /* of the whole run, warm-up included */
	uint64_t waited;            /* of the window: no connection was free when they were due */
	uint64_t behind_ns;         /* how long after its time the last request was sent */
	uint64_t cpu_ns;            /* of this process, within the window */
	uint64_t broken;            /* connections that ended while no request was on them */
	struct reason reasons[MAX_REASONS];
};

/* Connects all, and has one request answered on each. Ends the program when one is not. */
void prepare(const struct requests *requests);

/* Loads until the window ends and all is answered. The warm-up begins now. */
void run_requests(struct window window, struct findings *findings);

/* Has one more request answered on each connection. */
void prove_again(void);

#endif
