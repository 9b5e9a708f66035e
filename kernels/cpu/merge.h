/* In-model merging of all layers of a plan on the CPU, in one call: prepare_merge, run_merge, free_merge.

   prepare_merge draws and puts the pairs in order; it reads no weight and allocates all memory. Then the caller, who
   now knows how many pairs there are, makes room for the results, and run_merge measures, decides and blends. That
   cannot fail, so either all weights are as they were or all are merged. */
#ifndef INMERGE_MERGE_H
#define INMERGE_MERGE_H

#include "code.h"
#include "order.h"

struct part; /* of the pairs, independent of all others */

struct merge {
  /* What to do, set by the caller. */
  const struct layer *layers;
  int64_t layer_count;
  const double *thresholds; /* of each layer: above it pairs pass; exactly -1: all finite pairs */
  double alpha;             /* what a filter keeps of itself */
  int write;                /* whether pairs that pass are blended */
  int keeps_old;            /* whether filters that are blended are kept as they were, for restore.h */
  int threads;              /* at most; fewer where there is little to do, and one in a forked child */
  const struct code *code;

  /* Which filters are sampled, and their partners, one after another for all layers: drawn, unless both are given. */
  struct draw draw;
  const uint8_t *given_coin;
  const int32_t *given_partner; /* within the layer, or NO_PARTNER */
  int64_t given_count;

  /* Set by prepare_merge. */
  int64_t *counts; /* of each layer: sampled filters; the caller's memory */
  int64_t sampled; /* in all */
  int32_t pair_count, part_count;
  struct pair *pairs;
  struct part *parts;
  char *scratch; /* of each thread: room for three filters */
  int64_t room;
  int32_t next_part;
  int32_t *rows;      /* of every sampled filter, by layer and filter: which one of its layer; with keeps_old */
  int64_t *old_start; /* of each layer: offset in `old` that a filter of rank 0 would have; with keeps_old */
  int64_t old_bytes;  /* of all sampled filters */
  int64_t room_for_old; /* to make if there is less, so that other draws fit as well: an eighth more, or every filter */

  /* The caller's memory, old_bytes; with keeps_old. */
  char *old; /* sampled filters one after another, as they were; set where they are blended */

  /* Set by run_merge: of every sampled filter, by layer and filter; the caller's memory. */
  double *similarity; /* NaN if the pair has a filter that is not finite, or without a partner */
  uint8_t *passed;
  int64_t passed_count;
  double largest; /* similarity; minus infinity if there is none */
};

enum status { MERGE_IS_READY, MERGE_HAS_NO_MEMORY, MERGE_HAS_BAD_LAYER, MERGE_HAS_BAD_PARTNER };

enum status prepare_merge(struct merge *merge);
void run_merge(struct merge *merge);
void free_merge(struct merge *merge); /* also where prepare_merge failed */

/* To be called once per process, before it can fork. */
void remember_process(void);

/* How many threads work on so many bytes of filters, of at most so many; 1 in a forked child. */
int threads_for(int64_t bytes, int threads);

#endif
