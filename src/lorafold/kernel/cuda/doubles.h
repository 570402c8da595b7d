/* Sums in float64, on matrix units that round as IEEE 754 says: for float32 weights by `exact`. */
#ifndef DOUBLES_H
#define DOUBLES_H

#include "job.h"

__device__ inline void cut_B(const job &of, int piece)
{
    int lane = threadIdx.x % 32, row = piece * 8 + lane / 4;
    double largest = 0;
#pragma unroll
    for (int step = 0; step < STEPS; step++) {
        int k = step * 4 + lane % 4;
        double x = given_B(of, row, k) * scaling_of(of, k);
        of.cut_B[(piece * STEPS + step) * 32 + lane] = x;
        largest = fmax(largest, fabs(x));
    }
    for (int i = 1; i <= 2; i *= 2)
        largest = fmax(largest, __shfl_xor_sync(~0u, largest, i));
    if (lane % 4 == 0)
        of.unit_B[row] = largest * (R * (R + 6) * 1.1102230246251565e-16 * 1.01);
}

__device__ inline void cut_A(const job &of, int block)
{
    int lane = threadIdx.x % 32, column = column_of(block, lane / 4);
    float largest = 0;
#pragma unroll
    for (int step = 0; step < STEPS; step++) {
        float x = given_A(of, step * 4 + lane % 4, column);
        of.cut_A[(block * STEPS + step) * 32 + lane] = x;
        largest = fmaxf(largest, fabsf(x));
    }
    for (int i = 1; i <= 16; i *= 2)
        largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, i));
    if (lane == 0)
        of.unit_A[block] = largest;
}

#define HALVES 1
typedef double sum_t[2];

__device__ inline void multiplied(sum_t &sum, const B_lane (&b)[SLICES][STEPS], const A_lane (&a)[SLICES], int step)
{
    multiplied_f64(sum, b[0][step], a[0]);
}

__device__ inline void both_ends(const sum_t &sum, int, double unit_B, double unit_A, const float (&base)[2], u32 (&low)[2],
                                 u32 (&high)[2], float (&delta)[2])
{
#pragma unroll
    for (int i = 0; i < 2; i++) {
        double total = base[i] + sum[i], bound = fma(fabs(total), 3.4e-16, unit_B * unit_A);
        low[i] = __float_as_int((float)(total - bound));
        high[i] = __float_as_int(fmaxf((float)(total + bound), -LARGE)); /* of a NaN and a number, fmaxf takes the number */
        delta[i] = (float)sum[i];
    }
}

#endif
