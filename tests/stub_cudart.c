/* The part of CUDA's runtime that PyTorch calls, in host memory: streams, events, captures, copies. Kernels do nothing.

   Preloaded, it stands in front of libcudart in a CUDA build of PyTorch, so that PyTorch's own streams, events, allocator
   and graphs run on a machine without a GPU. What happens in which order on which stream is written to a log, one event
   a line. All work is done at once, so nothing shows here that hangs on time. */
#include <driver_types.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { DEVICES = 2, STREAMS = 1024, LOG = 1 << 20 };
typedef cudaError_t result;
struct stream { int number, capture; };
struct event { int stream, capture, device; };

static struct stream streams[STREAMS]; /* the first are the devices' default streams, the handle of which is 0 */
static int stream_count = DEVICES, captures = 0;
static __thread int device = 0;
static __thread enum cudaStreamCaptureMode mode = cudaStreamCaptureModeGlobal;
char stub_log[LOG];
static size_t logged = 0;

void stub_say(const char *format, ...) {
  va_list values;
  va_start(values, format);
  logged += vsnprintf(stub_log + logged, LOG - logged, format, values);
  va_end(values);
  if (logged >= LOG) abort();
}
void stub_forget(void) { stub_log[logged = 0] = 0; }

static struct stream *of(const void *handle) {
  streams[device].number = device;
  return handle ? (struct stream *)handle : &streams[device];
}
int stub_stream(const void *handle) { return of(handle)->number; }

/* Calls that CUDA forbids while any stream is captured, unless the thread has said that it knows what it does. */
static result unsafe(const char *what) {
  for (int i = 0; i < stream_count; i++)
    if (streams[i].capture && mode != cudaStreamCaptureModeRelaxed) {
      stub_say("forbidden %s\n", what);
      return cudaErrorStreamCaptureUnsupported;
    }
  return cudaSuccess;
}

result cudaGetDeviceCount(int *n) { *n = DEVICES; return cudaSuccess; }
result cudaGetDevice(int *d) { *d = device; return cudaSuccess; }
result cudaSetDevice(int d) { device = d; return cudaSuccess; }
result cudaDriverGetVersion(int *v) { *v = 13000; return cudaSuccess; }
result cudaRuntimeGetVersion(int *v) { *v = 13000; return cudaSuccess; }
result cudaGetDeviceProperties(struct cudaDeviceProp *p, int d) {
  memset(p, 0, sizeof *p);
  strcpy(p->name, "stub");
  p->major = 9, p->warpSize = 32, p->multiProcessorCount = 132, p->totalGlobalMem = 1ull << 34;
  p->maxThreadsPerBlock = 1024, p->maxThreadsPerMultiProcessor = 2048;
  p->maxGridSize[0] = p->maxGridSize[1] = p->maxGridSize[2] = 1 << 16;
  return cudaSuccess;
}
result cudaDeviceGetAttribute(int *v, enum cudaDeviceAttr a, int d) { *v = 1; return cudaSuccess; }
result cudaDeviceGetStreamPriorityRange(int *low, int *high) { *low = 0, *high = -5; return cudaSuccess; }
result cudaDeviceCanAccessPeer(int *can, int d, int e) { *can = 0; return cudaSuccess; }
result cudaDeviceSynchronize(void) { return unsafe("synchronize"); }
result cudaGetLastError(void) { return cudaSuccess; }
result cudaPeekAtLastError(void) { return cudaSuccess; }
result cudaMemGetInfo(size_t *available, size_t *all) { *available = *all = 1ull << 34; return cudaSuccess; }
static result nothing(void) { return cudaSuccess; }
result cudaGetDriverEntryPointByVersion(
    const char *name, void **f, unsigned v, unsigned long long flags, enum cudaDriverEntryPointQueryResult *q) {
  *f = (void *)nothing;
  if (q) *q = cudaDriverEntryPointSuccess;
  return cudaSuccess;
}

