#define _GNU_SOURCE
#include "requests.h"

#include "channel.h"
#include "ids.h"

#include <errno.h>
#include <math.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define MAX_HEAD 8192
/* How many of the first requests are on their way at once: a proxy that is asked for more may refuse some. */
#define PROOFS 8
/* After a failure a closed loop leaves the connection alone for so long, lest it only counts refusals. */
#define REST_NS 10000000ull
/* How often old requests are looked for. */
#define TICK_NS 1000000000ull
/* Before a request is due an open loop stays awake for so long: main.c says why. */
#define AWAKE_NS 100000ull

enum state { FREE, BUSY, RESTING };

struct call {
	uint64_t intended;     /* latency counts from here */
	uint64_t begun;        /* when it was really sent, or its connection begun */
	uint64_t late_ns;      /* of an open loop: how much earlier that was possible, for a generator that is never late */
	uint64_t freed;        /* since when the connection is free, or rests */
	uint64_t could_free;   /* since when it would be, with such a generator */
	const char *question;
	size_t to_send, sent;
	size_t to_come;        /* of the answer; of an HTTP answer once its head is there */
	char *head;            /* of an HTTP answer; of HTTP/2 whatever frame is not whole */
	size_t head_length;
	char *own;             /* an HTTP/1.1 request: there may be much to send of it yet while others are made */
	struct http2 *http2;   /* and the request, after it */
	uint32_t turns;        /* requests so far */
	int fd;                /* -1: not connected */
	uint16_t status;       /* of an HTTP answer whose head is whole, or 0 */
	uint8_t state, connected, waiting, closing;  /* waiting: to send more */
	uint32_t watched;      /* events */
};

static const struct requests *load;
static struct findings *findings;  /* NULL while connections are proven */
static struct window window;
static struct call calls[MAX_CONNECTIONS];
static struct ids ids;  /* of an HTTP/1.1 request */
static int epoll;
static int busy, resting;
static uint64_t last_answer;

/* Free connections, the longest free first. */
static int idle[MAX_CONNECTIONS];
static uint64_t idle_first, idle_end;

/* The schedule's next time, relative to none before. */
static uint64_t due;
static uint64_t drawn;
static double exact;

/* ---- the schedule */

/* The next time, whatever became of the requests before. */
static void advance(void)
{
	double uniform = (double)((draw(&drawn) >> 11) + 1) / 9007199254740992.0;  /* in (0, 1] */

	exact += 1e9 / load->rate * (load->poisson ? -log(uniform) : 1.0);
	due = (uint64_t)exact;
}

/* ---- one request */

static int counted(uint64_t time)
{
	return time >= window.start && time < window.end;
}

static void release(struct call *call, uint64_t now)
{
	call->state = FREE;
	call->freed = now;
	call->could_free = now - call->late_ns;
	busy--;
	idle[idle_end++ % MAX_CONNECTIONS] = (int)(call - calls);
}

static void disconnect(struct call *call)
{
	if (call->fd >= 0)
		channel_close(call->fd);
	call->fd = -1;
	call->connected = call->waiting = 0;
	call->head_length = 0;
	if (call->http2)
		memset(call->http2, 0, sizeof(*call->http2));
}

static void count_reason(const char *text)
{
	struct reason *reason = findings->reasons;

	while (reason->count && strcmp(reason->text, text) != 0 && reason < findings->reasons + MAX_REASONS - 1)
		reason++;
	if (reason == findings->reasons + MAX_REASONS - 1)
		text = "other reasons";
	snprintf(reason->text, sizeof(reason->text), "%s", text);
	reason->count++;
	findings->failed++;
}

static void begin(struct call *call, uint64_t intended, uint64_t now);

static void fail(struct call *call, const char *doing, const char *why)
{
	uint64_t now = now_ns();
	char text[96];

	snprintf(text, sizeof(text), "%s%s%s", doing, *doing ? ": " : "", why);
	if (!findings)
		die("before the load, connection %d: %s", (int)(call - calls), text);
	disconnect(call);
	count_reason(text);
	release(call, now);
	if (!load->rate) {
		call->state = RESTING;
		resting++;
	}
}

static void finish(struct call *call)
{
	uint64_t now = now_ns();
	char status[32] = "";

	last_answer = now;
	if (call->status && call->status != 200)
		snprintf(status, sizeof(status), "status %u", call->status);
	if (call->closing || load->fresh)
		disconnect(call);
	if (!findings) {
		if (*status)
			die("before the load, connection %d: %s", (int)(call - calls), status);
		release(call, now);
		return;
	}
	if (*status) {
		count_reason(status);
	} else {
		findings->answered++;
		if (counted(load->rate ? call->intended : now))
			record(&findings->latency, now - call->intended);
		if (load->rate && counted(call->intended))
			record(&findings->punctual, now - call->intended - call->late_ns);
	}
	release(call, now);
	if (!load->rate && now < window.end) {
		idle_end--;  /* where it was just put */
		begin(call, now, now);
	}
}

