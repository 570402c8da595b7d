/* W + ΔW on a GPU, in one pass over the weight.

   A GPU moves a weight through its memory so fast that arithmetic of float64, and even of float32, cannot keep up from some rank on.
   Its matrix units can, but promise little of how they round. So they are given nothing to round. Each row of s·B, and each column
   of A, is cut into three slices of integers that float16 holds, over a power of two of its own:

       x = unit · (q1 + q2 / D + q3 / D² + ρ / D²),   |q| ≤ 2^BITS,   D = 2^(BITS + 1),   |ρ| ≤ 1/2

   (the scheme of Ozaki, Ogita, Oishi and Rump, Numer. Algorithms 59, 2012; on matrix units Mukunoki et al., ISC 2020). Six of the nine
   products of slices are summed, each on its own: integers, no partial sum of which passes R · 2^(2 BITS) ≤ 2^24, so that a float32
   holds every one of them, in whatever order they come. Of each of the R products, counted in unit · unit,

       2 · 2^(2 BITS) / D³  (q2 p3 and q3 p2)  +  2^(2 BITS) / D⁴  (q3 p3)  +  2^BITS / D²  (both ρ)   <   1.01 / D

   is missing at most. What float32 rounds from there on is counted beside it. Where both ends of that bound round to one number, it is
   the correctly rounded sum; the few other elements are settled one by one (element.h).

   Sums for a float32 weight by `exact` are kept in float64, by matrix units that round as IEEE 754 says.

   `cut` comes first: it puts the slices, or the factors in float64, in the order in which the lanes of a matrix unit want them. Then
   each warp of `merge` does 8 or 16 rows, 32 columns after another; its rows of B stay in registers. Which column of 32 is which
   column of a matrix unit is free: it is chosen such that a lane has eight of them in a row, and moves them at once.

   Set from outside: WEIGHT, TARGET and FACTOR (0 bfloat16, 1 float16, 2 float32); R, the rank, up to a multiple of 16; BITS; EXACT,
   WIDE, MEASURED and ALIGNED; how many WARPS a thread block has, how many BLOCKS share a multiprocessor at least, and how many groups
   of 32 columns a warp loads AHEAD at once, while those before are worked on. */

#include "job.h"
#include "undecided.h"
#if WIDE
#include "doubles.h"
#else
#include "slices.h"
#endif

/* The sums of all warps of a block, one after another, so that they are the same each time. */
__device__ inline void told(const job &of, float dot, float square)
{
#if MEASURED
    __shared__ float sums[WARPS][2];
    dot = lane_sum(dot), square = lane_sum(square);
    if (threadIdx.x % 32 == 0)
        sums[threadIdx.x / 32][0] = dot, sums[threadIdx.x / 32][1] = square;
    __syncthreads();
    if (threadIdx.x < 2) {
        float sum = 0;
        for (int i = 0; i < WARPS; i++)
            sum += sums[i][threadIdx.x];
        of.sums[blockIdx.x * 2 + threadIdx.x] = sum;
    }
#endif
}

extern "C" __global__ void __launch_bounds__(128) cut(const __grid_constant__ job of)
{
    let_merge_begin();
    int pieces = (of.rows + PIECE - 1) / PIECE, which = blockIdx.x * 4 + threadIdx.x / 32;
    if (which < pieces)
        cut_B(of, which);
    else if (which - pieces < of.blocks)
        cut_A(of, which - pieces);
}