result cudaStreamCreateWithPriority(cudaStream_t *s, unsigned flags, int priority) {
  if (stream_count == STREAMS) abort();
  streams[stream_count].number = stream_count;
  *s = (cudaStream_t)&streams[stream_count++];
  return cudaSuccess;
}
result cudaStreamCreateWithFlags(cudaStream_t *s, unsigned flags) { return cudaStreamCreateWithPriority(s, flags, 0); }
result cudaStreamCreate(cudaStream_t *s) { return cudaStreamCreateWithPriority(s, 0, 0); }
result cudaStreamDestroy(cudaStream_t s) { return cudaSuccess; }
result cudaStreamGetPriority(cudaStream_t s, int *p) { *p = 0; return cudaSuccess; }
result cudaStreamQuery(cudaStream_t s) { return cudaSuccess; }
result cudaStreamSynchronize(cudaStream_t s) { return unsafe("synchronize"); }

result cudaEventCreateWithFlags(cudaEvent_t *e, unsigned flags) {
  struct event *made = calloc(1, sizeof *made);
  made->stream = -1, made->device = device;
  *e = (cudaEvent_t)made;
  return cudaSuccess;
}
result cudaEventCreate(cudaEvent_t *e) { return cudaEventCreateWithFlags(e, 0); }
result cudaEventDestroy(cudaEvent_t e) { free(e); return cudaSuccess; }
result cudaEventRecordWithFlags(cudaEvent_t handle, cudaStream_t s, unsigned flags) {
  struct event *e = (struct event *)handle;
  if (e->device != device) return cudaErrorInvalidResourceHandle;
  e->stream = of(s)->number, e->capture = of(s)->capture;
  stub_say("record %d\n", e->stream);
  return cudaSuccess;
}
result cudaEventRecord(cudaEvent_t e, cudaStream_t s) { return cudaEventRecordWithFlags(e, s, 0); }
result cudaEventQuery(cudaEvent_t e) { return ((struct event *)e)->capture ? cudaErrorCapturedEvent : cudaSuccess; }
result cudaEventSynchronize(cudaEvent_t e) { return cudaEventQuery(e); }
result cudaEventElapsedTime(float *ms, cudaEvent_t a, cudaEvent_t b) { *ms = 0; return cudaSuccess; }
result cudaStreamWaitEvent(cudaStream_t handle, cudaEvent_t awaited, unsigned flags) {
  struct stream *s = of(handle);
  struct event *e = (struct event *)awaited;
  if (e->stream < 0) return cudaSuccess; /* never recorded: there is nothing to wait for */
  stub_say("wait %d %d\n", s->number, e->stream);
  if (s->capture && e->capture != s->capture) return cudaErrorStreamCaptureIsolation;
  s->capture = e->capture; /* whoever waits for a captured stream is captured as well */
  return cudaSuccess;
}

