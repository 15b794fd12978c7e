/* Counts of nanoseconds in buckets as HdrHistogram's: linear up to 131 us (64 ns wide), then 1024 to each power of two.
 *
 * So a value is known to 64 ns or to 0.1 %, whichever is more. benchmarks/harness/histogram.py reads
 * what `write_histogram` writes, and must know the same buckets.
 */
#ifndef LOAD_HISTOGRAM_H
#define LOAD_HISTOGRAM_H

#include <stdint.h>

#define UNIT_BITS 6      /* the narrowest bucket is 64 ns wide */
#define DIGIT_BITS 10    /* 1024 buckets to a power of two */
#define VALUE_BITS 40    /* 18 minutes; what is longer counts as that */
#define BUCKETS (((VALUE_BITS - UNIT_BITS - DIGIT_BITS) + 1) << DIGIT_BITS)

struct histogram {
	uint64_t counts[BUCKETS];
	uint64_t count, sum_ns, max_ns;
};

void record(struct histogram *histogram, uint64_t value_ns);

/* The lower bound of the bucket of the value that so much of all values are at most. 0 when there is none. */
uint64_t percentile_ns(const struct histogram *histogram, double share);

/* A JSON object on stdout: lower bound in ns -> count, of the buckets that are not empty. */
void write_histogram(const struct histogram *histogram);

#endif
