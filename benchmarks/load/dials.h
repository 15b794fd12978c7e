/* Connections one after the other, each waited for: what connect(2) itself takes. */
#ifndef LOAD_DIALS_H
#define LOAD_DIALS_H

#include "bulk.h"
#include "common.h"
#include "histogram.h"

struct dials {
	struct address target;  /* the first of them */
	uint32_t spread;        /* each goes to one of so many addresses, drawn evenly */
	uint64_t seed;
};

struct dialled {
	struct histogram latency;  /* of connect(2), within the window */
	uint64_t scheduled;        /* of the whole run, warm-up included; all were answered, or the program has ended */
	uint64_t cpu_ns;           /* of this process, within the window */
};

/* Connect, a byte there and back, close; until the window ends. */
void run_dials(const struct dials *dials, struct window window, struct dialled *found);

#endif
