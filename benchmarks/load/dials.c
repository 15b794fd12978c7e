#define _GNU_SOURCE
#include "dials.h"

#include <arpa/inet.h>
#include <errno.h>
#include <netinet/in.h>
#include <string.h>
#include <unistd.h>

static void exchange(int fd)
{
	char byte = 'x', back;

	if (send(fd, &byte, 1, 0) != 1)
		die("send: %s", strerror(errno));
	switch (recv(fd, &back, 1, 0)) {
	case 1:
		break;
	case 0:
		die("the peer closed before it had answered");
	default:
		die("receive: %s", strerror(errno));
	}
	if (back != byte)
		die("the echo differs from what was sent");
}

/* An address so far from the first one, by its last 32 bits. */
static struct address further(struct address target, uint32_t by)
{
	struct sockaddr_in *four = (struct sockaddr_in *)&target.storage;
	struct sockaddr_in6 *six = (struct sockaddr_in6 *)&target.storage;
	uint32_t *last = target.storage.ss_family == AF_INET ? &four->sin_addr.s_addr : &six->sin6_addr.s6_addr32[3];

	*last = htonl(ntohl(*last) + by);
	return target;
}

void run_dials(const struct dials *dials, struct window window, struct dialled *found)
{
	uint64_t drawn = dials->seed, used = 0, before, after;

	do {
		struct address target = further(dials->target, (uint32_t)(draw(&drawn) % dials->spread));
		int fd = make_socket(&target, 0);

		if (fd < 0)
			die("socket: %s", strerror(errno));
		before = now_ns();
		if (before >= window.start && !used)
			used = cpu_ns();
		if (connect(fd, (const struct sockaddr *)&target.storage, target.length) != 0)
			die("connect: %s", strerror(errno));
		after = now_ns();
		found->scheduled++;
		if (before >= window.start && after < window.end)
			record(&found->latency, after - before);
		exchange(fd);
		close(fd);
	} while (after < window.end);
	found->cpu_ns = cpu_ns() - used;
}
