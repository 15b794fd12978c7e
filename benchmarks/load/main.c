/* The project's load generator, and the server that it loads. benchmarks/load/__init__.py builds and calls it.
 *
 *   load serve ADDRESS PORT [--stall-ms MS --every-ms MS]
 *       Runs until killed. PORT echoes, PORT + 1 sinks (and answers its count after a FIN), PORT + 2 is HTTP/1.1
 *       (GET /bytes/N, and POST, whose answer is as long) and HTTP/2 (which echoes bodies, as gRPC where it is),
 *       PORT + 3 sends until it is closed. With a stall, all of it sleeps MS every MS.
 *   load closed HOST PORT SECONDS --connections N --size BYTES
 *   load open HOST PORT SECONDS --connections N --size BYTES --rate N --poisson 0|1 --seed N
 *   load http-closed HOST PORT SECONDS --connections N --path PATH --host NAME
 *   load http-open HOST PORT SECONDS --connections N --path PATH --host NAME --rate N --poisson 0|1 --seed N
 *       both with --protocol http1|http2|grpc --body BYTES: POSTs, or unary gRPC calls; without, they are GETs. Each
 *       has an id of its own, in the field X-Request-Id and, but for gRPC, in the query
 *   load http-idle HOST PORT SECONDS --connections N --path PATH --host NAME   as idle, with an HTTP request
 *   load connects HOST PORT SECONDS --connections N         connect, a byte there and back, close; N at once
 *   load dials HOST PORT SECONDS --spread N --seed N        the same one by one, each to one of N addresses from HOST on
 *   load bulk HOST PORT SECONDS --streams N                 to the sink
 *   load beside-bulk ... as open, and --streams N --bulk-rate BYTES   a second; they are a process of their own
 *   load idle HOST PORT SECONDS --connections N             held for so long, a byte there and back before and after
 *   load slow-readers ... as open, and --readers N          readers of the source that never read
 *
 * With --tls DIR --tls-peer SPIFFE_ID server and load speak mutual TLS 1.3 themselves (channel.h), but for HTTP and dials.
 *
 * HOST is an address. PORT is the server's first one, but for HTTP: there it is the one to dial. A tenth of SECONDS
 * before the counted part warms up. Prints "ready" when all connections stand (with --wait 1 it begins when it is sent a byte
 * then, so that several begin together), and one JSON object at the end; its times are CLOCK_MONOTONIC's. Exit status 1 with a reason on stderr when there is nothing to report: a byte changed, a count
 * differs, nothing was answered for 10 s, no connection could be made at first.
 *
 * How it waits. One thread, in epoll_pwait2 with a timer slack of 1 ns until 100 us before the next request is due, and
 * awake from then on: it asks for events without waiting, and yields the core to whoever else wants it. On a virtual
 * machine of two cores, busy with other work, requests were sent so late (median, and p99, in us):
 *
 *   a second         1,000        5,000        20,000
 *   asleep           53, 152      44, 519      30, 150
 *   50 us awake       8, 253       1, 318      0.3, 65
 *   100 us awake    0.2, 69      0.2, 354      0.2, 33
 *
 * Measured before it yielded, with all of it at raised priority; yielding made the medians 0.4 to 0.7 us.
 * A timerfd was no better than epoll_pwait2's own timeout. The tails are those of the machine; a run in which they
 * matter is refused (bottleneck in __init__.py). Time awake with nothing to do is not in the processor time reported.
 *
 * On two cores an application has to share the generator's. At raised priority (nice) it is not kept waiting, since we
 * yield: an echo on the same core took 39 us at 500 a second and 48 at 2,000 (median; p90 57 and 67), where a generator
 * that is awake only while nothing is on its way had 40 and 51 (63 and 78), and one that sleeps 64 and 98. In real time
 * (SCHED_FIFO) we yield to our like only: with four generators at 500 a second together p90 is 66 us in place of 49.
 * Those at nice were at times sent 2 ms late there, since four hold each other up. Proxies never share our core, and
 * whatever is measured so is measured so for every subject.
 */
#define _GNU_SOURCE
#include "bulk.h"
#include "channel.h"
#include "common.h"
#include "dials.h"
#include "ids.h"
#include "requests.h"
#include "server.h"

#include <errno.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <unistd.h>

#define MAX_READERS 4096

