/* What a launch is told, the dtypes it is compiled for, and numbers on their way between memory and registers. */
#ifndef JOB_H
#define JOB_H

#include "element.h"
#include "ptx.h"

#if WIDE
#define STEPS ((R + 3) / 4) /* columns of B are taken four at a time by matrix units for doubles */
#define SLICES 1
#define PIECE 8 /* rows of one matrix unit */
typedef double B_lane, A_lane;
typedef double unit_t;
#else
#define STEPS ((R + 15) / 16) /* and 16 at a time by those for halves */
#define SLICES 3
#define PIECE 16
typedef uint4 B_lane;
typedef uint2 A_lane;
typedef float unit_t;
#endif

struct job {
    const void *weight;
    void *out;
    const void *lora_B, *lora_A;
    const double *scaling; /* of each of the r columns of B; null where there is but one */
    B_lane *cut_B;         /* [piece][slice][step][lane] */
    A_lane *cut_A;         /* [block of 8 columns][step][slice][lane] */
    unit_t *unit_B;        /* of each row: its unit; where WIDE, R + 6 roundings of its largest number */
    unit_t *unit_A;        /* of each block of 8 columns: its unit; where WIDE, its largest number */
    float *sums;           /* of each thread block ⟨W′ − W, ΔW⟩ and ⟨ΔW, ΔW⟩ */
    double one_scaling;
    i64 weight_stride, out_stride, B_stride_row, B_stride_k, A_stride_k, A_stride_column;
    int r, rows, columns, blocks; /* `blocks` of 8 columns, up to a multiple of 32 · AHEAD columns */
    int groups, across;           /* groups of 32 columns of a thread block; thread blocks side by side */
    int power;                    /* whether the one scaling is a power of two, of moderate size */
};

#if WEIGHT == 2
typedef float weight_t;
#define WEIGHT_WORDS 8
#else
typedef unsigned short weight_t;
#define WEIGHT_WORDS 4
#endif
#if TARGET == 2
typedef float target_t;
#define TARGET_WORDS 8
#else
typedef unsigned short target_t;
#define TARGET_WORDS 4
#endif
#if FACTOR == 2
typedef float factor_t;
#else
typedef unsigned short factor_t;
#endif

#define LARGE __int_as_float(0x7F800000)

template <int KIND> __device__ inline float half_widened(u32 x)
{
    return KIND == 0 ? __int_as_float(x << 16) : widened_f16(x);
}

__device__ inline float factor_at(const void *at, i64 place)
{
#if FACTOR == 2
    return ((const float *)at)[place];
#else
    return half_widened<FACTOR>(((const unsigned short *)at)[place]);
#endif
}

/* Two numbers as halves of one word, the first in the lower; rounded to nearest. */
template <int KIND> __device__ inline u32 packed(float low, float high)
{
    return KIND == 0 ? packed_bf16(low, high) : packed_f16(low, high);
}

/* Two halves with a NaN put to minus infinity. */
template <int KIND> __device__ inline u32 without_nan(u32 both)
{
    return KIND == 0 ? larger_bf16(both, 0xFF80FF80u) : larger_f16(both, 0xFC00FC00u);
}

template <int KIND> __device__ inline float element(const u32 *words, int place) /* of eight */
{
    if (KIND == 2)
        return __int_as_float(words[place]);
    return half_widened<KIND>(place & 1 ? words[place / 2] >> 16 : words[place / 2] & 0xFFFF);
}

/* Eight elements of a row, as words; those beyond the columns are zero. */
template <int WORDS, class T> __device__ inline void taken(u32 *words, const T *row, int column, int columns, bool there)
{
#if ALIGNED
#pragma unroll
    for (int i = 0; i < WORDS; i += 4) {
        uint4 four = make_uint4(0, 0, 0, 0);
        if (there && column < columns)
            four = read_once((const uint4 *)(row + column) + i / 4);
        words[i] = four.x, words[i + 1] = four.y, words[i + 2] = four.z, words[i + 3] = four.w;
    }
#else
#pragma unroll
    for (int i = 0; i < 8; i++) {
        T x = there && column + i < columns ? row[column + i] : (T)0;
        if (sizeof(T) == 4)
            words[i % WORDS] = __float_as_int((float)x);
        else if (i & 1)
            words[i / 2 % WORDS] |= (u32)x << 16;
        else
            words[i / 2 % WORDS] = (u32)x;
    }
#endif
}

template <int WORDS, class T> __device__ inline void given(const u32 *words, T *row, int column, int columns, bool there)
{
#if ALIGNED
    if (there && column < columns)
#pragma unroll
        for (int i = 0; i < WORDS; i += 4)
            written((uint4 *)(row + column) + i / 4, words[i], words[i + 1], words[i + 2], words[i + 3]);
#else
#pragma unroll
    for (int i = 0; i < 8; i++)
        if (there && column + i < columns) {
            if (sizeof(T) == 4)
                ((u32 *)row)[column + i] = words[i % WORDS];
            else
                row[column + i] = (T)(i & 1 ? words[i / 2 % WORDS] >> 16 : words[i / 2 % WORDS]);
        }
#endif
}

__device__ inline double given_B(const job &of, int row, int k)
{
    return k < of.r && row < of.rows ? factor_at(of.lora_B, row * of.B_stride_row + k * of.B_stride_k) : 0;
}

__device__ inline float given_A(const job &of, int k, int column)
{
    return k < of.r && column < of.columns ? factor_at(of.lora_A, k * of.A_stride_k + column * of.A_stride_column) : 0;
}

__device__ inline double scaling_of(const job &of, int k)
{
    return of.scaling ? of.scaling[k < of.r ? k : 0] : of.one_scaling;
}

/* The column that lane `n` of the eight of a matrix unit stands for in block `block`, eight columns of each group of 32. */
__device__ inline int column_of(int block, int n)
{
    return block / 4 * 32 + (n >> 1) * 8 + block % 4 * 2 + (n & 1);
}

#endif
