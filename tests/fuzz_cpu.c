/* Random calls of the CPU kernel against a slow definition that shares no code with it: fuzz_cpu ROUNDS SEED

   Shapes, strides, gaps, byte offsets, types, values from subnormal to NaN, draws and given partners, threads and
   instruction sets. A weight ends where its memory ends, for sanitizers to see. Prints a checksum of all results, which
   is the same on every processor. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>

#include "../kernels/cpu/merge.h"
#include "../kernels/cpu/restore.h"

#define BAND 1e-6

static uint64_t state;

/* One call an expression: C leaves open in which order it makes several. */
static uint64_t bits(void) { /* splitmix64 */
  uint64_t z = state += 0x9E3779B97F4A7C15u;
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
  return z ^ (z >> 31);
}
static int64_t below(int64_t end) { return (int64_t)(((bits() >> 32) * (uint64_t)end) >> 32); }
static int one_in(int64_t n) { return below(n) == 0; }
static double uniform(void) { return (double)(bits() >> 32) / 0x1p31 - 1; }

static uint64_t checksum = 0xCBF29CE484222325u;
static void add_to_checksum(const void *data, size_t size) {
  for (size_t i = 0; i < size; i++) checksum = (checksum ^ ((const uint8_t *)data)[i]) * 0x100000001B3u;
}

static void require(int yes, const char *what, int64_t round, int64_t layer, int64_t filter) {
  if (yes) return;
  printf("round %lld, layer %lld, filter %lld: %s\n", (long long)round, (long long)layer, (long long)filter, what);
  exit(1);
}

/* --- numbers by their definition: precision with the leading bit, exponent of the smallest normal number */

static const int precision[] = {24, 8, 11, 53}, lowest[] = {-126, -126, -14, -1022}, width[] = {32, 16, 16, 64};

static double value_of(uint64_t code, int type) {
  const int p = precision[type] - 1;
  const uint64_t fraction = code & ((1ull << p) - 1), exponents = (1ull << (width[type] - 1 - p)) - 1;
  const uint64_t exponent = (code >> p) & exponents;
  const double sign = (code >> (width[type] - 1)) & 1 ? -1.0 : 1.0;
  if (exponent == exponents) return fraction ? NAN : sign * INFINITY;
  if (exponent == 0) return sign * ldexp((double)fraction, lowest[type] - p);
  return sign * ldexp((double)(fraction + (1ull << p)), (int)exponent - 1 + lowest[type] - p);
}

static uint64_t code_of(double value, int type) { /* of a finite value, ties to even */
  const int p = precision[type] - 1;
  int exponent;
  frexp(value, &exponent);
  exponent = value == 0 || exponent - 1 < lowest[type] ? lowest[type] : exponent - 1;
  const uint64_t scaled = (uint64_t)nearbyint(ldexp(fabs(value), p - exponent));
  const uint64_t magnitude = ((uint64_t)(exponent - lowest[type]) << p) + scaled; /* the leading bit adds 1 */
  return magnitude | (uint64_t)(signbit(value) != 0) << (width[type] - 1);
}

static uint64_t read_code(const uint8_t *at, int type) {
  uint64_t code = 0;
  for (int byte = 0; byte < width[type] / 8; byte++) code |= (uint64_t)at[byte] << (8 * byte);
  return code;
}

static void write_code(uint8_t *at, int type, uint64_t code) {
  for (int byte = 0; byte < width[type] / 8; byte++) at[byte] = (uint8_t)(code >> (8 * byte));
}

/* --- weights */

struct weight {
  struct layer layer;
  uint8_t *memory, *old; /* and what it was before the call */
  size_t size, offset;
};

static size_t place_of(const struct weight *w, int64_t filter, int64_t e) {
  const struct layer *l = &w->layer;
  const int64_t element = filter / l->group_size * l->group_stride + filter % l->group_size * l->filter_stride +
                          e / l->run * l->outer_stride + e % l->run * l->inner_stride;
  return w->offset + (size_t)element * (size_t)width[l->type] / 8;
}

static double element_of(const struct weight *w, int64_t filter, int64_t e) {
  return value_of(read_code(w->old + place_of(w, filter, e), (int)w->layer.type), (int)w->layer.type);
}

static void fill(struct weight *w) {
  const int type = (int)w->layer.type, p = precision[type];
  double direction = uniform();
  for (int64_t i = 0; i < w->layer.filters; i++) {
    const int64_t kind = below(12);
    for (int64_t e = 0; e < w->layer.elements; e++) {
      double value = uniform() + 2 * direction * (double)((e * 7) % 5 - 2);
      if (kind == 0) value = e % 2 ? 0.0 : -0.0;
      if (kind == 1) value *= ldexp(1, lowest[type] - p / 2); /* subnormal, or next to it */
      if (kind == 2) value = ldexp(uniform(), type == FLOAT16 ? 15 : 60);
      uint64_t code = code_of(value, type);
      const uint64_t exponents = ((1ull << (width[type] - p)) - 1) << (p - 1);
      if (kind == 3 && one_in(4)) code |= exponents; /* infinite or NaN */
      if (kind == 4) code = bits() & (exponents << 1 | ((1ull << (p - 1)) - 1)); /* any */
      write_code(w->memory + place_of(w, i, e), type, code);
    }
  }
}

