/* A malloc to preload that fails once, when it is told to: the memory of the process has run out. */
#include <stddef.h>

void *__libc_malloc(size_t size);

static long calls_left;
static int failures;

void fail_malloc(long nth) { failures = 0, calls_left = nth; }

int stop_failing(void) {
  calls_left = 0;
  return failures;
}

void *malloc(size_t size) {
  if (calls_left && --calls_left == 0) {
    failures++;
    return NULL;
  }
  return __libc_malloc(size);
}
