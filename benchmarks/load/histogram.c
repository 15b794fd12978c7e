#include "histogram.h"

#include <stdio.h>

static const uint64_t LONGEST_NS = (1ull << VALUE_BITS) - 1;

/* Values of one power of two share their bits' number, and so how many low bits do not count. */
static uint32_t bucket_of(uint64_t value_ns)
{
	uint64_t units = (value_ns < LONGEST_NS ? value_ns : LONGEST_NS) >> UNIT_BITS;
	uint32_t ignored = 0;

	if (units >> (DIGIT_BITS + 1))
		ignored = 63 - (uint32_t)__builtin_clzll(units) - DIGIT_BITS;
	return (ignored << DIGIT_BITS) + (uint32_t)(units >> ignored);
}

static uint64_t lower_bound_ns(uint32_t bucket)
{
	uint32_t ignored = bucket >> DIGIT_BITS ? (bucket >> DIGIT_BITS) - 1 : 0;

	return (uint64_t)(bucket - (ignored << DIGIT_BITS)) << (ignored + UNIT_BITS);
}

void record(struct histogram *histogram, uint64_t value_ns)
{
	histogram->counts[bucket_of(value_ns)]++;
	histogram->count++;
	histogram->sum_ns += value_ns;
	if (value_ns > histogram->max_ns)
		histogram->max_ns = value_ns;
}

uint64_t percentile_ns(const struct histogram *histogram, double share)
{
	uint64_t seen = 0;

	for (uint32_t i = 0; i < BUCKETS; i++) {
		seen += histogram->counts[i];
		if (seen && (double)seen >= share * (double)histogram->count)
			return lower_bound_ns(i);
	}
	return 0;
}

void write_histogram(const struct histogram *histogram)
{
	const char *between = "";

	putchar('{');
	for (uint32_t i = 0; i < BUCKETS; i++) {
		if (!histogram->counts[i])
			continue;
		printf("%s\"%llu\": %llu", between, (unsigned long long)lower_bound_ns(i),
		       (unsigned long long)histogram->counts[i]);
		between = ", ";
	}
	putchar('}');
}
