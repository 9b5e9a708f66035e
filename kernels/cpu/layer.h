/* The layers of a call, as the rows of the table that inmerge_fast/paths/cpu.py makes, and where their filters lie. */
#ifndef INMERGE_LAYER_H
#define INMERGE_LAYER_H

#include "numbers.h"

/* Strides are in elements. inmerge_fast/plan/filters.py (FilterLayout) says how they give the address of an element. */
struct layer {
  int64_t base; /* address of the weight */
  int64_t filters, elements, group_size, group_stride, filter_stride, run, outer_stride, inner_stride;
  int64_t id; /* the layer's word in the draw */
  int64_t type;
};

/* Whether a filter is one run of consecutive elements. */
static inline int is_dense(const struct layer *layer) {
  return layer->run == layer->elements && layer->inner_stride == 1;
}

static inline int64_t bytes_of_filter(const struct layer *layer) { return layer->elements * size_of(layer->type); }

static inline char *filter_at(const struct layer *layer, int64_t filter) {
  int64_t group = 0, place = filter;
  if (layer->group_size != layer->filters) group = filter / layer->group_size, place = filter % layer->group_size;
  const int64_t offset = group * layer->group_stride + place * layer->filter_stride;
  return (char *)(intptr_t)layer->base + offset * size_of(layer->type);
}

/* Filters that are not dense, to consecutive elements and back. */
void gather(const struct layer *layer, const char *filter, char *packed);
void scatter(const struct layer *layer, const char *packed, char *filter);

#endif
