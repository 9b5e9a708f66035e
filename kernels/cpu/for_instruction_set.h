/* A struct code for one instruction set. The including file defines before:

     CODE, CODE_NAME   the struct's name, and as a string
     TARGET            the instruction set, as an attribute
     VECTOR_BYTES      its width
     LOAD_FLOAT16, STORE_FLOAT16   if the processor converts, else they are converted in plain C */
#include "code.h"

#if defined(__clang__)
#define UNROLL_ROUNDS _Pragma("clang loop unroll(full)")
#elif defined(__GNUC__)
#define UNROLL_ROUNDS _Pragma("GCC unroll 10")
#else
#define UNROLL_ROUNDS
#endif

/* Vectors of the machine's width, aligned and anywhere. They are read one by one: gcc copies a block over the stack. */
#if defined(__GNUC__) && !defined(INMERGE_PLAIN_C)
#define WIDE __attribute__((vector_size(VECTOR_BYTES)))
#define FLOATS_OF(words) ((floats)(words))
#define WORDS_OF(floats) ((words)(floats))
#else /* vectors of one */
#define WIDE
#define FLOATS_OF float_of
#define WORDS_OF bits_of
#endif
typedef float floats WIDE;
typedef double doubles WIDE;
typedef uint32_t words WIDE;
typedef floats floats_anywhere ANYWHERE;
typedef doubles doubles_anywhere ANYWHERE;
typedef words words_anywhere ANYWHERE;

enum {
  FLOAT_VECTORS = LANES * sizeof(float) / sizeof(floats),
  DOUBLE_VECTORS = LANES * sizeof(double) / sizeof(doubles),
};

#include "draw.h"

/* float32 and float64: lane l has elements l, l + LANES, and so on. */
TARGET INLINE void load_float32(floats *to, const float32 *from) {
  for (int v = 0; v < FLOAT_VECTORS; v++) to[v] = ((const floats_anywhere *)from)[v];
}
TARGET INLINE void store_float32(float32 *to, const floats *from) {
  for (int v = 0; v < FLOAT_VECTORS; v++) ((floats_anywhere *)to)[v] = from[v];
}
TARGET INLINE void load_float64(doubles *to, const float64 *from) {
  for (int v = 0; v < DOUBLE_VECTORS; v++) to[v] = ((const doubles_anywhere *)from)[v];
}
TARGET INLINE void store_float64(float64 *to, const doubles *from) {
  for (int v = 0; v < DOUBLE_VECTORS; v++) ((doubles_anywhere *)to)[v] = from[v];
}

#define NAME(function) function##_float32
#define STORED float32
#define NUMBER float
#define VECTOR floats
#define LOAD load_float32
#define STORE store_float32
#define FROM
#define TO
#include "rows.h"

#define NAME(function) function##_float64
#define STORED float64
#define NUMBER double
#define VECTOR doubles
#define LOAD load_float64
#define STORE store_float64
#define FROM
#define TO
#include "rows.h"

/* bfloat16: two elements are a word, whose lower half goes to a lane of the first half, and the upper half to one of
   the second. That spares the instructions that widen and narrow. */
TARGET INLINE void load_bfloat16(floats *to, const bits16 *from) {
  for (int v = 0; v < FLOAT_VECTORS / 2; v++) {
    words both = ((const words_anywhere *)from)[v];
    to[v] = FLOATS_OF(both << 16), to[v + FLOAT_VECTORS / 2] = FLOATS_OF(both & 0xFFFF0000u);
  }
}
TARGET INLINE void store_bfloat16(bits16 *to, const floats *from) {
  for (int v = 0; v < FLOAT_VECTORS / 2; v++) {
    words low = WORDS_OF(from[v]), high = WORDS_OF(from[v + FLOAT_VECTORS / 2]);
    ((words_anywhere *)to)[v] = ROUND_TO_BFLOAT16(low) >> 16 | (ROUND_TO_BFLOAT16(high) & 0xFFFF0000u);
  }
}

#define NAME(function) function##_bfloat16
#define STORED bits16
#define NUMBER float
#define VECTOR floats
#define LOAD load_bfloat16
#define STORE store_bfloat16
#define FROM from_bfloat16
#define TO to_bfloat16
#include "rows.h"

/* float16: lane l has elements l, l + LANES, and so on. */
#ifndef LOAD_FLOAT16
TARGET INLINE void load_float16(floats *to, const bits16 *from) {
  float values[LANES];
  for (int lane = 0; lane < LANES; lane++) values[lane] = from_float16(from[lane]);
  memcpy(to, values, sizeof values);
}
TARGET INLINE void store_float16(bits16 *to, const floats *from) {
  float values[LANES];
  memcpy(values, from, sizeof values);
  for (int lane = 0; lane < LANES; lane++) to[lane] = to_float16(values[lane]);
}
#define LOAD_FLOAT16 load_float16
#define STORE_FLOAT16 store_float16
#endif

#define NAME(function) function##_float16
#define STORED bits16
#define NUMBER float
#define VECTOR floats
#define LOAD LOAD_FLOAT16
#define STORE STORE_FLOAT16
#define FROM from_float16
#define TO to_float16
#include "rows.h"

const struct code CODE = {
  CODE_NAME,
  {measure_float32, measure_bfloat16, measure_float16, measure_float64},
  {blend_float32, blend_bfloat16, blend_float16, blend_float64},
  draw_layer,
};
