/* A delay line between two Ethernet devices: what arrives at one leaves at the other, so much later, in order.
 *
 *   link DEVICE DEVICE NANOSECONDS
 *
 * Prints `ready`, and at SIGTERM one JSON object: frames carried and frames lost. Offloads pass as they are: each frame
 * is read and written with its virtio_net_hdr (packet(7), PACKET_VNET_HDR), so that 64 KB of TCP stay one frame and a
 * checksum that is left to the device stays so. The time counts from the kernel's own stamp of the arrival, which is of
 * CLOCK_REALTIME: it is only asked how old it is, so that a clock that is set delays no frame that waits.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <linux/if_packet.h>
#include <net/ethernet.h>
#include <net/if.h>
#include <poll.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/types.h>
#include <time.h>
#include <unistd.h>

/* 64 KB of IP, the Ethernet header, a VLAN tag, the virtio_net_hdr. */
#define MAX_FRAME (65536 + 64)
/* 1 ms of 100 Gbit/s is 12 MB. */
#define RING_BYTES (32u << 20)
#define SOCKET_BYTES (32 << 20)
/* Between two looks at what is due. */
#define BURST 32
/* A sleep ends late by about as much; the rest is waited out awake. */
#define AWAKE_NS 30000
/* No frame waits longer in a socket that is read all the time. */
#define OLDEST_NS 100000000ull

struct entry {
	uint64_t due_ns;
	uint32_t length, skip;  /* skip: the ring goes on at its start */
};

/* One way: a ring of frames that wait. The delay is one for all, so that they leave in the order of arrival. */
struct way {
	int from, to;
	char *ring;
	uint32_t head, tail, waiting;
	uint64_t carried, lost;
};

static volatile sig_atomic_t ended;

static void end(int signal_number)
{
	(void)signal_number;
	ended = 1;
}

static void die(const char *format, ...)
{
	va_list arguments;

	va_start(arguments, format);
	vfprintf(stderr, format, arguments);
	va_end(arguments);
	fprintf(stderr, ": %s\n", strerror(errno));
	exit(1);
}

static uint64_t ns_of(const struct timespec *time)
{
	return (uint64_t)time->tv_sec * 1000000000ull + (uint64_t)time->tv_nsec;
}

static uint64_t clock_ns(clockid_t clock)
{
	struct timespec now;

	clock_gettime(clock, &now);
	return ns_of(&now);
}

static uint64_t now_ns(void)
{
	return clock_ns(CLOCK_MONOTONIC);
}

static int device(const char *name)
{
	struct sockaddr_ll address = { .sll_family = AF_PACKET, .sll_protocol = htons(ETH_P_ALL) };
	int one = 1, bytes = SOCKET_BYTES, fd = socket(AF_PACKET, SOCK_RAW, 0);

	if (fd < 0)
		die("a packet socket");
	address.sll_ifindex = (int)if_nametoindex(name);
	if (!address.sll_ifindex)
		die("device %s", name);
	if (setsockopt(fd, SOL_PACKET, PACKET_VNET_HDR, &one, sizeof(one)) ||
	    setsockopt(fd, SOL_PACKET, PACKET_IGNORE_OUTGOING, &one, sizeof(one)) ||
	    setsockopt(fd, SOL_SOCKET, SO_TIMESTAMPNS, &one, sizeof(one)) ||
	    setsockopt(fd, SOL_SOCKET, SO_RCVBUFFORCE, &bytes, sizeof(bytes)) ||
	    setsockopt(fd, SOL_SOCKET, SO_SNDBUFFORCE, &bytes, sizeof(bytes)))
		die("options of the socket of %s", name);
	if (bind(fd, (struct sockaddr *)&address, sizeof(address)))
		die("bind to %s", name);
	return fd;
}

static struct entry *entry_at(struct way *way, uint32_t at)
{
	return (struct entry *)(way->ring + at);
}

static uint32_t size_of(uint32_t length)
{
	return (uint32_t)((sizeof(struct entry) + length + 15) & ~15u);
}

/* Where the next frame may be read to, or NULL when the ring is full. */
static struct entry *room(struct way *way)
{
	uint32_t need = size_of(MAX_FRAME) + sizeof(struct entry);

	if (!way->waiting)
		way->head = way->tail = 0;
	if (way->tail < way->head)
		return way->head - way->tail > need ? entry_at(way, way->tail) : NULL;
	if (RING_BYTES - way->tail > need)
		return entry_at(way, way->tail);
	if (way->head <= need)
		return NULL;
	entry_at(way, way->tail)->skip = 1;
	way->tail = 0;
	return entry_at(way, 0);
}

