#define _GNU_SOURCE
#include "server.h"

#include "channel.h"
#include "common.h"
#include "http2.h"

#include <errno.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#define MAX_HEAD 8192

/* Answers are at most this long, so that a length fits wherever it is counted. */
#define MAX_BODY (1ull << 40)

/* In an event's data: a listener's number follows, not a peer's descriptor. */
#define LISTENER (1ull << 32)

struct peer {
	char *out;             /* bytes that the socket did not take */
	size_t length, offset;
	uint64_t owed;         /* bytes of the pattern to send after them */
	uint64_t sunk;
	char *head;            /* of a request that is not whole */
	size_t head_length;
	uint8_t kind, closing, speaks_http2;
	struct http2 http2;
};

static struct peer peers[MAX_FD];
static int epoll;

static void hang_up(int fd)
{
	free(peers[fd].out);
	free(peers[fd].head);
	memset(&peers[fd], 0, sizeof(peers[fd]));
	channel_close(fd);
}

static char *at_hand(char **buffer, size_t size)
{
	if (!*buffer && !(*buffer = malloc(size)))
		die("out of memory");
	return *buffer;
}

/* Sends what waits, a chunk of the pattern at most, so that no peer keeps the others waiting. 0: it hung up. */
static int send_waiting(int fd)
{
	struct peer *peer = &peers[fd];
	ssize_t sent;

	while (peer->offset < peer->length || peer->owed) {
		int queued = peer->offset < peer->length;
		size_t most = peer->owed < CHUNK ? (size_t)peer->owed : CHUNK;

		sent = queued ? channel_send(fd, peer->out + peer->offset, peer->length - peer->offset)
			      : channel_send(fd, pattern, most);
		if (sent < 0 && errno == EAGAIN)
			return 1;
		if (sent < 0) {
			hang_up(fd);
			return 0;
		}
		if (queued) {
			peer->offset += (size_t)sent;
			continue;
		}
		peer->owed -= (uint64_t)sent;
		return 1;
	}
	peer->length = peer->offset = 0;
	if (peer->closing) {
		hang_up(fd);
		return 0;
	}
	return 1;
}

static int has_waiting(const struct peer *peer)
{
	return peer->length > peer->offset || peer->owed;
}

/* Sends, and keeps what the socket does not take. 0: it hung up. */
static int send_or_keep(int fd, const char *data, size_t size)
{
	struct peer *peer = &peers[fd];
	ssize_t sent = channel_send(fd, data, size);

	if (sent == (ssize_t)size)
		return 1;
	if (sent < 0 && errno != EAGAIN) {
		hang_up(fd);
		return 0;
	}
	if (sent < 0)
		sent = 0;
	peer->length = size - (size_t)sent;
	peer->offset = 0;
	memcpy(at_hand(&peer->out, CHUNK), data + sent, peer->length);
	return 1;
}

/* 0: it hung up. */
static int answer(int fd, const char *status, uint64_t size, int closing)
{
	static char made[CHUNK];
	struct peer *peer = &peers[fd];
	int head = snprintf(made, sizeof(made), "HTTP/1.1 %s\r\nContent-Type: application/octet-stream\r\n"
			    "Content-Length: %llu\r\n%s\r\n", status, (unsigned long long)size,
			    closing ? "Connection: close\r\n" : "");
	size_t room = sizeof(made) - (size_t)head, first = size < room ? (size_t)size : room;

	/* What fits goes with the head, in one write: a body of its own segment would cost every small answer one more. */
	memcpy(made + head, pattern, first);
	peer->owed = size - first;
	peer->closing = (uint8_t)closing;
	if (!send_or_keep(fd, made, (size_t)head + first))
		return 0;
	if (closing && !has_waiting(peer)) {
		hang_up(fd);
		return 0;
	}
	return 1;
}

static void forget(struct peer *peer, size_t length)
{
	peer->head_length -= length;
	memmove(peer->head, peer->head + length, peer->head_length);
}

/* The same in HTTP/2, whatever is asked for. 0: it hung up. */
static int answer_http2(int fd)
{
	static char made[8 * MAX_FRAMES];
	struct peer *peer = &peers[fd];
	size_t length = 0;
	long read = has_waiting(peer) ? 0 : http2_serve(&peer->http2, peer->head, peer->head_length, made, &length);

	if (read < 0) {
		hang_up(fd);
		return 0;
	}
	forget(peer, (size_t)read);
	return !length || send_or_keep(fd, made, length);
}

/* The length of a request's body, which its head, ended by a zero, says. */
static size_t body_of(const char *head)
{
	const char *value = strcasestr(head, "\r\ncontent-length:");

	return value ? strtoull(value + strlen("\r\ncontent-length:"), NULL, 10) : 0;
}