/* Sends what is left of the request; the socket asks to be called again when it takes less. */
static void push(struct call *call)
{
	ssize_t sent = channel_send(call->fd, call->question + call->sent, call->to_send - call->sent);
	uint32_t wanted;

	if (sent < 0 && errno != EAGAIN) {
		fail(call, call->connected ? "send" : "connect", strerror(errno));
		return;
	}
	if (sent > 0) {
		call->sent += (size_t)sent;
		call->connected = 1;
	}
	call->waiting = call->sent < call->to_send;
	wanted = call->waiting ? EPOLLIN | channel_wants(call->fd) : EPOLLIN;
	if (wanted != call->watched)
		watch(epoll, EPOLL_CTL_MOD, call->fd, wanted, (uint64_t)(call - calls));
	call->watched = wanted;
}

static void dial(struct call *call)
{
	call->fd = make_socket(&load->target, SOCK_NONBLOCK);
	if (call->fd < 0) {
		fail(call, "socket", strerror(errno));
		return;
	}
	if (connect(call->fd, (const struct sockaddr *)&load->target.storage, load->target.length) != 0 &&
	    errno != EINPROGRESS) {
		fail(call, "connect", strerror(errno));
		return;
	}
	call->watched = EPOLLIN | EPOLLOUT;
	watch(epoll, EPOLL_CTL_ADD, call->fd, call->watched, (uint64_t)(call - calls));
	call->waiting = 1;
}

static void *at_hand(void *made, size_t size)
{
	if (!made && !(made = calloc(1, size)))
		die("out of memory");
	return made;
}

static void ask(struct call *call)
{
	if (load->http2) {
		call->http2 = at_hand(call->http2, sizeof(*call->http2) + MAX_FRAMES);
		call->question = (char *)(call->http2 + 1);
		call->to_send = http2_ask(call->http2, (char *)(call->http2 + 1));
	} else {
		if (!call->own)
			call->own = memcpy(at_hand(NULL, load->question_length), load->question, load->question_length);
		put_id(call->own, &ids);
		call->question = call->own;
		call->to_send = load->question_length;
	}
	call->to_come = 0;
}

static void begin(struct call *call, uint64_t intended, uint64_t now)
{
	/* Each request of each connection has bytes of its own, so that an answer to another is seen to be one. */
	size_t place = ((size_t)(call - calls) * 7919 + (size_t)call->turns++ * 61) % CHUNK;

	call->state = BUSY;
	busy++;
	call->intended = intended;
	call->begun = now;
	if (load->size) {
		call->question = pattern + place;
		call->to_send = call->to_come = findings ? load->size : 1;
	} else {
		ask(call);
	}
	call->sent = 0;
	if (!load->http2)
		call->head_length = 0;
	call->status = 0;
	call->closing = 0;
	if (findings)
		findings->scheduled++;
	if (call->fd < 0)
		dial(call);
	if (call->state == BUSY)
		push(call);
}

/* ---- answers */

static const char *field(const char *line, const char *name)
{
	size_t length = strlen(name);

	if (strncasecmp(line, name, length) != 0 || line[length] != ':')
		return NULL;
	line += length + 1;
	return line + strspn(line, " \t");
}

/* Reads the head, which ends with a zero. Returns what is wrong with it, or NULL. */
static const char *understand(struct call *call)
{
	int has_length = 0;
	unsigned status;

	if (sscanf(call->head, "HTTP/1.1 %3u", &status) != 1 || status < 200 || status > 599)
		return "not an HTTP/1.1 answer";
	call->status = (uint16_t)status;
	for (const char *line = strstr(call->head, "\r\n"); line; line = strstr(line, "\r\n")) {
		const char *value;

		line += 2;
		if ((value = field(line, "content-length"))) {
			call->to_come = strtoull(value, NULL, 10);
			has_length = 1;
		} else if ((value = field(line, "connection"))) {
			call->closing = strncasecmp(value, "close", 5) == 0;
		}
	}
	return has_length || status == 204 || status == 304 ? NULL : "an answer without Content-Length";
}

