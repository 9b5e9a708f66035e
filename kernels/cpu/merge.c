/* One call: draw, order, allocate; then measure, decide and blend pair by pair, on one thread or several. */
#include "merge.h"

#include <fenv.h>
#include <math.h>
#include <stdlib.h>
#ifdef _OPENMP
#include <omp.h>
#endif
#ifndef _WIN32
#include <unistd.h>
#endif

#define MIN_NORM 1e-8 /* norms are clamped here, so a zero filter has similarity 0 */

#ifndef THREAD_BYTES /* tests set both low */
#define THREAD_BYTES (1 << 20) /* of filters that a thread must have to read: two break even at half of that each */
#define PART_BYTES (1 << 18)   /* of filters in a part: small against a thread's share, large against taking it */
#endif
#define AHEAD_BYTES (1 << 12) /* how far ahead filters are fetched: at least the next pair, of short filters a page */

struct part {
  int32_t first, end;
};

static int64_t home_process;

static int64_t this_process(void) {
#ifdef _WIN32
  return 0;
#else
  return getpid();
#endif
}

void remember_process(void) { home_process = this_process(); }

int threads_for(int64_t bytes, int threads) {
#ifdef _OPENMP
  const int64_t most = bytes / THREAD_BYTES;
  if (threads > most) threads = (int)most;
  /* OpenMP's threads do not survive a fork, and the child would wait for them for ever. */
  return threads < 1 || this_process() != home_process ? 1 : threads;
#else
  (void)bytes, (void)threads;
  return 1;
#endif
}

/* --- before the first write */

static int check_layers(const struct merge *merge, int64_t *filters, int64_t *widest) {
  *filters = *widest = 0;
  for (int64_t l = 0; l < merge->layer_count; l++) {
    const struct layer *layer = &merge->layers[l];
    if (layer->filters < 1 || layer->elements < 1 || layer->group_size < 2 || layer->filters % layer->group_size ||
        layer->run < 1 || layer->elements % layer->run || layer->type < 0 || layer->type >= TYPES ||
        layer->filters > INT32_MAX - 1 - *filters || layer->elements > INT64_MAX / 64)
      return 0;
    *filters += layer->filters;
    *widest = layer->filters > *widest ? layer->filters : *widest;
  }
  return 1;
}

static void count_sampled(struct merge *merge, const uint8_t *coin) {
  merge->sampled = 0;
  for (int64_t l = 0; l < merge->layer_count; coin += merge->layers[l++].filters) {
    int32_t count = 0;
    for (int64_t i = 0; i < merge->layers[l].filters; i++) count += coin[i];
    merge->counts[l] = count;
    merge->sampled += count;
  }
}

/* Whether all given coins are 0 or 1, and partners other filters of the layer. */
static int are_in_layers(const struct merge *merge) {
  const uint8_t *coin = merge->given_coin;
  const int32_t *partner = merge->given_partner;
  for (int64_t l = 0; l < merge->layer_count; l++)
    for (int64_t i = 0; i < merge->layers[l].filters; i++, coin++, partner++)
      if (*coin > 1 || (*coin && *partner != NO_PARTNER &&
                        (*partner < 0 || *partner >= merge->layers[l].filters || *partner == i)))
        return 0;
  return 1;
}

/* Cut the pairs into parts between trees. One thread takes them in one go, to fetch ahead from one to the next. */
static void cut_parts(struct merge *merge) {
  int64_t bytes = 0;
  merge->part_count = 0;
  for (int32_t p = 0; p < merge->pair_count; p++) {
    const struct pair *pair = &merge->pairs[p];
    if (p == 0 || (merge->threads > 1 && bytes >= PART_BYTES && pair->starts_tree))
      merge->parts[merge->part_count++] = (struct part){p, p}, bytes = 0;
    bytes += 2 * bytes_of_filter(&merge->layers[pair->layer]);
    merge->parts[merge->part_count - 1].end = p + 1;
  }
}

/* Which filters are sampled, and where each of them is kept. */
static int place_old(struct merge *merge, const uint8_t *coin) {
  merge->rows = malloc((size_t)(merge->sampled + 1) * sizeof *merge->rows);
  merge->old_start = malloc((size_t)(merge->layer_count + 1) * sizeof *merge->old_start);
  if (!merge->rows || !merge->old_start) return 0;
  int64_t rank = 0, place = 0, every = 0;
  for (int64_t l = 0; l < merge->layer_count; coin += merge->layers[l++].filters) {
    const int64_t bytes = bytes_of_filter(&merge->layers[l]);
    merge->old_start[l] = place - rank * bytes;
    place += merge->counts[l] * bytes, every += merge->layers[l].filters * bytes;
    for (int32_t i = 0; i < merge->layers[l].filters; i++)
      if (coin[i]) merge->rows[rank++] = i;
  }
  merge->old_bytes = place;
  merge->room_for_old = every - place < place / 8 ? every : place + place / 8;
  return 1;
}

