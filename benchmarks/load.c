/* The load generator and the server that it loads, in one epoll loop without threads. Built by benchmarks/paths.py.
 *
 *   load serve ADDRESS PORT                        echo on PORT, sink on PORT + 1; runs until killed
 *   load rr ADDRESS PORT CONNECTIONS BYTES SECONDS  ping-pong of BYTES on each connection
 *   load connect ADDRESS PORT IN_FLIGHT SECONDS     connect, one byte there and back, close, again
 *   load bulk ADDRESS PORT SECONDS                  one stream to the sink, then FIN; the sink answers its count
 *
 * The clients print one JSON object. Latencies are in microseconds, from the first byte written to the last byte
 * read. A closed loop: it measures capacity and unloaded latency, not latency under a fixed rate.
 * Exit status 1 with a reason on stderr when anything is wrong: a byte changed, a count differs, a peer hung up.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

#define MAX_SAMPLES (4 << 20)
#define MAX_CONNECTIONS 4096
#define MAX_FD 65536
#define CHUNK (256 * 1024)
#define EVENTS 256
/* Nothing that works answers later than this; a lost wake-up is an error and not a hang. */
#define STALL_MS 10000
static const struct timeval STALL = { .tv_sec = STALL_MS / 1000 };

static void die(const char *format, ...)
{
	va_list arguments;

	va_start(arguments, format);
	vfprintf(stderr, format, arguments);
	va_end(arguments);
	fputc('\n', stderr);
	exit(1);
}

static uint64_t now_ns(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return (uint64_t)now.tv_sec * 1000000000ull + (uint64_t)now.tv_nsec;
}

static struct sockaddr_in address_of(const char *address, int port)
{
	struct sockaddr_in made = { .sin_family = AF_INET, .sin_port = htons((uint16_t)port) };

	if (inet_pton(AF_INET, address, &made.sin_addr) != 1)
		die("not an IPv4 address: %s", address);
	return made;
}

static void no_delay(int fd)
{
	int one = 1;

	setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof(one));
}

static void watch(int epoll, int op, int fd, uint32_t events)
{
	struct epoll_event event = { .events = events, .data.fd = fd };

	if (epoll_ctl(epoll, op, fd, &event) != 0)
		die("epoll_ctl: %s", strerror(errno));
}

/* ---- the server */

struct peer {
	char *pending;        /* echoed bytes that the socket did not take */
	size_t length, offset;
	uint64_t sunk;
	int sink, finished;
};

static struct peer peers[MAX_FD];
static char scratch[CHUNK];

static int listen_on(const char *address, int port)
{
	struct sockaddr_in bound = address_of(address, port);
	int fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0), one = 1;

	setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &one, sizeof(one));
	if (bind(fd, (struct sockaddr *)&bound, sizeof(bound)) != 0 || listen(fd, 4096) != 0)
		die("listen on %s:%d: %s", address, port, strerror(errno));
	return fd;
}

static void hang_up(int fd)
{
	free(peers[fd].pending);
	memset(&peers[fd], 0, sizeof(peers[fd]));
	close(fd);
}

/* Returns 0 when the socket is full and the rest waits. */
static int flush_pending(int epoll, int fd)
{
	struct peer *peer = &peers[fd];

	while (peer->offset < peer->length) {
		ssize_t sent = send(fd, peer->pending + peer->offset, peer->length - peer->offset, MSG_NOSIGNAL);

		if (sent < 0 && errno == EAGAIN)
			return 0;
		if (sent < 0) {
			hang_up(fd);
			return 0;
		}
		peer->offset += (size_t)sent;
	}
	peer->length = peer->offset = 0;
	if (peer->finished) {
		hang_up(fd);
		return 0;
	}
	watch(epoll, EPOLL_CTL_MOD, fd, EPOLLIN);
	return 1;
}

