/* The server that is loaded: echo, sink, HTTP/1.1 and source, in one epoll loop. */
#ifndef LOAD_SERVER_H
#define LOAD_SERVER_H

#include <stdint.h>

struct stall {
	uint64_t for_ns, every_ns;  /* for_ns 0: never */
};

/* Serves on the ports of common.h from `port` on, until killed. Prints "ready" once it listens. */
void serve(const char *address, int port, struct stall stall) __attribute__((noreturn));

#endif
