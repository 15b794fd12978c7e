#define _GNU_SOURCE
#include "ids.h"

#include "common.h"

#include <string.h>

struct ids find_ids(const char *head, size_t length)
{
	struct ids found = { .count = 0 };
	const char *at = head;

	while ((at = memmem(at, length - (size_t)(at - head), ID, ID_LENGTH))) {
		if (found.count == MAX_IDS)
			die("a head with more than %d ids", MAX_IDS);
		found.at[found.count++] = (size_t)(at - head);
		at += ID_LENGTH;
	}
	return found;
}

void put_id(char *head, const struct ids *ids)
{
	static uint64_t state;
	char id[] = ID;
	uint64_t left = 0;
	int digits = 0;

	if (!state)
		state = now_ns();  /* another row in each process */
	for (size_t i = 0; i < ID_LENGTH; i++) {
		if (id[i] == '-')
			continue;
		if (digits++ % 16 == 0)
			left = draw(&state);
		id[i] = "0123456789abcdef"[left & 0xf];
		left >>= 4;
	}
	for (int i = 0; i < ids->count; i++)
		memcpy(head + ids->at[i], id, ID_LENGTH);
}
