/* The draw of one layer: Philox4x32-10, the same bits as inmerge_fast/draw.py, which states the contract. Included by
   for_instruction_set.h. */

enum { DRAWN_AT_ONCE = 64 };

TARGET static void draw_layer(const struct draw *draw, uint32_t layer, int32_t filters, uint32_t group_size,
                              uint8_t *coin, int32_t *partner) {
  for (int32_t start = 0; start < filters; start += DRAWN_AT_ONCE) {
    uint32_t r0[DRAWN_AT_ONCE], r1[DRAWN_AT_ONCE], r2[DRAWN_AT_ONCE];
    for (int l = 0; l < DRAWN_AT_ONCE; l++) {
      uint32_t a = (uint32_t)(start + l), b = layer, c = (uint32_t)draw->step, d = (uint32_t)(draw->step >> 32);
      uint32_t k0 = (uint32_t)draw->seed, k1 = (uint32_t)(draw->seed >> 32);
      UNROLL_ROUNDS
      for (int round = 0; round < 10; round++) {
        uint64_t p = (uint64_t)a * 0xD2511F53u, q = (uint64_t)c * 0xCD9E8D57u;
        a = (uint32_t)(q >> 32) ^ b ^ k0, b = (uint32_t)q, c = (uint32_t)(p >> 32) ^ d ^ k1, d = (uint32_t)p;
        k0 += 0x9E3779B9u, k1 += 0xBB67AE85u;
      }
      r0[l] = a, r1[l] = b, r2[l] = c;
    }
    const int32_t count = filters - start < DRAWN_AT_ONCE ? filters - start : DRAWN_AT_ONCE;
    const uint64_t others = group_size - 1;
    for (int l = 0; l < count; l++) {
      uint32_t filter = (uint32_t)(start + l);
      uint32_t own_place = group_size == (uint32_t)filters ? filter : filter % group_size;
      uint32_t place = (uint32_t)((r1[l] * others + ((r2[l] * others) >> 32)) >> 32);
      coin[start + l] = (r0[l] >> 8) < draw->coin_threshold;
      partner[start + l] = (int32_t)(filter - own_place + place + (place >= own_place));
    }
  }
}
