/* What every part of the load generator uses: time, the end with a reason, addresses, sockets, a pattern of bytes. */
#ifndef LOAD_COMMON_H
#define LOAD_COMMON_H

#include <stddef.h>
#include <stdint.h>
#include <sys/epoll.h>
#include <sys/socket.h>

#define CHUNK ((size_t)256 * 1024)
#define MAX_FD 65536
#define EVENTS 64
/* Nothing that works answers later than this: a lost wake-up is an error and not a hang. */
#define STALL_NS 10000000000ull

/* The server's ports, from its first. */
enum { ECHO_PORT, SINK_PORT, HTTP_PORT, SOURCE_PORT, PORTS };

struct address {
	struct sockaddr_storage storage;
	socklen_t length;
};

/* Twice a chunk, so that a message of any size may begin anywhere in its first half. It repeats after 2 MiB only. */
extern char pattern[2 * CHUNK];
/* For whatever is read or written at once and forgotten. */
extern char scratch[CHUNK];

/* Ends the program, with a reason on stderr and status 1. */
void die(const char *format, ...) __attribute__((noreturn, format(printf, 1, 2)));

void fill_pattern(void);
uint64_t now_ns(void);
uint64_t cpu_ns(void);

/* The next of a row of random numbers, which the first value of `state` decides: SplitMix64 (Steele, Lea, Flood 2014). */
uint64_t draw(uint64_t *state);

/* IPv4 or IPv6. */
struct address address_of(const char *text, int port);

/* A TCP socket without Nagle's delay, which waits at most STALL_NS where it blocks. -1 with errno. */
int make_socket(const struct address *target, int flags);

/* A connection, made while the caller waits. */
int dial_and_wait(const struct address *target);

void watch(int epoll, int operation, int fd, uint32_t events, uint64_t data);

#endif