/* Answers the requests that are whole, one after the other, until an answer has to wait. 0: it hung up. */
static int answer_requests(int fd)
{
	struct peer *peer = &peers[fd];
	size_t begun = peer->head_length < PREFACE_LENGTH ? peer->head_length : PREFACE_LENGTH;
	char *end;

	if (!peer->speaks_http2 && begun && memcmp(peer->head, PREFACE, begun) == 0) {
		if (begun < PREFACE_LENGTH)
			return 1;
		peer->speaks_http2 = 1;
	}
	if (peer->speaks_http2)
		return answer_http2(fd);
	while (!has_waiting(peer) && (end = memmem(peer->head, peer->head_length, "\r\n\r\n", 4))) {
		char *stop = NULL;
		unsigned long long size = 0;
		size_t whole = (size_t)(end + 4 - peer->head);

		*end = '\0';
		if (strncmp(peer->head, "GET /bytes/", 11) == 0) {
			size = strtoull(peer->head + 11, &stop, 10);
		} else if (strncmp(peer->head, "POST ", 5) == 0) {
			size = body_of(peer->head);
			stop = strchr(peer->head + 5, ' ');
			whole += size;
			if (size <= MAX_BODY_BYTES && whole > peer->head_length) {
				*end = '\r';  /* the rest of the body comes */
				break;
			}
		}
		/* Whatever else is asked ends the connection. */
		if (!stop || (*stop != ' ' && *stop != '?') || size > MAX_BODY || whole > peer->head_length)
			return answer(fd, "404 Not Found", 0, 1);
		forget(peer, whole);
		if (!answer(fd, "200 OK", size, 0))
			return 0;
	}
	if (peer->head_length == MAX_HEAD && !has_waiting(peer))
		return answer(fd, "431 Request Header Fields Too Large", 0, 1);
	return 1;
}

/* Reads once, and answers. 0: it hung up. */
static int take(int fd)
{
	struct peer *peer = &peers[fd];
	char *into = peer->kind == HTTP_PORT ? at_hand(&peer->head, MAX_HEAD) + peer->head_length : scratch;
	ssize_t got = channel_recv(fd, into, peer->kind == HTTP_PORT ? MAX_HEAD - peer->head_length : CHUNK);

	if (got < 0 && errno == EAGAIN)
		return 1;
	if (got <= 0) {
		if (got == 0 && peer->kind == SINK_PORT)
			channel_send(fd, &peer->sunk, sizeof(peer->sunk));
		hang_up(fd);
		return 0;
	}
	if (peer->kind == ECHO_PORT)
		return send_or_keep(fd, scratch, (size_t)got);
	if (peer->kind == HTTP_PORT) {
		peer->head_length += (size_t)got;
		return answer_requests(fd);
	}
	peer->sunk += (uint64_t)got;
	return 1;
}

static void serve_peer(int fd, uint32_t events)
{
	struct peer *peer = &peers[fd];
	int waited = has_waiting(peer);

	if (waited) {
		if (!send_waiting(fd))
			return;
		if (peer->kind == HTTP_PORT && !has_waiting(peer) && !answer_requests(fd))
			return;
	} else if (!(events & (EPOLLIN | EPOLLERR | EPOLLHUP)) || !take(fd)) {
		return;
	}
	/* Who does not read is not read from. */
	if (has_waiting(peer) != waited)
		watch(epoll, EPOLL_CTL_MOD, fd, waited ? EPOLLIN : EPOLLOUT, (uint64_t)fd);
}

static int listen_on(const char *address, int port)
{
	struct address bound = address_of(address, port);
	int fd = make_socket(&bound, SOCK_NONBLOCK), one = 1;

	if (fd < 0)
		die("socket: %s", strerror(errno));
	setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &one, sizeof(one));
	if (bind(fd, (struct sockaddr *)&bound.storage, bound.length) != 0 || listen(fd, 4096) != 0)
		die("listen on %s, port %d: %s", address, port, strerror(errno));
	return fd;
}

static void accept_all(int listener, int kind)
{
	int fd, one = 1;

	while ((fd = accept4(listener, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC)) >= 0) {
		if (fd >= MAX_FD)
			die("more than %d connections", MAX_FD);
		setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof(one));
		peers[fd].kind = (uint8_t)kind;
		channel_accepted(fd);
		peers[fd].owed = kind == SOURCE_PORT ? UINT64_MAX : 0;
		watch(epoll, EPOLL_CTL_ADD, fd, kind == SOURCE_PORT ? EPOLLOUT : EPOLLIN, (uint64_t)fd);
	}
}

/* How long to wait for events, in ms; sleeps first when it is time to. */
static int stall_when_due(struct stall stall, uint64_t *next)
{
	uint64_t now = now_ns();
	struct timespec pause = { .tv_sec = (time_t)(stall.for_ns / 1000000000ull),
				  .tv_nsec = (long)(stall.for_ns % 1000000000ull) };

	if (!stall.for_ns)
		return -1;
	if (now >= *next) {
		nanosleep(&pause, NULL);
		*next += stall.every_ns;
		now = now_ns();
	}
	return *next > now ? (int)((*next - now + 999999) / 1000000) : 0;
}

void serve(const char *address, int port, struct stall stall)
{
	int listeners[PORTS];
	struct epoll_event events[EVENTS];
	uint64_t next = now_ns() + stall.every_ns;

	epoll = epoll_create1(EPOLL_CLOEXEC);
	for (int i = 0; i < PORTS; i++) {
		listeners[i] = listen_on(address, port + i);
		watch(epoll, EPOLL_CTL_ADD, listeners[i], EPOLLIN, LISTENER | (uint64_t)i);
	}
	puts("ready");
	fflush(stdout);
	for (;;) {
		int count = epoll_wait(epoll, events, EVENTS, stall_when_due(stall, &next));

		for (int i = 0; i < count; i++) {
			uint64_t data = events[i].data.u64;

			if (data & LISTENER)
				accept_all(listeners[data ^ LISTENER], (int)(data ^ LISTENER));
			else
				serve_peer((int)data, events[i].events);
		}
	}
}
