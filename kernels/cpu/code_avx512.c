/* The code for AVX-512, with the processor's own conversions of float16. */
#define CODE code_avx512
#define CODE_NAME "avx512"
#define TARGET __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl")))
#define VECTOR_BYTES 64
#include "code.h"

#ifdef INMERGE_X86_CODE
#include <immintrin.h>

#define LOAD_FLOAT16(to, from) \
  for (int lane = 0; lane < LANES; lane += 16) \
  ((to)[lane / 16] = _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)((from) + lane))))
#define STORE_FLOAT16(to, from) \
  for (int lane = 0; lane < LANES; lane += 16) \
  _mm256_storeu_si256((__m256i *)((to) + lane), _mm512_cvtps_ph((from)[lane / 16], _MM_FROUND_TO_NEAREST_INT))

#include "for_instruction_set.h"
#endif