/* Reads from the head on. Returns 1 when the whole answer is there. */
static int pull_http(struct call *call, ssize_t *got)
{
	char *end;
	const char *wrong;
	size_t beyond;

	if (call->status) {
		*got = channel_recv(call->fd, scratch, call->to_come < CHUNK ? call->to_come : CHUNK);
		if (*got > 0)
			call->to_come -= (size_t)*got;
		return *got > 0 && call->to_come == 0;
	}
	call->head = at_hand(call->head, MAX_HEAD);
	*got = channel_recv(call->fd, call->head + call->head_length, MAX_HEAD - 1 - call->head_length);
	if (*got <= 0)
		return 0;
	call->head_length += (size_t)*got;
	call->head[call->head_length] = '\0';
	end = memmem(call->head, call->head_length, "\r\n\r\n", 4);
	if (!end) {
		if (call->head_length == MAX_HEAD - 1)
			fail(call, "", "an answer's head of 8 KB");
		return 0;
	}
	end[2] = '\0';
	beyond = call->head_length - (size_t)(end + 4 - call->head);
	wrong = understand(call);
	if (!wrong && beyond > call->to_come)
		wrong = "more bytes than the answer's Content-Length";
	if (wrong) {
		fail(call, "", wrong);
		return 0;
	}
	call->to_come -= beyond;
	return call->to_come == 0;
}

/* Reads frames, of an answer or between two. Returns what is wrong with them, or NULL. */
static const char *read_frames(struct call *call, ssize_t *got)
{
	const char *wrong;
	size_t read;

	call->head = at_hand(call->head, MAX_FRAMES);
	*got = channel_recv(call->fd, call->head + call->head_length, MAX_FRAMES - call->head_length);
	if (*got <= 0)
		return NULL;
	call->head_length += (size_t)*got;
	read = http2_read_answer(call->http2, call->head, call->head_length, &wrong);
	call->head_length -= read;
	memmove(call->head, call->head + read, call->head_length);
	call->closing |= call->http2->going_away;
	return wrong;
}

static int pull_http2(struct call *call, ssize_t *got)
{
	const char *wrong = read_frames(call, got);

	if (!wrong && call->http2->ended)
		wrong = http2_verdict(call->http2);
	if (wrong) {
		fail(call, "", wrong);
		return 0;
	}
	call->status = (uint16_t)call->http2->status;
	return call->http2->ended;
}

static int pull_echo(struct call *call, ssize_t *got)
{
	size_t most = call->to_come < CHUNK ? call->to_come : CHUNK;

	*got = channel_recv(call->fd, scratch, most);
	if (*got <= 0)
		return 0;
	if (memcmp(scratch, call->question + call->to_send - call->to_come, (size_t)*got) != 0)
		die("the echo differs from what was sent");
	call->to_come -= (size_t)*got;
	return call->to_come == 0;
}

static void pull(struct call *call)
{
	ssize_t got = 0;
	int whole = load->size ? pull_echo(call, &got) : load->http2 ? pull_http2(call, &got) : pull_http(call, &got);

	if (whole)
		finish(call);
	else if (got == 0 && call->state == BUSY)
		fail(call, "", "the peer closed before it had answered");
	else if (got < 0 && errno != EAGAIN)
		fail(call, call->connected ? "receive" : "connect", strerror(errno));
}

/* A connection on which nothing is asked: it may end, and nothing else may come. */
static void look(struct call *call)
{
	char byte;
	ssize_t got;

	if (call->fd < 0)
		return;
	if (load->http2) {
		/* Frames of the connection come at any time. */
		if (!read_frames(call, &got) && got > 0 && !call->closing)
			return;
	} else {
		got = channel_recv(call->fd, &byte, 1);
	}
	if (got < 0 && errno == EAGAIN)
		return;
	if (got > 0 && load->size)
		die("bytes that nobody asked for");
	disconnect(call);
	if (findings)
		findings->broken++;
}

/* ---- the loop */

static void send_what_is_due(uint64_t now)
{
	while (due <= now && due < window.end && idle_first < idle_end) {
		struct call *call = &calls[idle[idle_first++ % MAX_CONNECTIONS]];
		uint64_t intended = due, possible = intended > call->freed ? intended : call->freed;

		call->late_ns = now - (intended > call->could_free ? intended : call->could_free);
		if (counted(intended)) {
			record(&findings->lateness, now - possible);
			findings->waited += possible > intended;
		}
		findings->behind_ns = now - intended;
		advance();
		begin(call, intended, now);
		now = now_ns();
	}
}

/* In a closed loop: all of them at first, and then those that have rested. */
static void go_on(uint64_t now)
{
	while (idle_first < idle_end) {
		struct call *call = &calls[idle[idle_first % MAX_CONNECTIONS]];

		if (call->state == RESTING && now - call->freed < REST_NS)
			break;
		idle_first++;
		resting -= call->state == RESTING;
		begin(call, now, now);
	}
}