struct options {
	const char *kind, *address, *path, *host, *protocol;
	const char *tls, *tls_peer;
	int port, connections, streams, readers, poisson, wait;
	size_t size, body;
	double seconds, rate, bulk_rate;
	uint64_t seed;
	uint32_t spread;
	struct stall stall;
};

static double number(const char *text, double least, double most)
{
	char *end;
	double value = strtod(text, &end);

	if (*end || end == text || !(value >= least && value <= most))
		die("%s is not a number from %g to %g", text, least, most);
	return value;
}

static struct options read_options(int argc, char **argv)
{
	struct options made = { .kind = argc > 3 ? argv[1] : "", .path = "/", .host = "load", .protocol = "http1" };
	int first = strcmp(made.kind, "serve") == 0 ? 4 : 5;

	if (argc < first || (argc - first) % 2)
		die("usage: see the head of benchmarks/load/main.c");
	made.address = argv[2];
	made.port = (int)number(argv[3], 1, 65535);
	if (first == 5)
		made.seconds = number(argv[4], 0.05, 86400);
	for (int i = first; i < argc; i += 2) {
		const char *name = argv[i], *value = argv[i + 1];

		if (strcmp(name, "--connections") == 0)
			made.connections = (int)number(value, 1, MAX_CONNECTIONS);
		else if (strcmp(name, "--size") == 0)
			made.size = (size_t)number(value, 1, (double)CHUNK);
		else if (strcmp(name, "--rate") == 0)
			made.rate = number(value, 0.1, 1e7);
		else if (strcmp(name, "--poisson") == 0)
			made.poisson = (int)number(value, 0, 1);
		else if (strcmp(name, "--wait") == 0)
			made.wait = (int)number(value, 0, 1);
		else if (strcmp(name, "--seed") == 0)
			made.seed = (uint64_t)number(value, 0, 4294967295.0);
		else if (strcmp(name, "--spread") == 0)
			made.spread = (uint32_t)number(value, 1, 16777216);
		else if (strcmp(name, "--streams") == 0)
			made.streams = (int)number(value, 1, MAX_STREAMS);
		else if (strcmp(name, "--bulk-rate") == 0)
			made.bulk_rate = number(value, 1e5, 1e11);
		else if (strcmp(name, "--readers") == 0)
			made.readers = (int)number(value, 1, MAX_READERS);
		else if (strcmp(name, "--path") == 0)
			made.path = value;
		else if (strcmp(name, "--host") == 0)
			made.host = value;
		else if (strcmp(name, "--protocol") == 0)
			made.protocol = value;
		else if (strcmp(name, "--body") == 0)
			made.body = (size_t)number(value, 1, MAX_BODY_BYTES);
		else if (strcmp(name, "--tls") == 0)
			made.tls = value;
		else if (strcmp(name, "--tls-peer") == 0)
			made.tls_peer = value;
		else if (strcmp(name, "--stall-ms") == 0)
			made.stall.for_ns = (uint64_t)(number(value, 1, 60000) * 1e6);
		else if (strcmp(name, "--every-ms") == 0)
			made.stall.every_ns = (uint64_t)(number(value, 1, 60000) * 1e6);
		else
			die("unknown option %s", name);
	}
	return made;
}

static void want(int given, const char *name)
{
	if (!given)
		die("%s is missing", name);
}

static void say_ready(const struct options *options)
{
	char word;

	puts("ready");
	fflush(stdout);
	if (options->wait && read(STDIN_FILENO, &word, 1) != 1)
		die("nobody has said when to begin");
}

static struct window window_of(double seconds)
{
	uint64_t start = now_ns() + (uint64_t)(seconds * 1e8);

	return (struct window){ start, start + (uint64_t)(seconds * 1e9) };
}

/* ---- readers that do not read */

static int readers[MAX_READERS];

static void open_readers(const struct address *source, int count)
{
	for (int i = 0; i < count; i++) {
		struct pollfd sent = { .fd = dial_and_wait(source), .events = POLLIN };
		char byte;
		ssize_t got;

		readers[i] = sent.fd;
		do {
			got = channel_recv(readers[i], &byte, 1);
		} while (got < 0 && errno == EAGAIN && poll(&sent, 1, (int)(STALL_NS / 1000000)) == 1);
		if (got != 1)
			die("the source sent nothing: %s", strerror(errno));
	}
}

static uint64_t broken_readers(int count)
{
	uint64_t broken = 0;

	for (int i = 0; i < count; i++) {
		struct pollfd poked = { .fd = readers[i] };

		broken += poll(&poked, 1, 0) > 0;  /* an error or a hang-up: nothing else is asked for */
	}
	return broken;
}

