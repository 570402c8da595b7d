/* Undecided elements, whose bound holds a middle between two numbers: a warp finds out which of the two, one element after another. */
#ifndef UNDECIDED_H
#define UNDECIDED_H

#include "job.h"

struct UndecidedElement {
    const job &of;
    int row, column;
    __device__ double scaling(int k) const { return scaling_of(of, k); }
    __device__ double B(int k) const { return given_B(of, row, k); }
    __device__ double A(int k) const { return given_A(of, k, column); }
};

__device__ __noinline__ u32 settled_at(const job &of, int row, int column, float weight)
{
    return settled((double)weight, of.r, UndecidedElement{of, row, column});
}

__device__ inline double number_of(u32 word)
{
#if TARGET == 2
    return __int_as_float(word);
#else
    return half_widened<TARGET>(word);
#endif
}

template <class T> __device__ inline T lane_sum(T x)
{
#pragma unroll
    for (int i = 16; i; i /= 2)
        x += __shfl_xor_sync(~0u, x, i);
    return x;
}

/* The bits of the elements of the lanes in `left`, each of which rounds to `low` or to `high`: all lanes together find out on which side
   of the middle its sum lies, in float64. Where that cannot tell, its own lane settles it. What the others have is their `low`. */
__device__ __noinline__ u32 decided(const job &of, u32 left, int row, int column, u32 low, u32 high, float weight)
{
    bool unclear = false;
    for (u32 rest = left; rest; rest &= rest - 1) {
        int lane = __ffs(rest) - 1;
        UndecidedElement element{of, __shfl_sync(~0u, row, lane), __shfl_sync(~0u, column, lane)};
        double total = 0;
        float size = 0;
#pragma unroll
        for (int i = 0; i < (R + 31) / 32; i++) {
            int k = i * 32 + threadIdx.x % 32;
            double product = k < of.r ? element.scaling(k) * element.B(k) * element.A(k) : 0;
            total += product, size += fabsf((float)product);
        }
        total = lane_sum(total), size = lane_sum(size);
        if (threadIdx.x % 32 == lane) {
            int apart = (int)(high - low);
            double middle = 0.5 * (number_of(low) + number_of(high));
            total += (double)weight - middle;
            size = (size + fabsf(weight) + fabsf((float)middle)) * ((R + 12) * 1.12e-16f);
            unclear = (apart != 1 && apart != -1) || !(fabs(total) > size);
            low = !unclear && total > 0 ? high : low;
        }
    }
    return unclear ? settled_at(of, row, column, weight) : low;
}

/* Eight elements in a row of each lane, that round to `low` or to `high`: `low` becomes what they are. Those within the matrix of which
   the two differ are decided one after another. */
__device__ inline void told_apart(const job &of, u32 (&low)[TARGET_WORDS], const u32 (&high)[TARGET_WORDS],
                                  const u32 (&weight)[WEIGHT_WORDS], int row, int column)
{
    u32 undecided = 0;
#pragma unroll
    for (int i = 0; i < TARGET_WORDS; i++)
        undecided |= low[i] ^ high[i];
    if (!__any_sync(~0u, undecided && row < of.rows))
        return;
#pragma unroll
    for (int i = 0; i < 8; i++) {
        constexpr u32 MASK = TARGET == 2 ? ~0u : 0xFFFF;
        int word = TARGET == 2 ? i : i / 2, by = TARGET == 2 ? 0 : i % 2 * 16;
        u32 one = low[word] >> by & MASK, other = high[word] >> by & MASK;
        u32 left = __ballot_sync(~0u, one != other && row < of.rows && column + i < of.columns);
        if (left)
            low[word] = (low[word] & ~(MASK << by)) | decided(of, left, row, column + i, one, other, element<WEIGHT>(weight, i)) << by;
    }
}

#endif
