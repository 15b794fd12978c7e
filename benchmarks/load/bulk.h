/* Streams to the server's sink, as fast as they go. */
#ifndef LOAD_BULK_H
#define LOAD_BULK_H

#include "common.h"

#include <stdint.h>

#define MAX_STREAMS 256

struct window {
	uint64_t start, end;  /* of what counts */
};

struct bulk_result {
	uint64_t bytes;   /* that the sockets took within the window */
	uint64_t cpu_ns;  /* of this process, meanwhile */
};

/* Fills `streams` connections until the window ends, and has the sink's counts agree with what was sent. */
struct bulk_result bulk(const struct address *sink, int streams, struct window window);

/* The same in a process of its own, for a load beside. Fork before any connection is made, start later. */
struct beside {
	int start, done;
};
struct beside fork_bulk(const struct address *sink, int streams);
void start_bulk(struct beside beside, struct window window);
struct bulk_result await_bulk(struct beside beside);

#endif