static int64_t random_length(void) {
  switch (below(8)) {
  case 0: return 1 + below(4);
  case 1: return (int64_t[]){31, 32, 33, 63, 64, 65, 95, 96, 97}[below(9)];
  case 2: return below(8) ? 500 + below(500) : 4096 + below(70);
  default: return 1 + below(120);
  }
}

static void make(struct weight *w) {
  struct layer *l = &w->layer;
  const int64_t groups = one_in(3) ? 1 + below(3) : 1;
  l->type = below(TYPES), l->group_size = 2 + below(one_in(6) ? 120 : 14), l->filters = groups * l->group_size;
  l->id = below(1 << 20), l->elements = random_length(), l->run = l->elements;
  if (one_in(2)) /* a divisor */
    for (l->run = 1 + below(l->elements); l->elements % l->run; l->run--) {
    }
  /* Groups, filters, runs and elements of a run in any order in memory, with gaps or without. */
  int64_t *strides[] = {&l->inner_stride, &l->outer_stride, &l->filter_stride, &l->group_stride}, next = 1;
  int64_t sizes[] = {l->run, l->elements / l->run, l->group_size, groups};
  const int shuffled = one_in(2);
  for (int left = 4; left; left--) {
    const int taken = shuffled ? (int)below(left) : 0;
    *strides[taken] = next;
    next = next * sizes[taken] + (one_in(10) ? below(5) : 0);
    for (int k = taken; k < left - 1; k++) strides[k] = strides[k + 1], sizes[k] = sizes[k + 1];
  }
  w->offset = one_in(3) ? (size_t)below(16) : 0;
  w->size = 0;
  for (int64_t i = 0; i < l->filters; i++)
    for (int64_t e = 0; e < l->elements; e++) {
      const size_t end = place_of(w, i, e) + (size_t)width[l->type] / 8;
      w->size = end > w->size ? end : w->size;
    }
  w->memory = calloc(1, w->size), w->old = malloc(w->size);
  fill(w);
  memcpy(w->old, w->memory, w->size);
  l->base = (int64_t)(intptr_t)(w->memory + w->offset);
}

/* --- the definition */

static double similarity_of(const struct weight *w, int64_t i, int64_t j) {
  double dot = 0, square_i = 0, square_j = 0;
  for (int64_t e = 0; e < w->layer.elements; e++) {
    const double x = element_of(w, i, e), y = element_of(w, j, e);
    dot += x * y, square_i += x * x, square_j += y * y;
  }
  if (!(square_i < 0x1p128) || !(square_j < 0x1p128)) return NAN;
  return dot / (fmax(sqrt(square_i), 1e-8) * fmax(sqrt(square_j), 1e-8));
}

static uint64_t blend_of(double x, double y, double alpha, int type) {
  if (type == FLOAT64) {
    const volatile double a = alpha * x, b = (1 - alpha) * y;
    return code_of(a + b, type);
  }
  const volatile float a = (float)alpha * (float)x, b = (float)(1 - alpha) * (float)y;
  const volatile float sum = a + b;
  return code_of(sum, type);
}

/* Check layer `index` whose first filter is `row`, and `rank` among those sampled; returns the next one's rank. */
static int64_t check(const struct merge *m, const struct weight *w, int64_t index, int64_t row, int64_t rank,
                     int64_t round, const uint8_t *coin, const int32_t *partner) {
  const int type = (int)w->layer.type;
  uint8_t *expected = malloc(w->size);
  int64_t sampled = 0;
  memcpy(expected, w->old, w->size);
  for (int64_t i = 0; i < w->layer.filters; i++) {
    if (!coin[row + i]) continue;
    const int64_t j = partner[row + i];
    const double found = m->similarity[rank], limit = m->thresholds[index];
    const double exact = j == NO_PARTNER ? NAN : similarity_of(w, i, j);
    const int passed = m->passed[rank];
    require(isnan(found) == isnan(exact), "one similarity is NaN", round, index, i);
    if (isnan(exact)) require(!passed, "passed without a similarity", round, index, i);
    else {
      require(fabs(found - exact) <= BAND, "another similarity", round, index, i);
      if (limit == -1) require(passed, "did not pass at -1", round, index, i);
      else if (fabs(exact - limit) > BAND) require(passed == (exact > limit), "another decision", round, index, i);
    }
    for (int64_t e = 0; passed && m->write && e < w->layer.elements; e++)
      write_code(expected + place_of(w, i, e), type,
                 blend_of(element_of(w, i, e), element_of(w, j, e), m->alpha, type));
    sampled++, rank++;
  }
  require(m->counts[index] == sampled, "another count", round, index, -1);
  require(memcmp(expected, w->memory, w->size) == 0, "other bytes", round, index, -1);
  free(expected);
  return rank;
}