static int64_t bytes_of_pairs(const struct merge *merge) {
  double bytes = 0; /* of many pairs of long filters that are read again and again more than an int64_t */
  for (int64_t l = 0; l < merge->layer_count; l++)
    bytes += 2.0 * (double)merge->counts[l] * (double)bytes_of_filter(&merge->layers[l]);
  return bytes < 0x1p62 ? (int64_t)bytes : INT64_MAX;
}

static void choose_threads(struct merge *merge) {
  merge->threads = threads_for(bytes_of_pairs(merge), merge->threads);
}

/* Room for a filter that is kept, and for two that are gathered, for every thread. */
static int allocate_scratch(struct merge *merge) {
  int64_t longest = 0;
  for (int64_t l = 0; l < merge->layer_count; l++) {
    const int64_t bytes = bytes_of_filter(&merge->layers[l]);
    longest = bytes > longest ? bytes : longest;
  }
  merge->room = (longest + CACHE_LINE - 1) / CACHE_LINE * CACHE_LINE;
  if ((uint64_t)merge->room > SIZE_MAX / 3 / (uint64_t)merge->threads) return 0;
  merge->scratch = malloc(3 * (size_t)merge->room * (size_t)merge->threads + 1);
  return merge->scratch != NULL;
}

static int order_pairs(struct merge *merge, int64_t widest, const uint8_t *coin, const int32_t *partner) {
  int32_t *space = malloc((size_t)widest * (4 * sizeof(int32_t) + 1) + 1);
  merge->pairs = malloc((size_t)(merge->sampled + 1) * sizeof *merge->pairs);
  merge->parts = malloc((size_t)(merge->sampled + 1) * sizeof *merge->parts);
  const int has_memory = space && merge->pairs && merge->parts;
  if (has_memory) {
    const struct order_space arrays = {space, space + widest, space + 2 * widest, space + 3 * widest,
                                       (uint8_t *)(space + 4 * widest)};
    int64_t row = 0, rank = 0;
    merge->pair_count = 0;
    for (int64_t l = 0; l < merge->layer_count; l++) {
      merge->pair_count += order_layer(&merge->layers[l], (int32_t)l, (int32_t)rank, coin + row, partner + row, &arrays,
                                       merge->pairs + merge->pair_count);
      row += merge->layers[l].filters, rank += merge->counts[l];
    }
    cut_parts(merge);
  }
  free(space);
  return has_memory;
}

enum status prepare_merge(struct merge *merge) {
  int64_t filters, widest;
  uint8_t *coin = NULL;
  int32_t *partner = NULL;
  merge->pairs = NULL, merge->parts = NULL, merge->scratch = NULL, merge->rows = NULL, merge->old_start = NULL;
  if (!check_layers(merge, &filters, &widest)) return MERGE_HAS_BAD_LAYER;
  if (merge->given_coin) {
    if (merge->given_count != filters || !are_in_layers(merge)) return MERGE_HAS_BAD_PARTNER;
  } else {
    coin = malloc((size_t)filters + 1), partner = malloc((size_t)(filters + 1) * sizeof *partner);
    if (!coin || !partner) {
      free(coin), free(partner);
      return MERGE_HAS_NO_MEMORY;
    }
    for (int64_t l = 0, row = 0; l < merge->layer_count; row += merge->layers[l++].filters)
      merge->code->draw(&merge->draw, (uint32_t)merge->layers[l].id, (int32_t)merge->layers[l].filters,
                        (uint32_t)merge->layers[l].group_size, coin + row, partner + row);
  }
  const uint8_t *all_coins = coin ? coin : merge->given_coin;
  const int32_t *all_partners = partner ? partner : merge->given_partner;
  count_sampled(merge, all_coins);
  choose_threads(merge);
  const int has_memory = allocate_scratch(merge) && order_pairs(merge, widest, all_coins, all_partners) &&
                         (!merge->keeps_old || place_old(merge, all_coins));
  free(coin), free(partner);
  return has_memory ? MERGE_IS_READY : MERGE_HAS_NO_MEMORY;
}

void free_merge(struct merge *merge) {
  free(merge->pairs), free(merge->parts), free(merge->scratch), free(merge->rows), free(merge->old_start);
}

