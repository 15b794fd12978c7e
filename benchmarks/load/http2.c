#define _GNU_SOURCE
#include "http2.h"

#include "common.h"
#include "ids.h"

#include <stdio.h>
#include <string.h>

#define FRAME_HEAD 9
/* RFC 9113 6.9.2: a window's size at first. */
#define FIRST_WINDOW 65535
#define OTHER_STATUS 999
/* RFC 9113 5.1.1: the last stream that a client can open. */
#define LAST_STREAM 0x7ffffffful

enum type { DATA, HEADERS, PRIORITY, RST_STREAM, SETTINGS, PUSH_PROMISE, PING, GOAWAY, WINDOW_UPDATE, CONTINUATION };
enum { END_STREAM = 1, ACK = 1, END_HEADERS = 4, PADDED = 8 };

struct frame {
	uint8_t type, flags;
	uint32_t stream;
	const uint8_t *payload;
	size_t length;
};

/* SETTINGS_HEADER_TABLE_SIZE: nothing that is sent to us depends on what came before. */
static const char NO_TABLE[6] = { 0, 1, 0, 0, 0, 0 };

/* RFC 7541 appendix B: as a peer that uses Huffman codes writes these. */
static const char GRPC[] = "application/grpc", GRPC_CODED[] = "\x1d\x75\xd0\x62\x0d\x26\x3d\x4c\x4d\x65\x64";
static const char STATUS[] = "grpc-status", STATUS_CODED[] = "\x9a\xca\xc8\xb2\x12\x34\xda\x8f";

static struct http2_question asked;
static char fields[2048];
static size_t fields_length;
static struct ids ids;

/* ---- writing */

static char *put_frame(char *into, enum type type, int flags, uint32_t stream, const void *payload, size_t length)
{
	const uint8_t head[FRAME_HEAD] = {
		(uint8_t)(length >> 16), (uint8_t)(length >> 8), (uint8_t)length, (uint8_t)type, (uint8_t)flags,
		(uint8_t)(stream >> 24), (uint8_t)(stream >> 16), (uint8_t)(stream >> 8), (uint8_t)stream,
	};

	memcpy(into, head, FRAME_HEAD);
	memcpy(into + FRAME_HEAD, payload, length);
	return into + FRAME_HEAD + length;
}

static char *put_field(char *into, const char *name, const char *value)
{
	size_t name_length = strlen(name), value_length = strlen(value);

	/* Lengths of one octet: RFC 7541 5.1. */
	if (name_length > 126 || value_length > 126)
		die("a field of more than 126 bytes: %s", name);
	*into++ = 0;
	*into++ = (char)name_length;
	into = mempcpy(into, name, name_length);
	*into++ = (char)value_length;
	return mempcpy(into, value, value_length);
}

/* What the peer waits for. */
static char *put_owed(struct http2 *http2, char *into)
{
	if (http2->acknowledge)
		into = put_frame(into, SETTINGS, ACK, 0, "", 0);
	if (http2->pinged)
		into = put_frame(into, PING, ACK, 0, http2->ping, sizeof(http2->ping));
	if (http2->consumed) {
		const uint8_t opened[4] = {
			(uint8_t)(http2->consumed >> 24), (uint8_t)(http2->consumed >> 16),
			(uint8_t)(http2->consumed >> 8), (uint8_t)http2->consumed,
		};

		into = put_frame(into, WINDOW_UPDATE, 0, 0, opened, sizeof(opened));
	}
	http2->acknowledge = http2->pinged = 0;
	http2->consumed = 0;
	return into;
}

/* ---- reading */

/* The next frame, or 0 where it is not whole. */
static size_t read_frame(const char *data, size_t length, struct frame *frame)
{
	const uint8_t *head = (const uint8_t *)data;

	if (length < FRAME_HEAD)
		return 0;
	frame->length = (size_t)head[0] << 16 | (size_t)head[1] << 8 | head[2];
	frame->type = head[3];
	frame->flags = head[4];
	frame->stream = ((uint32_t)head[5] << 24 | (uint32_t)head[6] << 16 | (uint32_t)head[7] << 8 | head[8]) &
			LAST_STREAM;
	frame->payload = head + FRAME_HEAD;
	return length - FRAME_HEAD < frame->length ? 0 : FRAME_HEAD + frame->length;
}