extern "C" __global__ void __launch_bounds__(32 * WARPS, BLOCKS) merge(const __grid_constant__ job of)
{
    int lane = threadIdx.x % 32, t = lane % 4, piece = blockIdx.x / of.across * WARPS + threadIdx.x / 32;
    int row0 = piece * PIECE + lane / 4, group0 = blockIdx.x % of.across * of.groups;
    int end = min(group0 + of.groups, of.blocks / 4);
    bool there = piece * PIECE < of.rows; /* or this warp has no rows, and the last piece stands in */
    const weight_t *weight = (const weight_t *)of.weight + row0 * of.weight_stride;
    target_t *out = (target_t *)of.out + row0 * of.out_stride;
    float dot = 0, square = 0;

    u32 words[AHEAD][HALVES][WEIGHT_WORDS];
    auto take = [&](int group) {
#pragma unroll
        for (int half = 0; half < HALVES; half++)
#pragma unroll
            for (int i = 0; i < AHEAD; i++)
                taken<WEIGHT_WORDS>(words[i][half], weight + half * 8 * of.weight_stride, (group + i) * 32 + t * 8, of.columns,
                                    row0 + half * 8 < of.rows);
    };
    take(group0);
    wait_for_cut();

    B_lane b[SLICES][STEPS];
    unit_t unit_B[HALVES];
    if (!there)
        piece = 0;
#pragma unroll
    for (int i = 0; i < SLICES * STEPS; i++)
        b[i / STEPS][i % STEPS] = of.cut_B[(piece * SLICES * STEPS + i) * 32 + lane];
#pragma unroll
    for (int half = 0; half < HALVES; half++)
        unit_B[half] = of.unit_B[piece * PIECE + lane / 4 + half * 8];

#pragma unroll 1
    for (int next = group0; there && next < end; next += AHEAD) {
        u32 all[AHEAD][HALVES][WEIGHT_WORDS];
#pragma unroll
        for (int i = 0; i < AHEAD * HALVES * WEIGHT_WORDS; i++)
            (&all[0][0][0])[i] = (&words[0][0][0])[i];
        if (next + AHEAD < end)
            take(next + AHEAD);

#pragma unroll
        for (int group = next; group < next + AHEAD; group++) {
            const u32(&now)[HALVES][WEIGHT_WORDS] = all[group - next];
            u32 low[HALVES][TARGET_WORDS], high[HALVES][TARGET_WORDS], undecided = 0;
#pragma unroll
            for (int block = 0; block < 4; block++) {
                sum_t sums;
#pragma unroll
                for (int i = 0; i < sizeof sums / sizeof(unit_t); i++)
                    ((unit_t *)sums)[i] = 0;
#pragma unroll
                for (int step = 0; step < STEPS; step++) {
                    A_lane a[SLICES];
#pragma unroll
                    for (int i = 0; i < SLICES; i++)
                        a[i] = of.cut_A[(((group * 4 + block) * STEPS + step) * SLICES + i) * 32 + lane];
                    multiplied(sums, b, a, step);
                }
                unit_t unit_A = of.unit_A[group * 4 + block];
#pragma unroll
                for (int half = 0; half < HALVES; half++) {
                    float base[2], delta[2];
                    u32 lower[2], higher[2];
#pragma unroll
                    for (int i = 0; i < 2; i++)
                        base[i] = element<WEIGHT>(now[half], block * 2 + i);
                    both_ends(sums, half, unit_B[half], unit_A, base, lower, higher, delta);
#pragma unroll
                    for (int i = 0; i < TARGET_WORDS / 4; i++) {
                        int at = block * (TARGET_WORDS / 4) + i;
                        low[half][at] = lower[i], high[half][at] = higher[i];
                        undecided |= lower[i] ^ higher[i];
                    }
#if MEASURED /* an element that is undecided, as the lower end of its bound has it: there are too few of them to matter */
#pragma unroll
                    for (int i = 0; i < 2; i++) {
                        float moved = element<TARGET>(low[half], block * 2 + i) - base[i];
                        dot = fmaf(moved, delta[i], dot);
                        square = fmaf(delta[i], delta[i], square);
                    }
#endif
                }
            }
            if (__any_sync(~0u, undecided != 0))
#pragma unroll
                for (int half = 0; half < HALVES; half++)
                    told_apart(of, low[half], high[half], now[half], row0 + half * 8, group * 32 + t * 8);
#pragma unroll
            for (int half = 0; half < HALVES; half++)
                given<TARGET_WORDS>(low[half], out + half * 8 * of.out_stride, group * 32 + t * 8, of.columns, row0 + half * 8 < of.rows);
        }
    }
    told(of, dot, square);
}
