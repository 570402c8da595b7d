/* Sums of products of slices: see merge.cu. */
#ifndef SLICES_H
#define SLICES_H

#include "job.h"

/* What brings numbers of up to `largest` to no more than 2^BITS, and the unit they are then counted in: powers of two. The unit of
   nothing but zeros is zero. It is NaN where numbers are so large or small that products of units might leave float32: what comes of
   it is undecided. */
__device__ inline void scaled(float largest, bool any, float *up, float *unit)
{
    int exponent = __float_as_int(largest) >> 23;
    bool wild = exponent < 127 - 45 || exponent > 127 + 45;
    exponent = wild ? 127 : exponent;
    *up = __int_as_float((253 + BITS - exponent) << 23);
    *unit = !any ? 0.0f : wild ? __int_as_float(0x7FC00000) : __int_as_float((exponent + 1 - BITS) << 23);
}

__device__ inline float whole(float x) { return (x + 12582912.0f) - 12582912.0f; } /* 1.5 · 2^23 leaves no room for a fraction */
__device__ inline double whole(double x) { return (x + 6755399441055744.0) - 6755399441055744.0; }

/* The slices of two numbers, as words of two float16. */
template <class T> __device__ inline void sliced(T x, T y, u32 *slices, int apart)
{
#pragma unroll
    for (int i = 0; i < 3; i++) {
        T p = whole(x), q = whole(y);
        slices[i * apart] = packed<1>((float)p, (float)q);
        x = (x - p) * (T)(2 << BITS), y = (y - q) * (T)(2 << BITS);
    }
}

/* A piece of 16 rows of s·B; of B alone, in float32, where s is a power of two and becomes part of the unit. */
template <class T> __device__ inline void cut_B(const job &of, int piece, bool scale)
{
    int lane = threadIdx.x % 32, t = lane % 4, g = lane / 4;
    float largest[2] = {0, 0}, up[2], unit[2];
    int any[2] = {0, 0};
    T numbers[STEPS][8];
#pragma unroll
    for (int step = 0; step < STEPS; step++)
#pragma unroll
        for (int i = 0; i < 8; i++) {
            int k = step * 16 + t * 2 + i % 2 + i / 4 * 8, half = i / 2 % 2;
            double x = given_B(of, piece * 16 + g + half * 8, k);
            numbers[step][i] = scale ? (T)(x * scaling_of(of, k)) : (T)x;
            any[half] |= numbers[step][i] != 0; /* in float64 no such product comes to nothing */
            largest[half] = fmaxf(largest[half], fabsf((float)numbers[step][i])); /* a NaN is told by what becomes of it */
        }
#pragma unroll
    for (int half = 0; half < 2; half++) {
        for (int i = 1; i <= 2; i *= 2) {
            largest[half] = fmaxf(largest[half], __shfl_xor_sync(~0u, largest[half], i));
            any[half] |= __shfl_xor_sync(~0u, any[half], i);
        }
        scaled(largest[half], any[half], &up[half], &unit[half]);
        if (t == 0)
            of.unit_B[piece * 16 + g + half * 8] = scale ? unit[half] : unit[half] * (float)of.one_scaling;
    }
#pragma unroll
    for (int step = 0; step < STEPS; step++) {
        u32 words[3][4];
#pragma unroll
        for (int i = 0; i < 4; i++)
            sliced<T>(numbers[step][2 * i] * (T)up[i % 2], numbers[step][2 * i + 1] * (T)up[i % 2], &words[0][i], 4);
#pragma unroll
        for (int i = 0; i < 3; i++)
            of.cut_B[((piece * 3 + i) * STEPS + step) * 32 + lane] = make_uint4(words[i][0], words[i][1], words[i][2], words[i][3]);
    }
}