static void echo(int epoll, int fd, ssize_t got)
{
	struct peer *peer = &peers[fd];
	ssize_t sent = send(fd, scratch, (size_t)got, MSG_NOSIGNAL);

	if (sent == got)
		return;
	if (sent < 0 && errno != EAGAIN) {
		hang_up(fd);
		return;
	}
	if (sent < 0)
		sent = 0;
	if (!peer->pending && !(peer->pending = malloc(CHUNK)))
		die("out of memory");
	peer->length = (size_t)(got - sent);
	peer->offset = 0;
	memcpy(peer->pending, scratch + sent, peer->length);
	watch(epoll, EPOLL_CTL_MOD, fd, EPOLLOUT);
}

static void serve_peer(int epoll, int fd, uint32_t events)
{
	struct peer *peer = &peers[fd];
	ssize_t got;

	if (peer->length && (events & (EPOLLOUT | EPOLLERR | EPOLLHUP)) && !flush_pending(epoll, fd))
		return;
	got = recv(fd, scratch, sizeof(scratch), 0);
	if (got < 0 && errno == EAGAIN)
		return;
	if (got < 0) {
		hang_up(fd);
	} else if (got == 0) {
		if (peer->sink)
			send(fd, &peer->sunk, sizeof(peer->sunk), MSG_NOSIGNAL);
		hang_up(fd);
	} else if (peer->sink) {
		peer->sunk += (uint64_t)got;
	} else {
		echo(epoll, fd, got);
	}
}

static void serve(const char *address, int port)
{
	int epoll = epoll_create1(0), echoes = listen_on(address, port), sinks = listen_on(address, port + 1);
	struct epoll_event events[EVENTS];

	watch(epoll, EPOLL_CTL_ADD, echoes, EPOLLIN);
	watch(epoll, EPOLL_CTL_ADD, sinks, EPOLLIN);
	puts("ready");
	fflush(stdout);
	for (;;) {
		int count = epoll_wait(epoll, events, EVENTS, -1);

		for (int i = 0; i < count; i++) {
			int fd = events[i].data.fd, made;

			if (fd != echoes && fd != sinks) {
				serve_peer(epoll, fd, events[i].events);
				continue;
			}
			while ((made = accept4(fd, NULL, NULL, SOCK_NONBLOCK)) >= 0) {
				if (made >= MAX_FD)
					die("too many connections");
				no_delay(made);
				peers[made].sink = fd == sinks;
				watch(epoll, EPOLL_CTL_ADD, made, EPOLLIN);
			}
		}
	}
}

/* ---- the clients */

struct call {
	uint64_t started;
	size_t sent, received;
	int fd, waiting;  /* waiting: for room in the socket */
};

static struct call calls[MAX_CONNECTIONS];
static int call_of[MAX_FD];
static uint32_t *samples;  /* nanoseconds; above 4.2 s it saturates */
static size_t sample_count;
static uint64_t operations;
static char message[CHUNK];

static void record(uint64_t elapsed_ns)
{
	operations++;
	if (sample_count < MAX_SAMPLES)
		samples[sample_count++] = elapsed_ns > UINT32_MAX ? UINT32_MAX : (uint32_t)elapsed_ns;
}

static int ascending(const void *left, const void *right)
{
	uint32_t a = *(const uint32_t *)left, b = *(const uint32_t *)right;

	return a < b ? -1 : a > b;
}

static double percentile_us(double share)
{
	return sample_count ? samples[(size_t)(share * (double)(sample_count - 1))] / 1000.0 : 0.0;
}

static void report(uint64_t elapsed_ns)
{
	double seconds = (double)elapsed_ns / 1e9;

	if (!operations)
		die("no operation was completed");
	qsort(samples, sample_count, sizeof(*samples), ascending);
	printf("{\"operations\": %llu, \"seconds\": %.6f, \"per_second\": %.1f, \"us_per_op\": %.3f, "
	       "\"p50_us\": %.3f, \"p99_us\": %.3f, \"max_us\": %.3f}\n",
	       (unsigned long long)operations, seconds, (double)operations / seconds,
	       seconds * 1e6 / (double)operations, percentile_us(0.5), percentile_us(0.99), percentile_us(1.0));
}

