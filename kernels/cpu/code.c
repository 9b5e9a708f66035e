/* Which of the instruction sets this processor has. */
#include "code.h"

#include <stddef.h>

static int runs_here(const struct code *code) {
#ifdef INMERGE_X86_CODE
  __builtin_cpu_init();
  if (code == &code_avx512)
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (code == &code_avx2) return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("f16c");
#endif
  return code == &code_portable;
}

const struct code *code_at(int index) {
  static const struct code *const all[] = {
#ifdef INMERGE_X86_CODE
    &code_avx512, &code_avx2,
#endif
    &code_portable,
  };
  for (size_t c = 0; c < sizeof all / sizeof *all; c++)
    if (runs_here(all[c]) && index-- == 0) return all[c];
  return NULL;
}
