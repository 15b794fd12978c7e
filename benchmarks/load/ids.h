/* Ids of requests, as UUIDs: a head that no other request has, as calls carry one in their path, or in a field.
 *
 * A proxy that knows a head by its bytes would otherwise be asked for the same one again and again.
 */
#ifndef LOAD_IDS_H
#define LOAD_IDS_H

#include <stddef.h>

/* What stands for the id where a head is prepared: a place for each digit. */
#define ID "########-####-####-####-############"
#define ID_LENGTH (sizeof(ID) - 1)
#define MAX_IDS 2

struct ids {
	size_t at[MAX_IDS];
	int count;
};

/* Where ids belong in a head. */
struct ids find_ids(const char *head, size_t length);

/* Writes another one there. */
void put_id(char *head, const struct ids *ids);

#endif