/* Frames that are alike at both sides. Returns 0 for those of a request or an answer. */
static int take_common(struct http2 *http2, const struct frame *frame)
{
	const uint8_t *at = frame->payload;

	switch (frame->type) {
	case SETTINGS:
		http2->acknowledge |= !(frame->flags & ACK);
		return 1;
	case PING:
		if (!(frame->flags & ACK) && frame->length == sizeof(http2->ping)) {
			memcpy(http2->ping, at, sizeof(http2->ping));
			http2->pinged = 1;
		}
		return 1;
	case WINDOW_UPDATE:
		if (!frame->stream && frame->length == 4)
			http2->window += (int64_t)at[0] << 24 | at[1] << 16 | at[2] << 8 | at[3];
		return 1;
	case GOAWAY:
		http2->going_away = 1;
		return 1;
	default:
		return 0;
	}
}

static const uint8_t *find(const struct frame *frame, const char *plain, const char *coded)
{
	const uint8_t *found = memmem(frame->payload, frame->length, plain, strlen(plain));

	if (found)
		return found + strlen(plain);
	found = memmem(frame->payload, frame->length, coded, strlen(coded));
	return found ? found + strlen(coded) : NULL;
}

/* ---- the client */

void http2_prepare(const struct http2_question *question)
{
	char *end = fields, path[128];

	if (question->body > MAX_BODY_BYTES)
		die("a body of more than %d bytes", MAX_BODY_BYTES);
	asked = *question;
	end = put_field(end, ":method", "POST");
	end = put_field(end, ":scheme", "http");
	/* What a gRPC call is for is no part of its path. */
	snprintf(path, sizeof(path), question->grpc ? "%s" : "%s?id=" ID, question->path);
	end = put_field(end, ":path", path);
	end = put_field(end, ":authority", question->host);
	end = put_field(end, "user-agent", "load");
	end = put_field(end, "x-request-id", ID);
	end = put_field(end, "content-type", question->grpc ? GRPC : "application/octet-stream");
	if (question->grpc)
		end = put_field(end, "te", "trailers");
	fields_length = (size_t)(end - fields);
	ids = find_ids(fields, fields_length);
}

size_t http2_ask(struct http2 *http2, char *into)
{
	char *end = into;
	char body[MAX_BODY_BYTES + 5];
	size_t length = asked.body;

	if (!http2->stream) {
		end = mempcpy(end, PREFACE, PREFACE_LENGTH);
		end = put_frame(end, SETTINGS, 0, 0, NO_TABLE, sizeof(NO_TABLE));
		http2->window = FIRST_WINDOW;
	}
	end = put_owed(http2, end);
	http2->stream = http2->stream ? http2->stream + 2 : 1;
	http2->ended = http2->trailed = 0;
	http2->status = 0;
	http2->received = 0;
	put_id(fields, &ids);
	end = put_frame(end, HEADERS, END_HEADERS | (length ? 0 : END_STREAM), http2->stream, fields, fields_length);
	if (length) {
		char *message = body;

		if (asked.grpc) {  /* not compressed, and how long it is */
			const char prefix[5] = { 0, 0, 0, (char)(length >> 8), (char)length };

			message = mempcpy(message, prefix, sizeof(prefix));
		}
		memcpy(message, pattern, length);
		length += (size_t)(message - body);
		end = put_frame(end, DATA, END_STREAM, http2->stream, body, length);
		http2->window -= (int64_t)length;
	}
	return (size_t)(end - into);
}

/* RFC 7541 appendix A: the statuses that have an index. */
static unsigned status_of(const struct frame *frame)
{
	static const unsigned INDEXED[] = { 200, 204, 206, 304, 400, 404, 500 };
	size_t at = 0;

	while (at < frame->length && (frame->payload[at] & 0xe0) == 0x20)  /* the size of the dynamic table */
		at++;
	if (at < frame->length && frame->payload[at] >= 0x88 && frame->payload[at] <= 0x8e)
		return INDEXED[frame->payload[at] - 0x88];
	return OTHER_STATUS;
}

