/* The code for every processor, in what its compiler takes for granted: SSE2 on x86-64, NEON on ARM64. */
#define CODE code_portable
#define CODE_NAME "portable"
#define TARGET
#define VECTOR_BYTES 16
#include "code.h"

#if defined(__aarch64__) && defined(__GNUC__) /* registers of its vectors convert */
typedef __fp16 float16 ANYWHERE;
INLINE void load_half(float *to, const float16 *from) {
  for (int lane = 0; lane < LANES; lane++) to[lane] = (float)from[lane];
}
INLINE void store_half(float16 *to, const float *from) {
  for (int lane = 0; lane < LANES; lane++) to[lane] = (__fp16)from[lane];
}
#define LOAD_FLOAT16(to, from) load_half((float *)(to), (const float16 *)(from))
#define STORE_FLOAT16(to, from) store_half((float16 *)(to), (const float *)(from))
#endif

#include "for_instruction_set.h"
