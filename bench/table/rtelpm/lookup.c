/* rte_lpm as a peer of the lookup benchmark: loads a table, then looks addresses up in bulks of 64, as often as it is
 * told. Arguments: a file of routes (address, length, next hop: three 32-bit numbers each) and a file of addresses
 * (32-bit numbers), both in the machine's byte order. It says "loaded SECONDS", then for each line N on its input
 * "NANOSECONDS SUM": the time that N lookups took, from the front of the addresses and round, and the sum of the next
 * hops that they gave. */
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>

#include <rte_eal.h>
#include <rte_lpm.h>

#define BULK 64

static void die(const char *what) {
	perror(what);
	exit(1);
}

static uint32_t *read_all(const char *path, size_t *count) {
	FILE *f = fopen(path, "rb");
	if (!f || fseek(f, 0, SEEK_END))
		die(path);
	long size = ftell(f);
	rewind(f);
	uint32_t *all = malloc(size);
	*count = size / sizeof *all;
	if (!all || fread(all, sizeof *all, *count, f) != *count)
		die(path);
	fclose(f);
	return all;
}

static double now(void) {
	struct timespec t;
	clock_gettime(CLOCK_MONOTONIC, &t);
	return t.tv_sec * 1e9 + t.tv_nsec;
}

int main(int argc, char **argv) {
	if (argc != 3) {
		fprintf(stderr, "usage: %s ROUTES ADDRESSES\n", argv[0]);
		return 2;
	}
	char *eal[] = {argv[0], "--no-huge", "--no-pci", "--no-telemetry", "--no-shconf", "-m", "512", "--log-level=3", NULL};
	if (rte_eal_init(8, eal) < 0)
		die("rte_eal_init");
	size_t n, m;
	uint32_t *routes = read_all(argv[1], &n), *addresses = read_all(argv[2], &m);
	struct rte_lpm_config config = {.max_rules = n / 3 + 1, .number_tbl8s = 1 << 13};
	struct rte_lpm *lpm = rte_lpm_create("bench", 0, &config);
	if (!lpm)
		die("rte_lpm_create");
	double began = now();
	for (size_t i = 0; i + 2 < n; i += 3)
		if (rte_lpm_add(lpm, routes[i], routes[i + 1], routes[i + 2]))
			die("rte_lpm_add");
	printf("loaded %.3f\n", (now() - began) / 1e9);
	fflush(stdout);
	uint64_t count;
	while (scanf("%" SCNu64, &count) == 1) {
		uint32_t hops[BULK];
		uint64_t sum = 0;
		size_t at = 0;
		began = now();
		for (uint64_t done = 0; done < count; done += BULK) {
			rte_lpm_lookup_bulk(lpm, addresses + at, hops, BULK);
			for (int i = 0; i < BULK; i++)
				sum += hops[i] & RTE_LPM_LOOKUP_SUCCESS ? hops[i] & 0xffffff : 0;
			if ((at += BULK) + BULK > m)
				at = 0;
		}
		printf("%.0f %" PRIu64 "\n", now() - began, sum);
		fflush(stdout);
	}
	return 0;
}
