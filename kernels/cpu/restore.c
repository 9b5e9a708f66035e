/* Put filters back, layer after layer, on one thread or several. */
#include "restore.h"

#include "merge.h"

int restore_fits(const struct restore *restore) {
  int64_t first = 0, bytes = 0;
  for (int64_t l = 0; l < restore->layer_count; first += restore->counts[l++]) {
    const struct layer *layer = &restore->layers[l];
    const int64_t count = restore->counts[l], left = restore->old_bytes - bytes;
    if (layer->elements < 1 || layer->type < 0 || layer->type >= TYPES || layer->elements > INT64_MAX / 64 ||
        count < 0 || count > restore->sampled - first || count > left / bytes_of_filter(layer))
      return 0;
    bytes += count * bytes_of_filter(layer);
    for (int64_t s = first; s < first + count; s++)
      if (restore->rows[s] < 0 || restore->rows[s] >= layer->filters) return 0;
  }
  return first == restore->sampled;
}

static void put_back(const struct layer *layer, const char *old, int32_t row) {
  if (is_dense(layer))
    memcpy(filter_at(layer, row), old, (size_t)bytes_of_filter(layer));
  else
    scatter(layer, old, filter_at(layer, row));
}

void run_restore(const struct restore *restore) {
  const int threads = threads_for(restore->old_bytes, restore->threads);
#ifdef _OPENMP
#pragma omp parallel num_threads(threads) if (threads > 1)
#else
  (void)threads;
#endif
  {
    int64_t first = 0;
    const char *old = restore->old;
    for (int64_t l = 0; l < restore->layer_count; l++) {
      const struct layer *layer = &restore->layers[l];
      const int64_t count = restore->counts[l], bytes = bytes_of_filter(layer);
#ifdef _OPENMP
#pragma omp for schedule(static) nowait
#endif
      for (int64_t s = 0; s < count; s++)
        if (restore->passed[first + s]) put_back(layer, old + s * bytes, restore->rows[first + s]);
      first += count, old += count * bytes;
    }
  }
}
