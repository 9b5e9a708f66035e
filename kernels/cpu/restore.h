/* The filters that a merge has blended, put back as they were: the end of a merge that lasts for one forward and backward
   pass. Every filter is kept in a place of its own and written once, so nothing depends on an order. */
#ifndef INMERGE_RESTORE_H
#define INMERGE_RESTORE_H

#include "layer.h"

struct restore {
  const struct layer *layers;
  int64_t layer_count;
  const int64_t *counts; /* of each layer: sampled filters */
  int64_t sampled;       /* in all */
  const int32_t *rows;   /* of every sampled filter: which one of its layer */
  const uint8_t *passed; /* whether it was blended, and so kept */
  const char *old;       /* sampled filters one after another, as they were */
  int64_t old_bytes;     /* in all */
  int threads;           /* at most */
};

/* Whether the numbers fit each other, so that run_restore stays inside the layers and what was kept. */
int restore_fits(const struct restore *restore);
void run_restore(const struct restore *restore);

#endif