/* ---- the report */

static void begin_report(const struct options *options, struct window window, uint64_t used_ns)
{
	printf("{\"kind\": \"%s\", \"start_ns\": %llu, \"end_ns\": %llu, \"cpu_ns\": %llu", options->kind,
	       (unsigned long long)window.start, (unsigned long long)window.end, (unsigned long long)used_ns);
}

static void report_count(const char *name, uint64_t count)
{
	printf(", \"%s\": %llu", name, (unsigned long long)count);
}

static void report_histogram(const char *name, const struct histogram *histogram)
{
	printf(", \"%s\": {\"sum_ns\": %llu, \"max_ns\": %llu, \"counts\": ", name,
	       (unsigned long long)histogram->sum_ns, (unsigned long long)histogram->max_ns);
	write_histogram(histogram);
	putchar('}');
}

static void report_requests(const struct options *options, struct window window, const struct findings *findings)
{
	const char *between = "";

	if (!findings->latency.count) {
		for (int i = 0; i < MAX_REASONS && findings->reasons[i].count; i++)
			fprintf(stderr, "%llu times: %s\n", (unsigned long long)findings->reasons[i].count,
				findings->reasons[i].text);
		die("no request was answered");
	}
	begin_report(options, window, findings->cpu_ns);
	report_count("scheduled", findings->scheduled);
	report_count("answered", findings->answered);
	report_count("waited", findings->waited);
	report_count("behind_ns", findings->behind_ns);
	report_count("broken", findings->broken);
	printf(", \"errors\": {");
	for (int i = 0; i < MAX_REASONS && findings->reasons[i].count; i++) {
		printf("%s\"%s\": %llu", between, findings->reasons[i].text,
		       (unsigned long long)findings->reasons[i].count);
		between = ", ";
	}
	putchar('}');
	report_histogram("latency", &findings->latency);
	report_histogram("lateness", &findings->lateness);
	report_histogram("punctual", &findings->punctual);
}

/* ---- the loads */

/* What is asked for by HTTP: the request of HTTP/1.1, or else what http2_prepare takes. */
static void prepare_question(const struct options *options, struct requests *requests)
{
	static char question[4096 + MAX_BODY_BYTES];
	struct http2_question asked = { .path = options->path, .host = options->host, .body = options->body };
	char length[128] = "";
	int head;

	requests->question = question;
	if (strcmp(options->protocol, "http1") != 0) {
		asked.grpc = strcmp(options->protocol, "grpc") == 0;
		if (!asked.grpc && strcmp(options->protocol, "http2") != 0)
			die("unknown protocol %s", options->protocol);
		http2_prepare(&asked);
		requests->http2 = 1;
		return;
	}
	if (options->body)
		snprintf(length, sizeof(length), "User-Agent: load\r\nContent-Type: application/octet-stream\r\n"
			 "Content-Length: %zu\r\n", options->body);
	head = snprintf(question, 4096, "%s %s?id=" ID " HTTP/1.1\r\nHost: %s\r\nX-Request-Id: " ID "\r\n%s\r\n",
			options->body ? "POST" : "GET", options->path, options->host, length);
	if (head >= 4096)
		die("a path and host of 4 KB");
	memcpy(question + head, pattern, options->body);
	requests->question_length = (size_t)head + options->body;
}

static void load_requests(const struct options *options)
{
	static struct findings findings;
	int is_http = strncmp(options->kind, "http-", 5) == 0, is_connects = strcmp(options->kind, "connects") == 0;
	int is_open = !is_connects && !strstr(options->kind, "closed");
	struct requests requests = {
		.target = address_of(options->address, options->port),
		.connections = options->connections,
		.size = is_http ? 0 : is_connects ? 1 : options->size,
		.fresh = is_connects,
		.rate = is_open ? options->rate : 0,
		.poisson = options->poisson,
		.seed = options->seed,
	};
	struct address sink, source;
	struct beside beside = { 0 };
	struct bulk_result streamed = { 0 };
	struct window window;

	want(options->connections, "--connections");
	want(is_http || requests.size, "--size");
	want(!is_open || options->rate > 0, "--rate");
	want(!options->streams || options->bulk_rate > 0, "--bulk-rate");
	prepare_question(options, &requests);
	if (options->streams) {
		sink = address_of(options->address, options->port + SINK_PORT);
		beside = fork_bulk(&sink, options->streams, options->bulk_rate);
	}
	if (options->readers) {
		source = address_of(options->address, options->port + SOURCE_PORT);
		open_readers(&source, options->readers);
	}
	prepare(&requests);
	say_ready(options);
	window = window_of(options->seconds);
	if (options->streams)
		start_bulk(beside, window);
	run_requests(window, &findings);
	if (options->streams)
		streamed = await_bulk(beside);
	findings.broken += broken_readers(options->readers);
	report_requests(options, window, &findings);
	report_count("bytes", streamed.bytes);
	printf(", \"rate\": %.6g, \"bulk_rate\": %.0f", requests.rate, options->bulk_rate);
	puts("}");
}