/* --- measure, decide, blend */

static double norm(double square) {
  const double root = sqrt(square);
  return root > MIN_NORM ? root : MIN_NORM;
}

static float normf(float square) {
  const float root = sqrtf(square);
  return root > (float)MIN_NORM ? root : (float)MIN_NORM;
}

/* Whether a pair with these sums passes, and its similarity, in float32, or in float64 for float64 filters. A filter is
   finite if its squared norm is finite in float32. */
static int decide(const double sums[3], int64_t type, double threshold, double *similarity) {
  const float square_own = (float)sums[1], square_partner = (float)sums[2];
  if (!isfinite(square_own) || !isfinite(square_partner)) {
    *similarity = NAN;
    return 0;
  }
  if (type == FLOAT64) {
    *similarity = sums[0] / (norm(sums[1]) * norm(sums[2]));
    return *similarity > threshold || threshold == -1;
  }
  const float quotient = (float)sums[0] / (normf(square_own) * normf(square_partner));
  *similarity = quotient;
  return quotient > (float)threshold || threshold == -1;
}

static void run_part(const struct merge *merge, struct part part, char *scratch) {
  const struct code *code = merge->code;
  const double keep = merge->alpha, take = 1.0 - merge->alpha;
  char *kept = scratch, *packed_own = kept + merge->room, *packed_partner = packed_own + merge->room;
  int is_kept = 0, dense = 0;
  int32_t layer_index = -1, ahead = 0;
  const struct layer *layer = NULL;
  int64_t bytes = 0;
  for (int32_t p = part.first; p < part.end; p++) {
    const struct pair *pair = &merge->pairs[p];
    if (pair->layer != layer_index) {
      layer_index = pair->layer, layer = &merge->layers[layer_index];
      bytes = bytes_of_filter(layer), dense = is_dense(layer);
      ahead = 1 + (int32_t)(AHEAD_BYTES / bytes);
    }
    const struct pair *later = &merge->pairs[ahead < part.end - p ? p + ahead : part.end - 1];
    const char *partner = pair->closes_circle && is_kept ? kept : pair->partner;
    char *own = pair->own;
    if (!dense) {
      gather(layer, pair->own, packed_own), own = packed_own;
      if (partner != kept) gather(layer, pair->partner, packed_partner), partner = packed_partner;
    }
    double sums[3];
    code->measure[layer->type](own, partner, layer->elements, later->own, later->partner, sums);
    const int passed = decide(sums, layer->type, merge->thresholds[layer_index], &merge->similarity[pair->rank]);
    merge->passed[pair->rank] = (uint8_t)passed;
    if (pair->opens_circle) is_kept = 0; /* a filter that does not merge can be read where it lies */
    if (!passed || !merge->write) continue;
    if (merge->keeps_old) memcpy(merge->old + merge->old_start[layer_index] + pair->rank * bytes, own, (size_t)bytes);
    if (pair->opens_circle) memcpy(kept, own, (size_t)bytes), is_kept = 1;
    code->blend[layer->type](own, partner, layer->elements, keep, take);
    if (!dense) scatter(layer, own, pair->own);
  }
}

/* Take parts until none is left. In the standard's floating-point environment: the caller's may set subnormals to zero,
   and that of his threads not. */
static void work(struct merge *merge, char *scratch) {
  fenv_t environment;
  fegetenv(&environment);
  fesetenv(FE_DFL_ENV);
  for (;;) {
    int32_t part;
#ifdef _OPENMP
#pragma omp atomic capture
#endif
    part = merge->next_part++;
    if (part >= merge->part_count) break;
    run_part(merge, merge->parts[part], scratch);
  }
  fesetenv(&environment);
}

void run_merge(struct merge *merge) {
  merge->next_part = 0;
  if (merge->pair_count < merge->sampled) /* some have no partner */
    for (int64_t s = 0; s < merge->sampled; s++) merge->similarity[s] = NAN, merge->passed[s] = 0;
  if (merge->threads == 1) work(merge, merge->scratch);
#ifdef _OPENMP
  else { /* libgomp makes its threads before one of them starts; without memory for them it ends the process */
#pragma omp parallel num_threads(merge->threads)
    work(merge, merge->scratch + omp_get_thread_num() * 3 * merge->room);
  }
#endif
  merge->passed_count = 0, merge->largest = -INFINITY;
  for (int64_t s = 0; s < merge->sampled; s++) {
    merge->passed_count += merge->passed[s];
    if (merge->similarity[s] > merge->largest) merge->largest = merge->similarity[s]; /* NaN is not */
  }
}
