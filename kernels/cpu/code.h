/* What is compiled once for every instruction set; the results are the same to the bit. */
#ifndef INMERGE_CODE_H
#define INMERGE_CODE_H

#include "numbers.h"

enum {
  LANES = 32,       /* two vectors of AVX-512, and enough of SSE2 to hide the latency of additions */
  BLOCK = 4096,     /* elements whose products are added in the type of the arithmetic; blocks are added in float64 */
  CACHE_LINE = 64,
};

typedef void measure_function(const void *own, const void *partner, int64_t elements, const char *later_own,
                              const char *later_partner, double sums[3]);
typedef void blend_function(void *restrict own, const void *restrict partner, int64_t elements, double keep,
                            double take);

/* Which filters of a layer look at a partner, and at which one: coin and partner of filters 0 to filters - 1. */
struct draw {
  uint64_t seed, step;
  uint32_t coin_threshold;
};
typedef void draw_function(const struct draw *draw, uint32_t layer, int32_t filters, uint32_t group_size,
                           uint8_t *coin, int32_t *partner);

struct code {
  const char *name;
  measure_function *measure[TYPES];
  blend_function *blend[TYPES];
  draw_function *draw;
};

/* The best first; NULL past the last. Only what this processor can run. */
const struct code *code_at(int index);

extern const struct code code_portable;
#if defined(__x86_64__) && defined(__GNUC__) && !defined(INMERGE_PLAIN_C)
#define INMERGE_X86_CODE
extern const struct code code_avx2, code_avx512;
#endif

#endif
