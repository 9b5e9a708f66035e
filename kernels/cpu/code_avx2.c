/* The code for AVX2, with the processor's own conversions of float16. */
#define CODE code_avx2
#define CODE_NAME "avx2"
#define TARGET __attribute__((target("avx2,f16c")))
#define VECTOR_BYTES 32
#include "code.h"

#ifdef INMERGE_X86_CODE
#include <immintrin.h>

#define LOAD_FLOAT16(to, from) \
  for (int lane = 0; lane < LANES; lane += 8) \
  ((to)[lane / 8] = _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)((from) + lane))))
#define STORE_FLOAT16(to, from) \
  for (int lane = 0; lane < LANES; lane += 8) \
  _mm_storeu_si128((__m128i *)((to) + lane), _mm256_cvtps_ph((from)[lane / 8], _MM_FROUND_TO_NEAREST_INT))

#include "for_instruction_set.h"
#endif
