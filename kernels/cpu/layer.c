/* Filters of transposed convolutions, whose elements lie apart: gathered before they are measured. */
#include "layer.h"

typedef uint32_t bits32 ANYWHERE;
typedef uint64_t bits64 ANYWHERE;

/* Runs of elements; the strides are from run to run, and from element to element. Values, not fields of the layer: as
   far as the compiler knows, a write to the filter could change those. */
#define DEFINE_COPY(bits) \
  static void copy_##bits(bits *to, int64_t to_outer, int64_t to_inner, const bits *from, int64_t from_outer, \
                          int64_t from_inner, int64_t runs, int64_t run) { \
    for (; runs > 0; runs--, to += to_outer, from += from_outer) { \
      if (to_inner == 1 && from_inner == 1) { \
        for (int64_t e = 0; e < run; e++) to[e] = from[e]; \
      } else { \
        for (int64_t e = 0; e < run; e++) to[e * to_inner] = from[e * from_inner]; \
      } \
    } \
  }
DEFINE_COPY(bits16)
DEFINE_COPY(bits32)
DEFINE_COPY(bits64)

void gather(const struct layer *layer, const char *filter, char *packed) {
  const int64_t run = layer->run, runs = layer->elements / run, outer = layer->outer_stride, inner = layer->inner_stride;
  switch (size_of(layer->type)) {
  case 2: copy_bits16((bits16 *)packed, run, 1, (const bits16 *)filter, outer, inner, runs, run); break;
  case 4: copy_bits32((bits32 *)packed, run, 1, (const bits32 *)filter, outer, inner, runs, run); break;
  default: copy_bits64((bits64 *)packed, run, 1, (const bits64 *)filter, outer, inner, runs, run);
  }
}

void scatter(const struct layer *layer, const char *packed, char *filter) {
  const int64_t run = layer->run, runs = layer->elements / run, outer = layer->outer_stride, inner = layer->inner_stride;
  switch (size_of(layer->type)) {
  case 2: copy_bits16((bits16 *)filter, outer, inner, (const bits16 *)packed, run, 1, runs, run); break;
  case 4: copy_bits32((bits32 *)filter, outer, inner, (const bits32 *)packed, run, 1, runs, run); break;
  default: copy_bits64((bits64 *)filter, outer, inner, (const bits64 *)packed, run, 1, runs, run);
  }
}