static void handle(const struct epoll_event *event)
{
	struct call *call = &calls[event->data.u64];

	if (call->state != BUSY) {
		look(call);
		return;
	}
	if (call->waiting && (event->events & channel_wants(call->fd)))
		push(call);
	if (call->state == BUSY && (event->events & (EPOLLIN | EPOLLERR | EPOLLHUP)))
		pull(call);
}

/* Returns how many events were handled, after at most so long. `after_each`: what may have become possible. */
static int turn(uint64_t timeout_ns, void (*after_each)(uint64_t now))
{
	struct epoll_event events[EVENTS];
	struct timespec timeout = { .tv_sec = (time_t)(timeout_ns / 1000000000ull),
				    .tv_nsec = (long)(timeout_ns % 1000000000ull) };
	int count = epoll_pwait2(epoll, events, EVENTS, &timeout, NULL);

	if (count < 0 && errno != EINTR)
		die("epoll_pwait2: %s", strerror(errno));
	for (int i = 0; i < count; i++) {
		handle(&events[i]);
		if (after_each)
			after_each(now_ns());
	}
	return count;
}

static void check_for_stalls(uint64_t now)
{
	if (busy && now - last_answer > STALL_NS)
		die("no answer on any connection for %llu s", STALL_NS / 1000000000ull);
	for (int i = 0; i < load->connections; i++)
		if (calls[i].state == BUSY && now - calls[i].begun > STALL_NS)
			fail(&calls[i], "", "no answer within 10 s");
}

static void prove(void)
{
	int next = 0;

	idle_first = idle_end = 0;
	last_answer = now_ns();
	while (next < load->connections || busy) {
		while (busy < PROOFS && next < load->connections) {
			uint64_t now = now_ns();

			begin(&calls[next++], now, now);
		}
		turn(TICK_NS, NULL);
		check_for_stalls(now_ns());
	}
}

void prepare(const struct requests *requests)
{
	if (requests->connections < 1 || requests->connections > MAX_CONNECTIONS || requests->size > CHUNK)
		die("wants 1 to %d connections and up to %zu bytes", MAX_CONNECTIONS, CHUNK);
	load = requests;
	if (load->question_length)
		ids = find_ids(load->question, load->question_length);
	epoll = epoll_create1(EPOLL_CLOEXEC);
	for (int i = 0; i < load->connections; i++)
		calls[i].fd = -1;
	prove();
}

void prove_again(void)
{
	prove();
}

static uint64_t until_next(uint64_t now, uint64_t tick)
{
	uint64_t next = tick;

	if (load->rate && due < window.end && idle_first < idle_end && due < next)
		next = due - AWAKE_NS;
	if (resting && now + REST_NS < next)
		next = now + REST_NS;
	if (now < window.end && window.end < next)
		next = window.end;
	return next > now ? next - now : 0;
}

void run_requests(struct window wanted, struct findings *into)
{
	uint64_t now = now_ns(), tick = now + TICK_NS, cpu_at_start = 0, awake_ns = 0;
	int started = 0, ended = 0;

	window = wanted;
	findings = into;
	last_answer = now;
	drawn = load->seed;
	exact = (double)now;
	if (load->rate)
		advance();
	for (;;) {
		uint64_t timeout_ns, used_ns;
		int handled;

		if (!started && now >= window.start) {
			started = 1;
			cpu_at_start = cpu_ns();
		}
		if (!ended && now >= window.end) {
			ended = 1;
			findings->cpu_ns = cpu_ns() - cpu_at_start - awake_ns;
		}
		if (load->rate)
			send_what_is_due(now);
		else if (!ended)
			go_on(now);
		if (ended && !busy && (!load->rate || due >= window.end))
			break;
		if (ended && now > window.end + STALL_NS)
			break;
		timeout_ns = until_next(now, tick);
		used_ns = timeout_ns ? 0 : cpu_ns();
		handled = turn(timeout_ns, load->rate ? send_what_is_due : NULL);
		if (!timeout_ns && !handled) {
			sched_yield();
			if (started && !ended)
				awake_ns += cpu_ns() - used_ns;
		}
		now = now_ns();
		if (now >= tick) {
			check_for_stalls(now);
			tick = now + TICK_NS;
		}
	}
	for (int i = 0; i < load->connections; i++)
		if (calls[i].state == BUSY)
			fail(&calls[i], "", "no answer until 10 s after the end");
	for (; load->rate && due < window.end; advance()) {
		findings->scheduled++;
		count_reason("not sent until 10 s after the end: every connection was busy");
	}
	findings = NULL;
}