static void load_bulk(const struct options *options)
{
	struct address sink = address_of(options->address, options->port + SINK_PORT);
	struct window window = window_of(options->seconds);
	struct bulk_result result;

	want(options->streams, "--streams");
	say_ready(options);
	result = bulk(&sink, options->streams, 0, window);
	begin_report(options, window, result.cpu_ns);
	report_count("bytes", result.bytes);
	puts("}");
}

static void load_dials(const struct options *options)
{
	static struct dialled dialled;
	struct dials dials = {
		.target = address_of(options->address, options->port),
		.spread = options->spread,
		.seed = options->seed,
	};
	struct window window;

	want((int)options->spread, "--spread");
	say_ready(options);
	window = window_of(options->seconds);
	run_dials(&dials, window, &dialled);
	if (!dialled.latency.count)
		die("no connection was made in the time that counts");
	begin_report(options, window, dialled.cpu_ns);
	report_count("scheduled", dialled.scheduled);
	report_count("answered", dialled.scheduled);
	report_histogram("latency", &dialled.latency);
	puts("}");
}

static void hold_idle(const struct options *options)
{
	struct requests requests = {
		.target = address_of(options->address, options->port),
		.connections = options->connections,
		.size = strcmp(options->kind, "idle") == 0,
	};
	struct window window;

	want(options->connections, "--connections");
	prepare_question(options, &requests);
	prepare(&requests);
	say_ready(options);
	window = window_of(options->seconds);
	while (now_ns() < window.end)
		poll(NULL, 0, (int)((window.end - now_ns()) / 1000000) + 1);
	prove_again();
	begin_report(options, window, 0);
	report_count("held", (uint64_t)options->connections);
	puts("}");
}

static void use_tls(const struct options *options)
{
	want(options->tls_peer != NULL, "--tls-peer");
	if (strncmp(options->kind, "http-", 5) == 0 || options->size > MOST_IN_TLS)
		die("in TLS there are echoes of up to %zu bytes, and streams", MOST_IN_TLS);
	channel_use_tls(options->tls, options->tls_peer);
}

static int is_requests(const char *kind)
{
	static const char *const KINDS[] = { "closed", "open", "http-closed", "http-open", "connects", "beside-bulk",
					     "slow-readers" };

	for (size_t i = 0; i < sizeof(KINDS) / sizeof(*KINDS); i++)
		if (strcmp(kind, KINDS[i]) == 0)
			return 1;
	return 0;
}

int main(int argc, char **argv)
{
	struct options options = read_options(argc, argv);
	struct rlimit files = { MAX_FD, MAX_FD };

	fill_pattern();
	signal(SIGPIPE, SIG_IGN);
	if (setrlimit(RLIMIT_NOFILE, &files) != 0 && getrlimit(RLIMIT_NOFILE, &files) == 0) {
		files.rlim_cur = files.rlim_max;
		setrlimit(RLIMIT_NOFILE, &files);
	}
	/* Sleeps end when they should: by default the kernel may add 50 us to each. */
	prctl(PR_SET_TIMERSLACK, 1);
	if (options.tls)
		use_tls(&options);
	if (strcmp(options.kind, "serve") == 0)
		serve(options.address, options.port, options.stall);
	else if (strcmp(options.kind, "bulk") == 0)
		load_bulk(&options);
	else if (strcmp(options.kind, "dials") == 0)
		load_dials(&options);
	else if (strcmp(options.kind, "idle") == 0 || strcmp(options.kind, "http-idle") == 0)
		hold_idle(&options);
	else if (is_requests(options.kind))
		load_requests(&options);
	else
		die("unknown load %s", options.kind);
	return 0;
}
