/* A merge in one pass over the weight: what merge.py and exact.py do with torch, operation by operation, here with everything
 * between the weight and the result in registers or beside them. The bounds of `exact`, and what they rest on, are told in exact.py,
 * and in tile.h how it is known here that a sum is rounded right; where it is not, the sum is undecided.
 *
 * Compiled by hatch_build.py once for each instruction set, loaded by loader.py. Plain C with the vectors that GCC and Clang have
 * in common; nothing here needs Python or more than the C library. Never to be compiled with -ffast-math: signs of zeros and NaN
 * count.
 */
#define _POSIX_C_SOURCE 200809L
#define _FILE_OFFSET_BITS 64
#include <math.h>
#include <stdint.h>
#include <string.h>
#if defined(__F16C__) || defined(__AVX2__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
#define FLOATS 16 /* in a register, and doubles */
#define DOUBLES 8
#define ROWS 8 /* of a block, and vectors side by side: as many sums as there are registers for, beside the factors */
#elif defined(__AVX2__)
#define FLOATS 8
#define DOUBLES 4
#define ROWS 4
#else
#define FLOATS 4
#define DOUBLES 2
#define ROWS 4
#endif
#define VECTORS 2
#define SPAN 8 /* products are added up by so many, and then those sums: the shorter the chain, the smaller its error */
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

/* Some rows of one weight. "wide" is float or double, what the sums are kept in; a vector has as many lanes as fit of it, a
 * block ROWS rows of VECTORS vectors, its width. `fast` looks at nothing from row_errors to share. */
struct job {
  const void *weight;        /* (rows, columns), each row contiguous */
  void *out;                 /* the same; may be the weight */
  const void *packed_B;      /* (rows / ROWS, r, ROWS) wide: scaling * B, missing rows zero */
  const void *packed_A;      /* (columns / width, r, width) wide, missing columns zero; for `exact` without any rounding */
  int64_t measured;          /* whether dot and square are asked for */
  const void *row_errors;    /* (rows) wide, and zeros up to a whole block */
  const void *column_errors; /* (columns) wide, and zeros up to a whole block */
  const double *scaled_B;    /* (rows, r): scaling * B */
  const void *given_B;       /* B: its number (i, k) lies `i * B_row_stride + k * B_stride` numbers further on */
  const double *scaling;     /* (r) */
  int64_t B_dtype, B_row_stride, B_stride; /* of_f64 and so on */
  int64_t B_row;             /* the row of B that is the job's first */
  int64_t weight_stride, out_stride, rows, columns, r;
  double largest_column_error; /* or more */
  double unit, share;        /* the bound on the error of a sum in float64: unit * |W| + share * row_error * column_error */
  int64_t column, row;       /* where to go on, and out: where it stopped, at `columns` or where there was too little */
  int32_t *undecided;        /* room: for flat places that are left undecided, */
  void *undecided_weight;    /* and for what the weight was there, before it was overwritten; */
  int64_t room, undecided_count; /* how many fit, and out: how many they are, */
  double dot, square;        /* and the inner products of kept */
  const double *packed_rest; /* as packed_B, what that lacks of scaling * B; or null, where it lacks nothing. For results in float64 */
  uint64_t first, key;       /* for stochastic rounding: the job's first element in the whole tensor, and what draws */
};

/* What loader.py must know. */
const int lorafold_floats = FLOATS, lorafold_doubles = DOUBLES, lorafold_rows = ROWS, lorafold_vectors = VECTORS, lorafold_span = SPAN;
const int lorafold_job_bytes = sizeof(struct job);

/* A float that stands for x in any later rounding to fewer bits: the one nearer to zero, its last bit set if it is not x. */
INLINE float odd_float(double x) {
  uint64_t bits;
  memcpy(&bits, &x, sizeof bits);
  uint64_t lost = bits & 0x1fffffff;
  bits = (bits - lost) | (uint64_t)(lost != 0) << 29;
  double odd;
  memcpy(&odd, &bits, sizeof odd);
  if (fabs(x) >= 0x1p-126 || x == 0) return (float)odd;
  float single = (float)x; /* of fewer bits */
  uint32_t short_bits;
  memcpy(&short_bits, &single, sizeof short_bits);
  if ((double)single != x && !(short_bits & 1)) short_bits += fabs(x) > fabsf(single) ? 1 : -1;
  memcpy(&single, &short_bits, sizeof single);
  return single;
}

/* Jobs that several threads do in parallel, each taking the next. */
struct queue {
  void (*function)(void *);
  char *jobs;
  int64_t bytes, count, next; /* bytes of a job; how many there are, and were taken */
};

static void take_jobs(void *data) {
  struct queue *queue = data;
  for (int64_t i; (i = __atomic_fetch_add(&queue->next, 1, __ATOMIC_RELAXED)) < queue->count;) queue->function(queue->jobs + i * queue->bytes);
}

