/* A libcuda.so.1 that does nothing and remembers launches, so that Triton's real launcher can be tested without a GPU. */
#include <stdint.h>
#include <string.h>

enum { RECORDS = 64, PARAMETERS = 32, FUNCTIONS = 16 };
typedef int result;
struct config { unsigned grid[3], block[3], shared; void *stream; void *attributes; unsigned attribute_count; };
struct record { unsigned grid[3]; void *function; uint64_t parameters[PARAMETERS]; };

int stub_launches = 0;
/* Of each function, numbered from 1: how many to remember, for past the last one is a crash; of others none. */
int stub_parameters[FUNCTIONS];
struct record stub_records[RECORDS];
static int modules = 0;

/* Of stub_cudart.c, where both are built into one library. */
__attribute__((weak)) void stub_say(const char *format, ...);
__attribute__((weak)) int stub_stream(const void *handle);

result cuInit(unsigned f) { return 0; }
result cuDeviceGetCount(int *n) { *n = 1; return 0; }
result cuDeviceGet(int *d, int i) { *d = i; return 0; }
result cuCtxGetCurrent(void **c) { *c = (void *)1; return 0; }
result cuCtxSetCurrent(void *c) { return 0; }
result cuCtxGetDevice(int *d) { *d = 0; return 0; }
result cuCtxGetLimit(size_t *v, int l) { *v = 0; return 0; }
result cuCtxSetLimit(int l, size_t v) { return 0; }
result cuDevicePrimaryCtxRetain(void **c, int d) { *c = (void *)1; return 0; }
result cuDevicePrimaryCtxGetState(int d, unsigned *flags, int *active) { *flags = 0, *active = 1; return 0; }
result cuDriverGetVersion(int *v) { *v = 13000; return 0; }
result cuDeviceGetAttribute(int *v, int a, int d) {
  switch (a) {
  case 97: case 81: *v = 232448; break; /* shared memory */
  case 12: *v = 65536; break;           /* registers */
  case 16: *v = 132; break;             /* multiprocessors */
  case 10: *v = 32; break;              /* warp */
  case 75: *v = 9; break;               /* compute capability 9.0 */
  case 76: *v = 0; break;
  case 8: *v = 49152; break;
  default: *v = 1000;
  }
  return 0;
}
result cuModuleLoadData(void **m, const void *d) { *m = (void *)(intptr_t)++modules; return 0; }
result cuModuleGetFunction(void **f, void *m, const char *n) { *f = m; return 0; }
result cuModuleUnload(void *m) { return 0; }
result cuFuncGetAttribute(int *v, int a, void *f) { *v = a == 0 ? 1024 : a == 4 ? 64 : 0; return 0; }
result cuFuncSetAttribute(void *f, int a, int v) { return 0; }
result cuFuncSetCacheConfig(void *f, int c) { return 0; }
result cuGetErrorString(result e, const char **s) { *s = "stub"; return 0; }
result cuPointerGetAttribute(void *d, int a, uint64_t p) { *(uint64_t *)d = p; return 0; }
result cuStreamIsCapturing(void *s, int *v) { *v = 0; return 0; }
result cuOccupancyMaxActiveClusters(int *n, void *f, void *c) { *n = 1; return 0; }
result cuTensorMapEncodeTiled(void) { return 0; }
result cuTensorMapEncodeIm2col(void) { return 0; }
result cuLaunchKernelEx(const struct config *c, void *f, void **p, void **e) {
  if (stub_say) stub_say("launch %d\n", stub_stream(c->stream));
  struct record *r = &stub_records[stub_launches++ % RECORDS];
  memset(r, 0, sizeof *r);
  memcpy(r->grid, c->grid, sizeof r->grid);
  r->function = f;
  for (int i = 0; (intptr_t)f < FUNCTIONS && i < stub_parameters[(intptr_t)f]; i++)
    memcpy(&r->parameters[i], p[i], sizeof(uint64_t));
  return 0;
}