result cudaThreadExchangeStreamCaptureMode(enum cudaStreamCaptureMode *m) {
  enum cudaStreamCaptureMode old = mode;
  mode = *m, *m = old;
  return cudaSuccess;
}
result cudaStreamIsCapturing(cudaStream_t s, enum cudaStreamCaptureStatus *status) {
  *status = of(s)->capture ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
  return cudaSuccess;
}
result cudaStreamGetCaptureInfo(
    cudaStream_t s, enum cudaStreamCaptureStatus *status, unsigned long long *id, cudaGraph_t *graph,
    const cudaGraphNode_t **nodes, const cudaGraphEdgeData **edges, size_t *count) {
  if (id) *id = of(s)->capture;
  if (graph) *graph = (cudaGraph_t)(intptr_t)of(s)->capture;
  if (count) *count = 0;
  return cudaStreamIsCapturing(s, status);
}
result cudaStreamBeginCapture(cudaStream_t s, enum cudaStreamCaptureMode m) {
  of(s)->capture = ++captures;
  stub_say("capture %d\n", of(s)->number);
  return cudaSuccess;
}
result cudaStreamEndCapture(cudaStream_t s, cudaGraph_t *graph) {
  int capture = of(s)->capture;
  *graph = (cudaGraph_t)(intptr_t)capture;
  for (int i = 0; i < stream_count; i++)
    if (streams[i].capture == capture) streams[i].capture = 0;
  stub_say("captured %d\n", of(s)->number);
  return cudaSuccess;
}
result cudaGraphGetNodes(cudaGraph_t g, cudaGraphNode_t *nodes, size_t *count) { *count = 1; return cudaSuccess; }
result cudaGraphInstantiateWithFlags(cudaGraphExec_t *e, cudaGraph_t g, unsigned long long flags) {
  *e = (cudaGraphExec_t)g;
  return cudaSuccess;
}
result cudaGraphLaunch(cudaGraphExec_t e, cudaStream_t s) { stub_say("replay %d\n", of(s)->number); return cudaSuccess; }
result cudaGraphDestroy(cudaGraph_t g) { return cudaSuccess; }
result cudaGraphExecDestroy(cudaGraphExec_t e) { return cudaSuccess; }

result cudaMalloc(void **p, size_t n) {
  if (unsafe("cudaMalloc")) return cudaErrorStreamCaptureUnsupported;
  *p = aligned_alloc(512, (n + 511) / 512 * 512);
  memset(*p, 0, n);
  return cudaSuccess;
}
result cudaFree(void *p) { free(p); return cudaSuccess; }
result cudaHostAlloc(void **p, size_t n, unsigned flags) {
  int captured = 0;
  for (int i = 0; i < stream_count; i++) captured |= streams[i].capture;
  stub_say("host_alloc %d\n", captured); /* told even where the thread has lifted the ban */
  *p = aligned_alloc(4096, (n + 4095) / 4096 * 4096);
  return cudaSuccess;
}
result cudaFreeHost(void *p) { free(p); return cudaSuccess; }
result cudaPointerGetAttributes(struct cudaPointerAttributes *a, const void *p) {
  memset(a, 0, sizeof *a);
  a->type = cudaMemoryTypeHost, a->hostPointer = (void *)p;
  return cudaSuccess;
}
result cudaMemcpyAsync(void *to, const void *from, size_t n, enum cudaMemcpyKind kind, cudaStream_t s) {
  stub_say("copy %d\n", of(s)->number);
  memcpy(to, from, n);
  return cudaSuccess;
}
result cudaMemcpy(void *to, const void *from, size_t n, enum cudaMemcpyKind k) { return cudaMemcpyAsync(to, from, n, k, 0); }
result cudaMemsetAsync(void *p, int value, size_t n, cudaStream_t s) { memset(p, value, n); return cudaSuccess; }
result cudaMemset(void *p, int value, size_t n) { return cudaMemsetAsync(p, value, n, 0); }
result __cudaGetKernel(cudaKernel_t *kernel, const void *f) { *kernel = (cudaKernel_t)f; return cudaSuccess; }
result __cudaLaunchKernel(
    cudaKernel_t f, struct dim3 grid, struct dim3 block, void **args, size_t shared, cudaStream_t s) {
  stub_say("operator %d\n", of(s)->number);
  return cudaSuccess;
}
result cudaLaunchKernelExC(const cudaLaunchConfig_t *c, const void *f, void **args) {
  stub_say("operator %d\n", of(c->stream)->number);
  return cudaSuccess;
}
result cudaFuncSetAttribute(const void *f, enum cudaFuncAttribute a, int v) { return cudaSuccess; }
result cudaFuncGetAttributes(struct cudaFuncAttributes *a, const void *f) {
  memset(a, 0, sizeof *a);
  a->maxThreadsPerBlock = 1024;
  return cudaSuccess;
}
result cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int *n, const void *f, int b, size_t s, unsigned flags) {
  *n = 1;
  return cudaSuccess;
}
