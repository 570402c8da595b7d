/* A merge in one pass over the weight: what merge.py and exact.py do with torch, operation by operation, here with everything
 * between the weight and the result in registers. The bounds of `exact`, and what they rest on, are told in exact.py. Here a sum is
 * rounded once, and is open where the real sum might lie beyond a tie: where a tie is nearer than the bound.
 *
 * Compiled by hatch_build.py once for each instruction set, loaded by native.py. Plain C with the vectors that GCC and Clang have
 * in common; nothing here needs Python or more than the C library. Never to be compiled with -ffast-math: signs of zeros and NaN
 * count.
 */
#include <math.h>
#include <stdint.h>
#include <string.h>
#if defined(__F16C__) || defined(__AVX2__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
#define FLOATS 16 /* in a register, and doubles */
#define DOUBLES 8
#elif defined(__AVX2__)
#define FLOATS 8
#define DOUBLES 4
#else
#define FLOATS 4
#define DOUBLES 2
#endif
#define ROWS 8 /* of a block: as many independent sums as keep the multipliers busy */
#define SPAN 8 /* products are added up by so many, and then those sums: the shorter the chain, the smaller its error */
_Static_assert(SPAN == ROWS, "the first span is added up while the rows before are rounded, a product a row");
#define PANEL_BYTES (256 * 1024) /* of A, which stay in the second-level cache while many rows go by */

#define INLINE static inline __attribute__((always_inline))
#define COLD static __attribute__((noinline, cold))
#define VECTOR(type, lanes) __attribute__((vector_size(sizeof(type) * (lanes)))) type
#define JOIN_(a, b) a##b
#define JOIN(a, b) JOIN_(a, b)
#if defined(__clang__)
#define UNROLL _Pragma("clang loop unroll(full)")
#else
#define UNROLL _Pragma("GCC unroll 8")
#endif

/* Some rows of one weight. "wide" is float or double, what the sums are kept in; a vector has as many lanes as fit of it. `fast` looks
 * at nothing from row_errors to share. */
struct job {
  const void *weight;        /* (rows, columns), each row contiguous */
  void *out;                 /* the same; may be the weight */
  const void *packed_B;      /* (rows / ROWS, r, ROWS) wide: scaling * B, missing rows zero */
  const void *packed_A;      /* (columns / lanes, r, lanes) wide, missing columns zero; for `exact` without any rounding */
  int64_t measured;          /* whether dot and square are asked for */
  const void *row_errors;    /* (rows) wide, and zeros up to a whole block */
  const void *column_errors; /* (columns) wide, and zeros up to a whole vector */
  const double *scaled_B;    /* (rows, r): scaling * B */
  int64_t weight_stride, out_stride, rows, columns, r;
  double relative;           /* the bound on the error of a sum x: relative * p + row_error * column_error, p the power of two below |x| */
  double unit, share;        /* the same of a sum in float64: unit * |W| + share * row_error * column_error */
  int32_t *open;             /* room for rows * columns flat places: out come those that float64 leaves open, */
  void *open_weight;         /* what the weight was there, before it was overwritten, */
  int64_t opened;            /* how many they are, */
  double dot, square;        /* and the inner products of kept */
};

/* What native.py must know. */
const int lorafold_floats = FLOATS, lorafold_doubles = DOUBLES, lorafold_rows = ROWS, lorafold_span = SPAN;
const int lorafold_job_bytes = sizeof(struct job);

/* The float beside x that stands for it in any later rounding to fewer bits, see to_nearest in rounding.py. */
INLINE float odd_float(double x) {
  float single = (float)x;
  int32_t bits;
  memcpy(&bits, &single, sizeof bits);
  if ((double)single != x && !(bits & 1)) bits += fabs(x) > fabsf(single) ? 1 : -1;
  memcpy(&single, &bits, sizeof bits);
  return single;
}

/* Jobs that several threads do together, each taking the next. */
struct team {
  void (*function)(struct job *);
  struct job *jobs;
  int64_t count, next;
};

static void member(void *data) {
  struct team *team = data;
  for (int64_t i; (i = __atomic_fetch_add(&team->next, 1, __ATOMIC_RELAXED)) < team->count;) team->function(team->jobs + i);
}

/* `parallel` is GOMP_parallel of the OpenMP runtime whose threads are to do it. */
void lorafold_together(struct team *team, void (*parallel)(void (*)(void *), void *, unsigned, unsigned), unsigned threads) {
  parallel(member, team, threads, 0);
}

#define LANES FLOATS
#include "native_lanes.h"
#undef LANES
#define LANES DOUBLES
#include "native_lanes.h"
#undef LANES

#define bf16_stored uint16_t
#define f16_stored uint16_t
#define f32_stored uint32_t
#define bf16_vector(lanes) JOIN(u16x, lanes)
#define f16_vector(lanes) JOIN(u16x, lanes)
#define f32_vector(lanes) JOIN(u32x, lanes)
enum { bf16_nan = 0x7fc0, f16_nan = 0x7e00, f32_nan = 0x7fc00000 };

/* Half the step from 1 to the next number. */
#define bf16_half_step 0x1p-8
#define f16_half_step 0x1p-11
#define f32_half_step 0x1p-24
#define f16_is_f16 1
#define f32_is_f32 1

#define float_bits u32 /* in vectors */
#define double_bits u64
INLINE float bf16_from(double x) { return odd_float(x); }
INLINE float f16_from(double x) { return odd_float(x); }
INLINE float f32_from(double x) { return (float)x; }

/* The numbers that stochastic rounding draws for `count` elements from `start` on, see _uniform in rounding.py. */
void lorafold_uniform(float *out, int64_t count, int64_t start, int64_t key) {
  for (int64_t i = 0; i < count; i++) {
    uint64_t z = ((uint64_t)(start + i) + 1) * 0x9e3779b97f4a7c15u + (uint64_t)key;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    z ^= z >> 31;
    out[i] = (float)(int32_t)((z >> 41 << 1) + 1) * 0x1p-24f;
  }
}

#define float_is_float 1
#define double_is_double 1

#define HOW float
#define EXACT 1
#define WIDE float
#define LANES FLOATS
#include "native_kinds.h"

#define HOW fast
#define EXACT 0
#define WIDE float
#define LANES FLOATS
#include "native_kinds.h"

#define HOW double
#define EXACT 1
#define WIDE double
#define LANES DOUBLES
#include "native_kinds.h"
