#define _GNU_SOURCE
#include "common.h"

#include <arpa/inet.h>
#include <errno.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/time.h>
#include <time.h>

char pattern[2 * CHUNK];
char scratch[CHUNK];

void die(const char *format, ...)
{
	va_list arguments;

	va_start(arguments, format);
	vfprintf(stderr, format, arguments);
	va_end(arguments);
	fputc('\n', stderr);
	exit(1);
}

void fill_pattern(void)
{
	for (size_t i = 0; i < sizeof(pattern); i++)
		pattern[i] = (char)((uint32_t)i * 2654435761u >> 13);
}

static uint64_t clock_ns(clockid_t clock)
{
	struct timespec now;

	clock_gettime(clock, &now);
	return (uint64_t)now.tv_sec * 1000000000ull + (uint64_t)now.tv_nsec;
}

uint64_t now_ns(void)
{
	return clock_ns(CLOCK_MONOTONIC);
}

uint64_t cpu_ns(void)
{
	return clock_ns(CLOCK_PROCESS_CPUTIME_ID);
}

uint64_t draw(uint64_t *state)
{
	uint64_t z = *state += 0x9e3779b97f4a7c15ull;

	z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9ull;
	z = (z ^ z >> 27) * 0x94d049bb133111ebull;
	return z ^ z >> 31;
}

struct address address_of(const char *text, int port)
{
	struct address made = { .length = 0 };
	struct sockaddr_in *four = (struct sockaddr_in *)&made.storage;
	struct sockaddr_in6 *six = (struct sockaddr_in6 *)&made.storage;

	if (port < 1 || port > 65535)
		die("not a port: %d", port);
	if (inet_pton(AF_INET, text, &four->sin_addr) == 1) {
		four->sin_family = AF_INET;
		four->sin_port = htons((uint16_t)port);
		made.length = sizeof(*four);
	} else if (inet_pton(AF_INET6, text, &six->sin6_addr) == 1) {
		six->sin6_family = AF_INET6;
		six->sin6_port = htons((uint16_t)port);
		made.length = sizeof(*six);
	} else {
		die("not an address: %s", text);
	}
	return made;
}

int make_socket(const struct address *target, int flags)
{
	static const struct timeval patience = { .tv_sec = STALL_NS / 1000000000ull };
	int fd = socket(target->storage.ss_family, SOCK_STREAM | SOCK_CLOEXEC | flags, 0), one = 1;

	if (fd < 0)
		return -1;
	if (fd >= MAX_FD)
		die("more than %d descriptors", MAX_FD);
	setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof(one));
	setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &patience, sizeof(patience));
	setsockopt(fd, SOL_SOCKET, SO_SNDTIMEO, &patience, sizeof(patience));
	return fd;
}

int dial_and_wait(const struct address *target)
{
	int fd = make_socket(target, 0);

	if (fd < 0)
		die("socket: %s", strerror(errno));
	if (connect(fd, (const struct sockaddr *)&target->storage, target->length) != 0)
		die("connect: %s", strerror(errno));
	return fd;
}

void watch(int epoll, int operation, int fd, uint32_t events, uint64_t data)
{
	struct epoll_event event = { .events = events, .data.u64 = data };

	if (epoll_ctl(epoll, operation, fd, &event) != 0)
		die("epoll_ctl: %s", strerror(errno));
}
