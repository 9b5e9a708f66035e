/* Filters of transposed convolutions, whose elements lie apart: gathered before they are measured. */
#include "layer.h"

typedef uint32_t bits32 ANYWHERE;
typedef uint64_t bits64 ANYWHERE;

#define COPY(bits, to, to_outer, to_inner, from, from_outer, from_inner) \
  for (int64_t start = 0; start < layer->elements; start += layer->run) { \
    const bits *source = (const bits *)(from) + start / layer->run * (from_outer); \
    bits *target = (bits *)(to) + start / layer->run * (to_outer); \
    for (int64_t e = 0; e < layer->run; e++) target[e * (to_inner)] = source[e * (from_inner)]; \
  }

void gather(const struct layer *layer, const char *filter, char *packed) {
  switch (size_of(layer->type)) {
  case 2: COPY(bits16, packed, layer->run, 1, filter, layer->outer_stride, layer->inner_stride) break;
  case 4: COPY(bits32, packed, layer->run, 1, filter, layer->outer_stride, layer->inner_stride) break;
  default: COPY(bits64, packed, layer->run, 1, filter, layer->outer_stride, layer->inner_stride)
  }
}

void scatter(const struct layer *layer, const char *packed, char *filter) {
  switch (size_of(layer->type)) {
  case 2: COPY(bits16, filter, layer->outer_stride, layer->inner_stride, packed, layer->run, 1) break;
  case 4: COPY(bits32, filter, layer->outer_stride, layer->inner_stride, packed, layer->run, 1) break;
  default: COPY(bits64, filter, layer->outer_stride, layer->inner_stride, packed, layer->run, 1)
  }
}
