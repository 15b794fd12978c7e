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
	char digits[ID_LENGTH];
	uint64_t number;

	if (!state)
		state = now_ns();  /* another row in each process */
	number = draw(&state);
	for (size_t i = 0; i < ID_LENGTH; i++, number >>= 4)
		digits[i] = "0123456789abcdef"[number & 0xf];
	for (int i = 0; i < ids->count; i++)
		memcpy(head + ids->at[i], digits, ID_LENGTH);
}