static int dial(const struct sockaddr_in *target, int flags)
{
	int fd = socket(AF_INET, SOCK_STREAM | flags, 0);

	if (fd < 0 || fd >= MAX_FD)
		die("socket: %s", strerror(errno));
	no_delay(fd);
	setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &STALL, sizeof(STALL));
	setsockopt(fd, SOL_SOCKET, SO_SNDTIMEO, &STALL, sizeof(STALL));
	if (connect(fd, (const struct sockaddr *)target, sizeof(*target)) != 0 && errno != EINPROGRESS)
		die("connect: %s", strerror(errno));
	return fd;
}

/* Sends what is left of the message; the socket asks to be called again when it takes less. */
static void push(int epoll, struct call *call, size_t size)
{
	ssize_t sent = send(call->fd, message + call->sent, size - call->sent, MSG_NOSIGNAL | MSG_DONTWAIT);
	int was_waiting = call->waiting;

	if (sent < 0 && errno != EAGAIN)
		die("send: %s", strerror(errno));
	if (sent > 0)
		call->sent += (size_t)sent;
	call->waiting = call->sent < size;
	if (call->waiting != was_waiting)
		watch(epoll, EPOLL_CTL_MOD, call->fd, call->waiting ? EPOLLIN | EPOLLOUT : EPOLLIN);
}

/* Returns 1 when the whole answer is there. */
static int pull(struct call *call, size_t size, int flags)
{
	ssize_t got = recv(call->fd, scratch, size - call->received, flags);

	if (got < 0 && errno == EAGAIN && (flags & MSG_DONTWAIT))
		return 0;
	if (got <= 0)
		die("no answer: %s", got ? strerror(errno) : "the peer hung up");
	if (memcmp(scratch, message + call->received, (size_t)got) != 0)
		die("the echo differs from what was sent");
	call->received += (size_t)got;
	return call->received == size;
}

static void begin(int epoll, struct call *call, size_t size)
{
	call->received = call->sent = 0;
	call->started = now_ns();
	push(epoll, call, size);
}

static int wait_for(int epoll, struct epoll_event *events)
{
	int count = epoll_wait(epoll, events, EVENTS, STALL_MS);

	if (count == 0)
		die("nothing happened for %d ms", STALL_MS);
	return count;
}

static void ping_pong(const struct sockaddr_in *target, int connections, size_t size, double seconds)
{
	int epoll = epoll_create1(0);
	struct epoll_event events[EVENTS];
	uint64_t warm, end, now;

	if (connections < 1 || connections > MAX_CONNECTIONS || size < 1 || size > CHUNK)
		die("wants 1 to %d connections and 1 to %d bytes", MAX_CONNECTIONS, CHUNK);
	/* One byte on each connection first: tunnels and streams exist before the clock starts. */
	for (int i = 0; i < connections; i++) {
		calls[i].fd = dial(target, 0);
		call_of[calls[i].fd] = i;
		watch(epoll, EPOLL_CTL_ADD, calls[i].fd, EPOLLIN);
		begin(epoll, &calls[i], 1);
		pull(&calls[i], 1, 0);
	}
	warm = now_ns() + (uint64_t)(seconds * 1e8);
	end = warm + (uint64_t)(seconds * 1e9);
	for (int i = 0; i < connections; i++)
		begin(epoll, &calls[i], size);
	for (now = now_ns(); now < end;) {
		int count = wait_for(epoll, events);

		for (int i = 0; i < count; i++) {
			struct call *call = &calls[call_of[events[i].data.fd]];

			if (events[i].events & EPOLLOUT)
				push(epoll, call, size);
			if (!(events[i].events & (EPOLLIN | EPOLLERR | EPOLLHUP)) || !pull(call, size, MSG_DONTWAIT))
				continue;
			now = now_ns();
			if (call->started >= warm)
				record(now - call->started);
			begin(epoll, call, size);
		}
	}
	report(now - warm);
}

