/* Every instruction that is asked for by name, as a function: what CUDA has no word for, or a slower one. */
#ifndef PTX_H
#define PTX_H

#include "types.h"

/* Two numbers as halves of one word, the first in the lower; rounded to nearest. */
__device__ inline u32 packed_bf16(float low, float high)
{
    u32 both;
    asm("cvt.rn.bf16x2.f32 %0, %2, %1;" : "=r"(both) : "f"(low), "f"(high));
    return both;
}

__device__ inline u32 packed_f16(float low, float high)
{
    u32 both;
    asm("cvt.rn.f16x2.f32 %0, %2, %1;" : "=r"(both) : "f"(low), "f"(high));
    return both;
}

__device__ inline float widened_f16(u32 x)
{
    float f;
    asm("{ .reg .b16 h; cvt.u16.u32 h, %1; cvt.f32.f16 %0, h; }" : "=f"(f) : "r"(x));
    return f;
}

/* The larger of two halves, twice; of a NaN and a number the number. */
__device__ inline u32 larger_bf16(u32 x, u32 y)
{
    u32 larger;
    asm("max.bf16x2 %0, %1, %2;" : "=r"(larger) : "r"(x), "r"(y));
    return larger;
}

__device__ inline u32 larger_f16(u32 x, u32 y)
{
    u32 larger;
    asm("max.f16x2 %0, %1, %2;" : "=r"(larger) : "r"(x), "r"(y));
    return larger;
}

/* What is read once, so that it need not stay in the first cache. */
__device__ inline uint4 read_once(const uint4 *from)
{
    uint4 four;
    asm volatile("ld.global.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];"
                 : "=r"(four.x), "=r"(four.y), "=r"(four.z), "=r"(four.w)
                 : "l"(from));
    return four;
}

__device__ inline void written(uint4 *to, u32 x, u32 y, u32 z, u32 w)
{
    asm volatile("st.global.v4.u32 [%0], {%1,%2,%3,%4};" ::"l"(to), "r"(x), "r"(y), "r"(z), "r"(w));
}

/* sum += B · A, 16 rows and 8 columns, over 16 columns of B. PTX ISA, "Matrix Fragments for mma.m16n8k16", says which lane has what. */
__device__ inline void multiplied_f16(float (&sum)[4], uint4 b, uint2 a)
{
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
        : "r"(b.x), "r"(b.y), "r"(b.z), "r"(b.w), "r"(a.x), "r"(a.y));
}

/* 8 rows and 8 columns, over four columns of B; "Matrix Fragments for mma.m8n8k4 with .f64 floating point type". */
__device__ inline void multiplied_f64(double (&sum)[2], double b, double a)
{
    asm("mma.sync.aligned.m8n8k4.row.col.f64.f64.f64.f64 {%0,%1}, {%2}, {%3}, {%0,%1};"
        : "+d"(sum[0]), "+d"(sum[1])
        : "d"(b), "d"(a));
}

/* On Hopper and later, `merge` is launched while `cut` is still under way, and waits for it. */
__device__ inline void wait_for_cut()
{
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

__device__ inline void let_merge_begin()
{
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;");
#endif
}

#endif