static const char *take_answer(struct http2 *http2, const struct frame *frame)
{
	const uint8_t *status;

	if (frame->stream != http2->stream)
		return "an HTTP/2 frame of a stream that has nothing to say";
	switch (frame->type) {
	case HEADERS:
		if (!(frame->flags & END_HEADERS))
			return "an HTTP/2 answer whose fields are in several frames";
		if (!http2->status)
			http2->status = status_of(frame);
		status = find(frame, STATUS, STATUS_CODED);
		/* A value of one octet: "0", as it is or in Huffman code. */
		http2->trailed |= status && status + 2 <= frame->payload + frame->length &&
				  ((status[0] == 1 && status[1] == '0') || (status[0] == 0x81 && status[1] == 0x07));
		break;
	case DATA:
		if (frame->flags & PADDED)
			return "HTTP/2 data with padding";
		http2->received += frame->length;
		http2->consumed += (uint32_t)frame->length;
		break;
	case RST_STREAM:
		return "the HTTP/2 stream was reset";
	default:
		return "an HTTP/2 frame that nobody asked for";
	}
	http2->ended |= (frame->flags & END_STREAM) != 0;
	return NULL;
}

size_t http2_read_answer(struct http2 *http2, const char *data, size_t length, const char **wrong)
{
	struct frame frame;
	size_t read = 0, next;

	*wrong = NULL;
	while (!*wrong && (next = read_frame(data + read, length - read, &frame))) {
		read += next;
		if (!take_common(http2, &frame))
			*wrong = take_answer(http2, &frame);
	}
	if (http2->window < MAX_BODY_BYTES + 5 && http2->ended && !*wrong)
		*wrong = "the HTTP/2 connection's window was not opened again";
	if (!read && length == MAX_FRAMES)
		*wrong = "an HTTP/2 frame of more than 8 KB";
	return read;
}

const char *http2_verdict(const struct http2 *http2)
{
	if (http2->status == OTHER_STATUS)
		return "an HTTP/2 status that has no index";
	if (http2->status != 200)
		return NULL;  /* the status says it */
	if (http2->received != asked.body + (asked.grpc && asked.body ? 5 : 0))
		return "an answer that is not as long as the question";
	return asked.grpc && !http2->trailed ? "a gRPC call without the status 0" : NULL;
}

/* ---- the server */

static const char *const ANSWER[2] = { "application/octet-stream", GRPC };

/* Answers as soon as there is something to say, and echoes the body. */
static char *answer(struct http2 *http2, const struct frame *frame, char *into)
{
	int ends = frame->flags & END_STREAM;

	if (frame->type == HEADERS) {
		char block[64], *end = block;

		http2->grpc = find(frame, GRPC, GRPC_CODED) != NULL;
		*end++ = (char)0x88;  /* :status 200 */
		end = put_field(end, "content-type", ANSWER[http2->grpc]);
		into = put_frame(into, HEADERS, END_HEADERS | (ends && !http2->grpc ? END_STREAM : 0), frame->stream,
				 block, (size_t)(end - block));
	} else {
		into = put_frame(into, DATA, ends && !http2->grpc ? END_STREAM : 0, frame->stream, frame->payload,
				 frame->length);
		http2->window -= (int64_t)frame->length;
		http2->consumed += (uint32_t)frame->length;
	}
	if (ends && http2->grpc) {
		char block[32], *end = put_field(block, STATUS, "0");

		into = put_frame(into, HEADERS, END_HEADERS | END_STREAM, frame->stream, block, (size_t)(end - block));
	}
	return into;
}

long http2_serve(struct http2 *http2, const char *data, size_t length, char *into, size_t *made)
{
	struct frame frame;
	size_t read = 0, next;
	char *end = into;

	if (!http2->stream) {
		http2->window = FIRST_WINDOW;
		http2->stream = 1;
		end = put_frame(end, SETTINGS, 0, 0, NO_TABLE, sizeof(NO_TABLE));
		read = PREFACE_LENGTH;
	}
	while ((next = read_frame(data + read, length - read, &frame))) {
		read += next;
		if (take_common(http2, &frame) || frame.type == PRIORITY || frame.type == RST_STREAM)
			continue;
		if (frame.type > HEADERS || frame.flags & PADDED || (frame.type == HEADERS && !(frame.flags & END_HEADERS)))
			return -1;
		end = answer(http2, &frame, end);
	}
	end = put_owed(http2, end);
	*made = (size_t)(end - into);
	/* A frame that does not fit will never be whole; who opens no window is not asked to again. */
	return (!read && length == MAX_FRAMES) || http2->window < 0 ? -1 : (long)read;
}
