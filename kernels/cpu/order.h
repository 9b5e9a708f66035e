/* The order in which the filters of a layer can be rewritten where they lie. */
#ifndef INMERGE_ORDER_H
#define INMERGE_ORDER_H

#include "layer.h"

enum { NO_PARTNER = -1 };

/* A filter and the partner that it looks at. */
struct pair {
  char *own, *partner;
  int32_t rank;  /* among all sampled filters, by layer and filter */
  int32_t layer;
  uint8_t starts_tree;   /* what comes from here on, up to the next such pair, depends on nothing before or after */
  uint8_t opens_circle;  /* own is read once more, by the pair that closes the circle: it has to be kept */
  uint8_t closes_circle; /* partner is what was kept */
};

/* Space for a layer's filters while they are put in order; each array has as many elements as filters. */
struct order_space {
  int32_t *looking, *first_reader, *next_reader, *rank;
  uint8_t *mark;
};

/* Write the pairs of a layer to `pairs`, each filter after all that read it.

   index: of the layer. first_rank: of its first sampled filter. sampled: 1 where a filter is, else 0. partner: of each
   filter, or NO_PARTNER, which makes no pair; looked at where sampled. Returns the number of pairs. */
int32_t order_layer(const struct layer *layer, int32_t index, int32_t first_rank, const uint8_t *sampled,
                    const int32_t *partner, const struct order_space *space, struct pair *pairs);

#endif
