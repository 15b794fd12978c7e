#define _GNU_SOURCE
#include "bulk.h"

#include "channel.h"

#include <errno.h>
#include <poll.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <time.h>
#include <unistd.h>

struct stream {
	uint64_t sent;
	int fd;
};

static void finish_stream(const struct stream *stream)
{
	uint64_t sunk = 0;

	struct pollfd answered = { .fd = stream->fd, .events = POLLIN };
	ssize_t got;

	channel_end(stream->fd);
	/* Eight bytes, which were sent as one. */
	do {
		if (poll(&answered, 1, (int)(STALL_NS / 1000000)) < 1)
			die("the sink did not answer its count for %llu s", STALL_NS / 1000000000ull);
		got = channel_recv(stream->fd, &sunk, sizeof(sunk));
	} while (got < 0 && errno == EAGAIN);
	if (got != sizeof(sunk))
		die("the sink did not answer its count: %s", got < 0 ? strerror(errno) : "it hung up");
	if (sunk != stream->sent)
		die("sent %llu bytes, the sink read %llu", (unsigned long long)stream->sent, (unsigned long long)sunk);
	channel_close(stream->fd);
}

/* How much may be sent now, after a sleep until it is a piece. */
static size_t await_due(double rate, uint64_t began, uint64_t sent)
{
	uint64_t then = began + (uint64_t)((double)(sent + PIECE) / rate * 1e9), due;
	struct timespec until = { (time_t)(then / 1000000000ull), (long)(then % 1000000000ull) };

	clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &until, NULL);
	due = (uint64_t)((double)(now_ns() - began) / 1e9 * rate) - sent;
	return due < CHUNK ? due : CHUNK;
}

struct bulk_result bulk(const struct address *sink, int count, double rate, struct window window)
{
	static struct stream streams[MAX_STREAMS];
	struct bulk_result result = { 0 };
	struct epoll_event events[EVENTS];
	int epoll = epoll_create1(EPOLL_CLOEXEC), started = 0;
	uint64_t now = now_ns(), began = now, sent = 0;

	for (int i = 0; i < count; i++) {
		streams[i] = (struct stream){ .fd = dial_and_wait(sink) };
		watch(epoll, EPOLL_CTL_ADD, streams[i].fd, EPOLLOUT, (uint64_t)i);
	}
	while (now < window.end) {
		int ready = epoll_wait(epoll, events, EVENTS, (int)(STALL_NS / 1000000));

		if (ready == 0)
			die("no bulk stream took anything for %llu s", STALL_NS / 1000000000ull);
		for (int i = 0; i < ready && now < window.end; i++) {
			struct stream *stream = &streams[events[i].data.u64];
			size_t most = rate > 0 ? await_due(rate, began, sent) : CHUNK;
			ssize_t taken = channel_send(stream->fd, pattern, most);

			if (taken < 0 && errno != EAGAIN)
				die("a bulk stream broke: %s", strerror(errno));
			now = now_ns();
			if (taken < 0)
				continue;
			stream->sent += (uint64_t)taken;
			sent += (uint64_t)taken;
			if (now < window.start)
				continue;
			if (!started++)
				result.cpu_ns = cpu_ns();
			result.bytes += (uint64_t)taken;
		}
	}
	result.cpu_ns = cpu_ns() - result.cpu_ns;
	for (int i = 0; i < count; i++)
		finish_stream(&streams[i]);
	close(epoll);
	return result;
}

struct beside fork_bulk(const struct address *sink, int streams, double rate)
{
	int start[2], done[2];
	struct window window;
	struct bulk_result result;

	if (pipe(start) != 0 || pipe(done) != 0)
		die("pipe: %s", strerror(errno));
	switch (fork()) {
	case -1:
		die("fork: %s", strerror(errno));
	case 0:
		prctl(PR_SET_PDEATHSIG, SIGKILL);
		/* Only the small requests go first. */
		setpriority(PRIO_PROCESS, 0, 0);
		close(start[1]);
		if (read(start[0], &window, sizeof(window)) != sizeof(window))
			_exit(1);
		result = bulk(sink, streams, rate, window);
		_exit(write(done[1], &result, sizeof(result)) != sizeof(result));
	}
	close(start[0]);
	close(done[1]);
	return (struct beside){ start[1], done[0] };
}

void start_bulk(struct beside beside, struct window window)
{
	if (write(beside.start, &window, sizeof(window)) != sizeof(window))
		die("the bulk streams' process ended");
}

struct bulk_result await_bulk(struct beside beside)
{
	struct bulk_result result;

	/* It has said why, on the same stderr. */
	if (read(beside.done, &result, sizeof(result)) != sizeof(result))
		die("the bulk streams failed");
	return result;
}
