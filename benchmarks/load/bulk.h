/* Streams to the server's sink, as fast as they go or at a fixed rate. */
#ifndef LOAD_BULK_H
#define LOAD_BULK_H

#include "common.h"

#include <stdint.h>

#define MAX_STREAMS 256

/* At a fixed rate this much is sent at a time, or all that is due where a stream was held up. */
#define PIECE ((size_t)64 * 1024)

struct window {
	uint64_t start, end;  /* of what counts */
};

struct bulk_result {
	uint64_t bytes;   /* that the sockets took within the window */
	uint64_t cpu_ns;  /* of this process, meanwhile */
};

/* Fills `streams` connections until the window ends, and has the sink's counts agree with what was sent. `rate`: bytes a
 * second of all of them together, from the beginning of the warm-up on; what a stream could not take is sent later.
 * 0: as fast as they go. */
struct bulk_result bulk(const struct address *sink, int streams, double rate, struct window window);

/* The same in a process of its own, for a load beside. Fork before any connection is made, start later. */
struct beside {
	int start, done;
};
struct beside fork_bulk(const struct address *sink, int streams, double rate);
void start_bulk(struct beside beside, struct window window);
struct bulk_result await_bulk(struct beside beside);

#endif
