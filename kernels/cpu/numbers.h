/* The four types of a weight, and 16-bit floats as float32 and back, in plain C that compilers vectorise.

   Conversions to 16 bits round to the nearest, ties to even. They are for finite values, subnormal ones included: a
   filter with others never merges, and a blend of two finite filters does not overflow. */
#ifndef INMERGE_NUMBERS_H
#define INMERGE_NUMBERS_H

#include <stdint.h>
#include <string.h>

enum type { FLOAT32, BFLOAT16, FLOAT16, FLOAT64, TYPES };

static inline int64_t size_of(int64_t type) { return type == FLOAT64 ? 8 : type == FLOAT32 ? 4 : 2; }

#if defined(__GNUC__)
#define INLINE static inline __attribute__((always_inline)) /* into code for another instruction set as well */
#define ANYWHERE __attribute__((aligned(1), may_alias))     /* a view of a byte buffer may start anywhere */
#define PREFETCH(address) __builtin_prefetch(address, 0, 2)
#else
#define INLINE static inline
#define ANYWHERE
#define PREFETCH(address) ((void)(address))
#endif

typedef float float32 ANYWHERE;
typedef double float64 ANYWHERE;
typedef uint16_t bits16 ANYWHERE;

INLINE float float_of(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

INLINE uint32_t bits_of(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}

/* All ones or none: a condition would keep gcc from vectorising. */
INLINE uint32_t mask(int yes) { return 0u - (uint32_t)yes; }

/* The upper 16 bits are the bfloat16. A macro, for a word or a vector of them. */
#define ROUND_TO_BFLOAT16(bits) ((bits) + 0x7FFF + (((bits) >> 16) & 1))

INLINE float from_bfloat16(uint16_t bits) { return float_of((uint32_t)bits << 16); }

INLINE uint16_t to_bfloat16(float value) { return (uint16_t)(ROUND_TO_BFLOAT16(bits_of(value)) >> 16); }

INLINE float from_float16(uint16_t half) {
  const uint32_t bias = 112u << 23; /* between the two exponents */
  uint32_t exponent = half & 0x7C00u, subnormal = mask(exponent == 0), infinite = mask(exponent == 0x7C00);
  uint32_t normal = ((half & 0x7FFFu) << 13) + bias + (infinite & bias);
  float tiny = (float)(int32_t)(half & 0x3FFu) * 0x1p-24f;
  return float_of((half & 0x8000u) << 16 | (subnormal & bits_of(tiny)) | (~subnormal & normal));
}

INLINE uint16_t to_float16(float value) {
  uint32_t bits = bits_of(value), absolute = bits & 0x7FFFFFFF, subnormal = mask(absolute < (113u << 23));
  uint32_t normal = (absolute - (112u << 23) + 0xFFF + ((absolute >> 13) & 1)) >> 13;
  uint32_t tiny = bits_of(float_of(absolute) + 0.5f) - bits_of(0.5f); /* the sum is rounded to multiples of 2**-24 */
  return (uint16_t)((subnormal & tiny) | (~subnormal & normal) | ((bits >> 16) & 0x8000));
}

#endif