/* `fork` is GOMP_parallel of the OpenMP runtime whose threads are to do it. */
void lorafold_parallel(struct queue *queue, void (*fork)(void (*)(void *), void *, unsigned, unsigned), unsigned threads) {
  fork(take_jobs, queue, threads, 0);
}

/* A tie of floats, and what lies within 2^14 last bits of a float64 beside it, has none of LOST_BITS once NO_TIE is added. */
#define LOST_BITS (uint64_t)0x1fff8000
#define NO_TIE ((uint64_t)(1 << 14) - (1 << 28))

/* What element `i` draws for stochastic rounding: SplitMix64, see _uniform in rounding.py, of which 32 bits suffice. Its last step leaves
 * the 31 bits at the top as they are, so it is left out. */
#define GOLDEN (uint64_t)0x9e3779b97f4a7c15
#define MIX_1 (uint64_t)0xbf58476d1ce4e5b9
#define MIX_2 (uint64_t)0x94d049bb133111eb
INLINE uint32_t drawn_at(uint64_t i, uint64_t key) {
  uint64_t z = (i + 1) * GOLDEN + key;
  z = (z ^ (z >> 30)) * MIX_1;
  z = (z ^ (z >> 27)) * MIX_2;
  return z >> 32;
}

#define LANES FLOATS
#include "lanes.h"
#include "stochastic.h"
#undef LANES
#define LANES DOUBLES
#include "lanes.h"
#include "stochastic.h"
#undef LANES

#include "environment.h"
#include "factors.h"
#include "errorfree.h"
#define LANES DOUBLES
#include "pairs.h"
#undef LANES

#define bf16_stored uint16_t
#define f16_stored uint16_t
#define f32_stored uint32_t
#define f64_stored uint64_t
#define bf16_vector(lanes) JOIN(u16x, lanes)
#define f16_vector(lanes) JOIN(u16x, lanes)
#define f32_vector(lanes) JOIN(u32x, lanes)
#define f64_vector(lanes) JOIN(u64x, lanes)
#define bf16_float float /* what is rounded to it */
#define f16_float float
#define f32_float float
#define f64_float double
enum { bf16_nan = 0x7fc0, f16_nan = 0x7e00, f32_nan = 0x7fc00000 };
#define f64_nan (uint64_t)0x7ff8000000000000

#define bf16_differ(lanes) JOIN(u32x, lanes) /* what ends_ tells */
#define f16_differ(lanes) JOIN(u16x, lanes)
#define f32_differ(lanes) JOIN(u32x, lanes)
#define f64_differ(lanes) JOIN(u32x, lanes)
#define bf16_is_f32 0
#define f16_is_f32 0
#define f32_is_f32 1
#define f64_is_f32 0
#define f64_is_f64 1
#define f16_is_f16 1

/* See tile.h. */
#if defined(__FMA__)
#define float_margin 0x1p-23
#define double_margin 0x1p-52
#else
#define float_margin 0x1p-22
#define double_margin 0x1p-51
#endif

INLINE float bf16_from(double x) { return odd_float(x); }
INLINE float f16_from(double x) { return odd_float(x); }
INLINE float f32_from(double x) { return (float)x; }

/* The numbers that stochastic rounding draws for `count` elements from `start` on. */
void lorafold_uniform(float *out, int64_t count, int64_t start, int64_t key) {
  for (int64_t i = 0; i < count; i++) out[i] = (float)(int32_t)(drawn_at(start + i, key) >> 9 << 1 | 1) * 0x1p-24f;
}

#define float_is_float 1
#define float_is_double 0
#define double_is_float 0
#define double_is_double 1

#define STOCHASTIC 0
#define HOW float
#define EXACT 1
#define WIDE float
#define LANES FLOATS
#include "kinds.h"

#define HOW fast
#define EXACT 0
#define WIDE float
#define LANES FLOATS
#include "kinds.h"

#define HOW fast_double
#define EXACT 0
#define WIDE double
#define LANES DOUBLES
#include "kinds.h"

#define HOW double
#define EXACT 1
#define WIDE double
#define LANES DOUBLES
#include "kinds.h"

#undef STOCHASTIC
#define STOCHASTIC 1

#define HOW float_stochastic
#define EXACT 1
#define WIDE float
#define LANES FLOATS
#include "kinds.h"

#define HOW fast_stochastic
#define EXACT 0
#define WIDE float
#define LANES FLOATS
#include "kinds.h"

#define HOW fast_double_stochastic
#define EXACT 0
#define WIDE double
#define LANES DOUBLES
#include "kinds.h"

#define HOW double_stochastic
#define EXACT 1
#define WIDE double
#define LANES DOUBLES
#include "kinds.h"

#include "codes.h"
#include "recode.h"
#include "stream.h"
#include "corrections.h"
#include "rows.h"
#include "rescale.h"
#include "elementwise.h"
#include "rotate.h"
#include "cast.h"