/* A block of eight columns of A, of one unit. */
__device__ inline void cut_A(const job &of, int block)
{
    int lane = threadIdx.x % 32, t = lane % 4, column = column_of(block, lane / 4);
    float numbers[STEPS][4], largest = 0, up, unit;
    bool any = false;
#pragma unroll
    for (int step = 0; step < STEPS; step++)
#pragma unroll
        for (int i = 0; i < 4; i++) {
            float x = given_A(of, step * 16 + t * 2 + i % 2 + i / 2 * 8, column);
            numbers[step][i] = x;
            largest = fmaxf(largest, fabsf(x));
            any |= x != 0;
        }
#pragma unroll
    for (int i = 1; i <= 16; i *= 2)
        largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, i));
    scaled(largest, __any_sync(~0u, any), &up, &unit);
    if (lane == 0)
        of.unit_A[block] = unit;
#pragma unroll
    for (int step = 0; step < STEPS; step++) {
        u32 x[3], y[3];
        sliced<float>(numbers[step][0] * up, numbers[step][1] * up, x, 1);
        sliced<float>(numbers[step][2] * up, numbers[step][3] * up, y, 1);
#pragma unroll
        for (int i = 0; i < 3; i++)
            of.cut_A[((block * STEPS + step) * 3 + i) * 32 + lane] = make_uint2(x[i], y[i]);
    }
}

__device__ inline void cut_B(const job &of, int piece)
{
    if (of.power)
        cut_B<float>(of, piece, false);
    else
        cut_B<double>(of, piece, true);
}

#define HALVES 2 /* rows of a lane in a piece: g and g + 8 */

/* Two elements of a row, of which `sum` are the sums of slices: rounded at both ends of their bound. */
__device__ inline void both_ends(const float (&sum)[6][4], int half, float unit_B, float unit_A, const float (&base)[2],
                                 u32 (&low)[2], u32 (&high)[2], float (&delta)[2])
{
    float unit = unit_B * unit_A, total[2];
#if EXACT
    /* what the slices lack; and two roundings of the second sum, each less than R · 2^(BITS - 24) */
    float bound[2], least = fabsf(unit) * (R * (1.01f / (2 << BITS) + 1.01f / (1 << (23 - BITS))));
#endif
#pragma unroll
    for (int i = 0; i < 2; i++) {
        int at = half * 2 + i;
        float third = sum[3][at] + sum[4][at] + sum[5][at], second = sum[1][at] + sum[2][at];
        float units = fmaf(fmaf(third, 1.0f / (2 << BITS), second), 1.0f / (2 << BITS), sum[0][at]);
        total[i] = fmaf(units, unit, base[i]);
        delta[i] = units * unit;
#if EXACT
        /* the last sum in units, the total, and the ends of the bound are rounded too */
        bound[i] = fmaf(fabsf(total[i]), 1.21e-7f, fmaf(fabsf(units), fabsf(unit) * 6.1e-8f, least));
#endif
    }
#if TARGET == 2
#pragma unroll
    for (int i = 0; i < 2; i++) {
        low[i] = __float_as_int(total[i]);
        high[i] = fabsf(total[i]) < LARGE ? low[i] : ~low[i];
    }
#elif EXACT
    low[0] = packed<TARGET>(total[0] - bound[0], total[1] - bound[1]);
    high[0] = without_nan<TARGET>(packed<TARGET>(total[0] + bound[0], total[1] + bound[1]));
#else
    low[0] = packed<TARGET>(total[0], total[1]);
    high[0] = low[0] ^ ((fabsf(total[0]) < LARGE ? 0 : 0xFFFF) | (fabsf(total[1]) < LARGE ? 0 : 0xFFFF0000u));
#endif
}

typedef float sum_t[6][4];

__device__ inline void multiplied(sum_t &sums, const B_lane (&b)[SLICES][STEPS], const A_lane (&a)[SLICES], int step)
{
    multiplied_f16(sums[0], b[0][step], a[0]);
    multiplied_f16(sums[1], b[0][step], a[1]);
    multiplied_f16(sums[2], b[1][step], a[0]);
    multiplied_f16(sums[3], b[0][step], a[2]);
    multiplied_f16(sums[4], b[1][step], a[1]);
    multiplied_f16(sums[5], b[2][step], a[0]);
}

#endif