/* Put back what was merged: everything must be as it was before the call. */
static void check_restore(const struct merge *m, const struct weight *weights, int64_t round) {
  struct restore restore = {.layers = m->layers, .layer_count = m->layer_count, .counts = m->counts,
                            .sampled = m->sampled, .rows = m->rows, .passed = m->passed, .old = m->old,
                            .old_bytes = m->old_bytes, .threads = 1 + (int)(round / 2 % 4)};
  require(restore_fits(&restore), "does not fit", round, -1, -1);
  run_restore(&restore);
  for (int64_t l = 0; l < m->layer_count; l++)
    require(memcmp(weights[l].old, weights[l].memory, weights[l].size) == 0, "not restored", round, l, -1);
  restore.old_bytes--;
  require(m->sampled == 0 || !restore_fits(&restore), "too little was kept", round, -1, -1);
}

static void run_round(int64_t round) {
  enum { LAYERS = 4 };
  struct weight weights[LAYERS] = {0};
  struct layer layers[LAYERS];
  double thresholds[LAYERS];
  int64_t counts[LAYERS], filters = 0, codes = 0;
  struct merge m = {.layers = layers, .layer_count = 1 + below(LAYERS), .thresholds = thresholds, .counts = counts};
  for (int64_t l = 0; l < m.layer_count; l++) {
    make(&weights[l]);
    layers[l] = weights[l].layer, filters += layers[l].filters;
    thresholds[l] = (double[]){-1, 2, 0, 0.5, 0.9}[below(5)];
  }
  while (code_at((int)codes)) codes++;
  m.code = code_at((int)below(codes));
  m.draw.seed = bits(), m.draw.step = bits() >> 1;
  m.draw.coin_threshold = (uint32_t)below((1 << 24) + 1);
  m.alpha = one_in(3) ? (double)below(2) : (uniform() + 1) / 2, m.write = !one_in(4), m.threads = 1 + (int)below(4);

  uint8_t *coin = malloc((size_t)filters);
  int32_t *partner = malloc((size_t)filters * sizeof *partner);
  const int given = one_in(2), share = 1 + (int)below(4);
  for (int64_t l = 0, row = 0; l < m.layer_count; row += layers[l++].filters) {
    if (!given)
      m.code->draw(&m.draw, (uint32_t)layers[l].id, (int32_t)layers[l].filters, (uint32_t)layers[l].group_size,
                   coin + row, partner + row);
    for (int64_t i = 0; given && i < layers[l].filters; i++) {
      coin[row + i] = below(4) < share;
      partner[row + i] = (int32_t)((i + 1 + below(layers[l].filters - 1)) % layers[l].filters);
      if (one_in(8)) partner[row + i] = NO_PARTNER;
    }
  }
  if (given) m.given_coin = coin, m.given_partner = partner, m.given_count = filters;

  m.keeps_old = m.write && round % 2;
  require(prepare_merge(&m) == MERGE_IS_READY, "not ready", round, -1, -1);
  if (m.keeps_old) m.old = malloc((size_t)m.old_bytes);
  m.similarity = malloc((size_t)m.sampled * sizeof(double)), m.passed = malloc((size_t)m.sampled);
  run_merge(&m);
  int64_t rank = 0, row = 0, passed = 0;
  double largest = -INFINITY;
  for (int64_t l = 0; l < m.layer_count; row += layers[l++].filters)
    rank = check(&m, &weights[l], l, row, rank, round, coin, partner);
  for (int64_t s = 0; s < rank; s++) passed += m.passed[s], largest = fmax(largest, m.similarity[s]);
  require(rank == m.sampled && passed == m.passed_count && largest == m.largest, "other totals", round, -1, -1);
  for (int64_t s = 0; s < rank; s++)
    if (!isnan(m.similarity[s])) add_to_checksum(&m.similarity[s], sizeof(double));
  add_to_checksum(m.passed, (size_t)m.sampled);
  for (int64_t l = 0; l < m.layer_count; l++) add_to_checksum(weights[l].memory, weights[l].size);
  if (m.keeps_old) check_restore(&m, weights, round);
  for (int64_t l = 0; l < m.layer_count; l++) {
    free(weights[l].memory), free(weights[l].old);
  }
  free_merge(&m), free(m.old), free(m.similarity), free(m.passed), free(coin), free(partner);
}

int main(int count, char **arguments) {
  const int64_t rounds = count > 1 ? atoll(arguments[1]) : 1000;
  state = count > 2 ? (uint64_t)atoll(arguments[2]) : 0;
  remember_process();
  for (int64_t round = 0; round < rounds; round++) run_round(round);
  printf("%lld rounds, checksum %016llx\n", (long long)rounds, (unsigned long long)checksum);
  return 0;
}
