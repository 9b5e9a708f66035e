/* Simultaneous reads without a copy of the layer: a filter is rewritten when all that read it have read it.

   A filter looks at one partner, so the pairs of a layer are arrows, at most one out of each filter. Along them one
   comes to a filter that looks at none, the root of a tree, or to a circle. A tree is walked from its leaves to its
   root: a filter after all its readers, and right after the last of them, whose partner it was, so that it is in the
   cache. In a circle every filter has a reader. It is cut: the arrow that closes it is left out, which makes it a tree
   whose root comes last, and what that arrow points at is kept aside meanwhile, one filter a circle. */
#include "order.h"

enum { NONE = -1 };
enum mark { AT_REST, UNSEEN, ON_THIS_WALK, SEEN, OPENS_CIRCLE, CLOSES_CIRCLE }; /* the first looks at no partner */

/* Follow the arrows from `start` over filters not seen before; if that ends in a circle, mark where it is cut. */
static void cut_circle(int32_t start, const int32_t *partner, uint8_t *mark) {
  int32_t filter = start;
  for (; mark[filter] == UNSEEN; filter = partner[filter]) mark[filter] = ON_THIS_WALK;
  const int32_t end = filter;
  const int is_circle = mark[end] == ON_THIS_WALK;
  for (filter = start; filter != end; filter = partner[filter]) mark[filter] = SEEN;
  if (!is_circle) return;
  for (; partner[filter] != end; filter = partner[filter]) mark[filter] = SEEN;
  mark[filter] = CLOSES_CIRCLE;
  mark[end] = OPENS_CIRCLE;
}

int32_t order_layer(const struct layer *layer, int32_t index, int32_t first_rank, const uint8_t *sampled,
                    const int32_t *partner, const struct order_space *space, struct pair *pairs) {
  int32_t *looking = space->looking, *first_reader = space->first_reader, *next_reader = space->next_reader;
  int32_t looking_count = 0, count = 0;
  uint8_t *mark = space->mark;
  for (int32_t i = 0; i < layer->filters; i++) { /* no branch: it would be mispredicted at every other sampled filter */
    const int looks = sampled[i] & (partner[i] != NO_PARTNER);
    first_reader[i] = NONE;
    space->rank[i] = first_rank, first_rank += sampled[i];
    mark[i] = looks ? UNSEEN : AT_REST;
    looking[looking_count] = i, looking_count += looks;
  }
  for (int32_t l = 0; l < looking_count; l++)
    if (mark[looking[l]] == UNSEEN) cut_circle(looking[l], partner, mark);
  for (int32_t l = 0; l < looking_count; l++) {
    const int32_t i = looking[l];
    if (mark[i] != CLOSES_CIRCLE) next_reader[i] = first_reader[partner[i]], first_reader[partner[i]] = i;
  }
  for (int32_t l = 0; l < looking_count; l++) {
    const int is_of_circle = mark[looking[l]] == CLOSES_CIRCLE;
    const int32_t root = is_of_circle ? looking[l] : partner[looking[l]], tree = count;
    if (!is_of_circle && (mark[root] != AT_REST || first_reader[root] == NONE)) continue; /* no root, or it is done */
    for (int32_t filter = root;;) {
      const int32_t reader = first_reader[filter];
      if (reader != NONE) { /* towards the leaves */
        first_reader[filter] = next_reader[reader];
        filter = reader;
        continue;
      }
      if (mark[filter] == AT_REST) break;
      pairs[count++] = (struct pair){
        .own = filter_at(layer, filter),
        .partner = filter_at(layer, partner[filter]),
        .rank = space->rank[filter],
        .layer = index,
        .opens_circle = mark[filter] == OPENS_CIRCLE,
        .closes_circle = mark[filter] == CLOSES_CIRCLE,
      };
      if (filter == root) break;
      filter = partner[filter];
    }
    pairs[tree].starts_tree = 1;
  }
  return count;
}
