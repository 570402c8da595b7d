/* CUDA on the processor, for merge.cu: stands in for the ptx.h beside it, and for what the compiler of CUDA knows by itself.

   Thread blocks run one after another, in each the lanes in turn (lanes.h). What is promised about numbers is checked on the way;
   what did not hold is told. */

#include <math.h>
#include <stdint.h>
#include <string.h>

#include "types.h"

#define __device__
#define __global__
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(...)
#define __grid_constant__
#define __shared__ static /* of one thread block after another */

struct alignas(8) uint2 {
    u32 x, y;
};
struct alignas(16) uint4 {
    u32 x, y, z, w;
};

static inline uint2 make_uint2(u32 x, u32 y) { return {x, y}; }
static inline uint4 make_uint4(u32 x, u32 y, u32 z, u32 w) { return {x, y, z, w}; }
static inline int min(int x, int y) { return x < y ? x : y; }
static inline int __ffs(u32 x) { return __builtin_ffs((int)x); }

/* One thing seen as another of the same size. */
template <class To, class From> static inline To seen_as(From from)
{
    static_assert(sizeof(To) == sizeof from, "");
    To to;
    memcpy(&to, &from, sizeof to);
    return to;
}

static inline int __float_as_int(float x) { return seen_as<int>(x); }
static inline float __int_as_float(int x) { return seen_as<float>(x); }

extern "C" bool usual; /* whether numbers are of sizes for which sums of slices are promised to be exact */
static const char *broken; /* the last promise that was */
#define promised(holds) ((holds) ? (void)0 : (void)(broken = #holds))

#include "lanes.h"
#include "halves.h"

static inline uint4 read_once(const uint4 *from)
{
    promised((uintptr_t)from % 16 == 0);
    return make_uint4(((const u32 *)from)[0], ((const u32 *)from)[1], ((const u32 *)from)[2], ((const u32 *)from)[3]);
}

static inline void written(uint4 *to, u32 x, u32 y, u32 z, u32 w)
{
    promised((uintptr_t)to % 16 == 0);
    ((u32 *)to)[0] = x, ((u32 *)to)[1] = y, ((u32 *)to)[2] = z, ((u32 *)to)[3] = w;
}

/* An integer that float32 holds, as are all such of less size. */
static bool whole_up_to(float largest, float x) { return fabsf(x) <= largest && x == (float)(int)x; }

/* The slices in `words`, as numbers. */
static void slices_of(const u32 *words, int count, float *numbers)
{
    for (int i = 0; i < 2 * count; i++) {
        numbers[i] = widened_f16(words[i / 2] >> i % 2 * 16 & 0xFFFF);
        promised(!usual || whole_up_to(1 << BITS, numbers[i]));
    }
}

/* Lane 4g + t has of B two columns, 2t and 2t + 1, of row g, then of row g + 8, then columns 2t + 8 and 2t + 9 of both; of A rows 2t
   and 2t + 1, and 2t + 8 and 2t + 9, of column g; and of the sum columns 2t and 2t + 1 of row g, then of row g + 8. */
static inline void multiplied_f16(float (&sum)[4], uint4 b, uint2 a)
{
    const u32 words_b[4] = {b.x, b.y, b.z, b.w}, words_a[2] = {a.x, a.y};
    struct given {
        float b[8], a[4];
    } mine;
    slices_of(words_b, 4, mine.b), slices_of(words_a, 2, mine.a);
    const struct given *of = exchanged(mine, MULTIPLIED);
    int g = lane_now() / 4, t = lane_now() % 4;
    for (int i = 0; i < 4; i++) {
        for (int k = 0; k < 16; k++) {
            int pair = k / 2 % 4, upper = k / 8;
            sum[i] += of[g * 4 + pair].b[upper * 4 + i / 2 * 2 + k % 2] * of[(2 * t + i % 2) * 4 + pair].a[upper * 2 + k % 2];
            promised(!usual || whole_up_to(1 << 24, sum[i]));
        }
    }
}

/* Lane 4g + t has of B column t of row g; of A row t of column g; and of the sum columns 2t and 2t + 1 of row g. */
static inline void multiplied_f64(double (&sum)[2], double b, double a)
{
    struct given {
        double b, a;
    } mine = {b, a};
    const struct given *of = exchanged(mine, MULTIPLIED);
    int g = lane_now() / 4, t = lane_now() % 4;
    for (int i = 0; i < 2; i++)
        for (int k = 0; k < 4; k++)
            sum[i] = fma(of[g * 4 + k].b, of[(2 * t + i) * 4 + k].a, sum[i]);
}

static inline void wait_for_cut() {}
static inline void let_merge_begin() {}