/* When it came. A stamp of the future, or of long ago, is of a clock that was set meanwhile: it came just now. */
static uint64_t arrived_ns(struct msghdr *message)
{
	for (struct cmsghdr *one = CMSG_FIRSTHDR(message); one; one = CMSG_NXTHDR(message, one)) {
		struct timespec time;

		if (one->cmsg_level == SOL_SOCKET && one->cmsg_type == SO_TIMESTAMPNS) {
			uint64_t age_ns;

			memcpy(&time, CMSG_DATA(one), sizeof(time));
			age_ns = clock_ns(CLOCK_REALTIME) - ns_of(&time);
			return now_ns() - (age_ns < OLDEST_NS ? age_ns : 0);
		}
	}
	return now_ns();
}

static void take(struct way *way, uint64_t delay_ns)
{
	for (int i = 0; i < BURST; i++) {
		char control[128], spare[1];
		struct entry *entry = room(way);
		struct iovec data = { entry ? (char *)(entry + 1) : spare, entry ? MAX_FRAME : sizeof(spare) };
		struct msghdr message = { .msg_iov = &data, .msg_iovlen = 1, .msg_control = control,
					  .msg_controllen = sizeof(control) };
		ssize_t got = recvmsg(way->from, &message, MSG_DONTWAIT);

		if (got < 0 && (errno == EAGAIN || errno == EINTR))
			return;
		/* A device that goes down says so once; whoever takes it away also ends this program. */
		if (got < 0 && errno != ENETDOWN)
			die("recvmsg");
		if (got < 0 || !entry || (message.msg_flags & MSG_TRUNC)) {
			way->lost++;
			continue;
		}
		entry->due_ns = arrived_ns(&message) + delay_ns;
		entry->length = (uint32_t)got;
		entry->skip = 0;
		way->tail += size_of(entry->length);
		way->waiting++;
	}
}

/* Sends what is due; returns when the next one is, or UINT64_MAX. */
static uint64_t give(struct way *way)
{
	uint64_t now = now_ns();

	while (way->waiting) {
		struct entry *entry = entry_at(way, way->head);

		if (entry->skip) {
			way->head = 0;
			entry = entry_at(way, 0);
		}
		if (entry->due_ns > now && entry->due_ns > (now = now_ns()))
			return entry->due_ns;
		if (send(way->to, entry + 1, entry->length, 0) < 0)
			way->lost++;
		else
			way->carried++;
		way->head += size_of(entry->length);
		way->waiting--;
	}
	return UINT64_MAX;
}

static uint64_t dropped(int fd)
{
	struct tpacket_stats found = { 0 };
	socklen_t length = sizeof(found);

	return getsockopt(fd, SOL_PACKET, PACKET_STATISTICS, &found, &length) ? 0 : found.tp_drops;
}

int main(int argc, char **argv)
{
	struct way ways[2] = { 0 };
	struct pollfd polled[2];
	struct sigaction at_end = { .sa_handler = end };
	struct sigaction quiet = { .sa_handler = SIG_IGN };
	sigset_t blocked, waiting;
	uint64_t delay_ns, carried = 0, lost = 0;

	if (argc != 4) {
		fprintf(stderr, "usage: link DEVICE DEVICE NANOSECONDS\n");
		return 2;
	}
	delay_ns = strtoull(argv[3], NULL, 10);
	sigaction(SIGTERM, &at_end, NULL);
	/* It comes while we wait, and at no other time: one between a look at `ended` and the wait would be lost. */
	sigemptyset(&blocked);
	sigaddset(&blocked, SIGTERM);
	sigprocmask(SIG_BLOCK, &blocked, &waiting);
	sigdelset(&waiting, SIGTERM);
	sigaction(SIGPIPE, &quiet, NULL);
	/* Without it a sleep ends up to 50 us late on purpose. */
	prctl(PR_SET_TIMERSLACK, 1, 0, 0, 0);
	for (int i = 0; i < 2; i++) {
		ways[i].from = device(argv[1 + i]);
		ways[i].ring = mmap(NULL, RING_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
		if (ways[i].ring == MAP_FAILED)
			die("memory");
		polled[i] = (struct pollfd){ .fd = ways[i].from, .events = POLLIN };
	}
	ways[0].to = ways[1].from;
	ways[1].to = ways[0].from;
	puts("ready");
	fflush(stdout);
	while (!ended) {
		uint64_t first = give(&ways[0]), second = give(&ways[1]), next = first < second ? first : second;
		uint64_t now = now_ns(), left = next <= now + AWAKE_NS ? 0 : next - now - AWAKE_NS;
		struct timespec wait = { (time_t)(left / 1000000000ull), (long)(left % 1000000000ull) };

		if (ppoll(polled, 2, next == UINT64_MAX ? NULL : &wait, &waiting) <= 0)
			continue;
		for (int i = 0; i < 2; i++)
			if (polled[i].revents)
				take(&ways[i], delay_ns);
	}
	for (int i = 0; i < 2; i++) {
		carried += ways[i].carried;
		lost += ways[i].lost + dropped(ways[i].from);
	}
	printf("{\"carried\": %llu, \"lost\": %llu}\n", (unsigned long long)carried, (unsigned long long)lost);
	return 0;
}
