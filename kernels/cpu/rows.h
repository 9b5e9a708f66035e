/* The arithmetic on a pair of filters of one type. for_instruction_set.h includes this once a type, and defines before:

     NAME(function)    the function's name for this type
     TARGET            the instruction set, as an attribute
     STORED, VECTOR    types in memory, and of the arithmetic: a vector of the machine's width
     NUMBER            of which it is one
     LOAD(to, from)    LANES elements from memory, as VECTORs
     STORE(to, from)   back, rounded
     FROM, TO          the same for one element

   A sum has LANES partial sums, which LOAD assigns the elements of a filter to, and which are added up in one fixed
   order, whatever the width of a vector is. The compiler may not contract a product and a sum to one operation
   (-ffp-contract=off). So all instruction sets, compilers and processors give the same bits. */

/* The sum of all lanes: of the first half with the second, of the first quarter with the second, and so on. */
TARGET INLINE NUMBER NAME(fold)(VECTOR *sums) {
  NUMBER lanes[LANES];
  int vectors = LANES * sizeof(NUMBER) / sizeof(VECTOR);
  while (vectors /= 2)
    for (int v = 0; v < vectors; v++) sums[v] += sums[v + vectors];
  memcpy(lanes, sums, sizeof(VECTOR));
  for (int half = sizeof(VECTOR) / sizeof(NUMBER) / 2; half; half /= 2)
    for (int l = 0; l < half; l++) lanes[l] += lanes[l + half];
  return lanes[0];
}

/* sums = own . partner, own . own, partner . partner; meanwhile the filters of a later pair come into the cache. */
TARGET static void NAME(measure)(const void *own_, const void *partner_, int64_t elements, const char *later_own,
                                 const char *later_partner, double sums[3]) {
  enum { VECTORS = LANES * sizeof(NUMBER) / sizeof(VECTOR) };
  const STORED *own = own_, *partner = partner_;
  sums[0] = sums[1] = sums[2] = 0;
  for (int64_t start = 0; start < elements; start += BLOCK) {
    VECTOR xy[VECTORS], xx[VECTORS], yy[VECTORS], x[VECTORS], y[VECTORS];
    const int64_t end = elements - start < BLOCK ? elements : start + BLOCK;
    int64_t e = start;
    for (int v = 0; v < VECTORS; v++) xy[v] = xx[v] = yy[v] = (VECTOR){0};
    for (; e + LANES <= end; e += LANES) {
      for (int64_t byte = 0; byte < LANES * (int64_t)sizeof(STORED); byte += CACHE_LINE) {
        PREFETCH(later_own + e * (int64_t)sizeof(STORED) + byte);
        PREFETCH(later_partner + e * (int64_t)sizeof(STORED) + byte);
      }
      LOAD(x, own + e);
      LOAD(y, partner + e);
      for (int v = 0; v < VECTORS; v++) xy[v] += x[v] * y[v], xx[v] += x[v] * x[v], yy[v] += y[v] * y[v];
    }
    if (e < end) { /* the rest, and zeros */
      STORED rest_own[LANES] = {0}, rest_partner[LANES] = {0};
      memcpy(rest_own, own + e, (size_t)(end - e) * sizeof(STORED));
      memcpy(rest_partner, partner + e, (size_t)(end - e) * sizeof(STORED));
      PREFETCH(later_own + e * (int64_t)sizeof(STORED));
      PREFETCH(later_partner + e * (int64_t)sizeof(STORED));
      LOAD(x, rest_own);
      LOAD(y, rest_partner);
      for (int v = 0; v < VECTORS; v++) xy[v] += x[v] * y[v], xx[v] += x[v] * x[v], yy[v] += y[v] * y[v];
    }
    sums[0] += NAME(fold)(xy), sums[1] += NAME(fold)(xx), sums[2] += NAME(fold)(yy);
  }
}

/* own = keep * own + take * partner, each product rounded on its own, as in the definition. */
TARGET static void NAME(blend)(void *restrict own_, const void *restrict partner_, int64_t elements, double keep_,
                               double take_) {
  enum { VECTORS = LANES * sizeof(NUMBER) / sizeof(VECTOR) };
  STORED *own = own_;
  const STORED *partner = partner_;
  const NUMBER keep = (NUMBER)keep_, take = (NUMBER)take_;
  VECTOR x[VECTORS], y[VECTORS];
  int64_t e = 0;
  for (; e + LANES <= elements; e += LANES) {
    LOAD(x, own + e);
    LOAD(y, partner + e);
    for (int v = 0; v < VECTORS; v++) x[v] = keep * x[v] + take * y[v];
    STORE(own + e, x);
  }
  for (; e < elements; e++) own[e] = TO(keep * FROM(own[e]) + take * FROM(partner[e]));
}

#undef NAME
#undef STORED
#undef NUMBER
#undef VECTOR
#undef LOAD
#undef STORE
#undef FROM
#undef TO