static void redial(int epoll, const struct sockaddr_in *target, struct call *call)
{
	call->received = call->sent = 0;
	call->started = now_ns();
	call->fd = dial(target, SOCK_NONBLOCK);
	call_of[call->fd] = (int)(call - calls);
	call->waiting = 1;
	watch(epoll, EPOLL_CTL_ADD, call->fd, EPOLLIN | EPOLLOUT);
}

static void connect_and_close(const struct sockaddr_in *target, int in_flight, double seconds)
{
	int epoll = epoll_create1(0);
	struct epoll_event events[EVENTS];
	uint64_t warm = now_ns() + (uint64_t)(seconds * 1e8), end = warm + (uint64_t)(seconds * 1e9), now;

	if (in_flight < 1 || in_flight > MAX_CONNECTIONS)
		die("wants 1 to %d connections in flight", MAX_CONNECTIONS);
	for (int i = 0; i < in_flight; i++)
		redial(epoll, target, &calls[i]);
	for (now = now_ns(); now < end;) {
		int count = wait_for(epoll, events);

		for (int i = 0; i < count; i++) {
			struct call *call = &calls[call_of[events[i].data.fd]];

			if (call->waiting && (events[i].events & (EPOLLOUT | EPOLLERR | EPOLLHUP)))
				push(epoll, call, 1);
			if (!(events[i].events & (EPOLLIN | EPOLLERR | EPOLLHUP)) || !pull(call, 1, MSG_DONTWAIT))
				continue;
			now = now_ns();
			if (call->started >= warm)
				record(now - call->started);
			close(call->fd);
			redial(epoll, target, call);
		}
	}
	report(now - warm);
}

static void bulk(const struct sockaddr_in *target, double seconds)
{
	int fd = dial(target, 0);
	uint64_t started = now_ns(), end = started + (uint64_t)(seconds * 1e9), sent = 0, sunk = 0, elapsed;

	while (now_ns() < end) {
		ssize_t taken = send(fd, message, CHUNK, MSG_NOSIGNAL);

		if (taken <= 0)
			die("send: %s", strerror(errno));
		sent += (uint64_t)taken;
	}
	shutdown(fd, SHUT_WR);
	if (recv(fd, &sunk, sizeof(sunk), MSG_WAITALL) != sizeof(sunk))
		die("the sink did not answer its count: %s", strerror(errno));
	elapsed = now_ns() - started;
	if (sunk != sent)
		die("sent %llu bytes, the sink read %llu", (unsigned long long)sent, (unsigned long long)sunk);
	printf("{\"bytes\": %llu, \"seconds\": %.6f, \"gbit_per_second\": %.4f}\n", (unsigned long long)sunk,
	       (double)elapsed / 1e9, (double)sunk * 8 / (double)elapsed);
}

int main(int argc, char **argv)
{
	const char *what = argc > 3 ? argv[1] : "";
	struct sockaddr_in target;

	for (size_t i = 0; i < sizeof(message); i++)
		message[i] = (char)(i * 2654435761u >> 13);
	samples = malloc(MAX_SAMPLES * sizeof(*samples));
	if (!samples)
		die("out of memory");
	if (strcmp(what, "serve") == 0 && argc == 4)
		serve(argv[2], atoi(argv[3]));
	target = address_of(argc > 3 ? argv[2] : "0.0.0.0", argc > 3 ? atoi(argv[3]) : 0);
	if (strcmp(what, "rr") == 0 && argc == 7)
		ping_pong(&target, atoi(argv[4]), (size_t)atoi(argv[5]), atof(argv[6]));
	else if (strcmp(what, "connect") == 0 && argc == 6)
		connect_and_close(&target, atoi(argv[4]), atof(argv[5]));
	else if (strcmp(what, "bulk") == 0 && argc == 5)
		bulk(&target, atof(argv[4]));
	else
		die("usage: see the head of load.c");
	return 0;
}
