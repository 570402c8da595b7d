/* One element of W + ΔW, correctly rounded: what the kernel of merge.cu does where its sums cannot tell.

   First in float64, with a bound on what that loses; where that cannot tell either, as an integer of 800 bits, which loses nothing.
   Nothing here needs a GPU: tests compile it for the processor.

   Numbers of the factors and of W are such as float32 holds, and each |scaling| is zero or lies between 2^-40 and 2^40. */
#ifndef ELEMENT_H
#define ELEMENT_H

#include "types.h"

union double_bits {
    double number;
    u64 bits;
};

/* The dtype that sums are rounded to: bits of its mantissa, its smallest exponent, and a NaN as torch writes it. */
#if TARGET == 0 /* bfloat16 */
#define MANTISSA 7
#define SMALLEST (-126)
#define INFINITE 0x7F80u
#define A_NAN 0x7FC0u
#define SIGN 0x8000u
#elif TARGET == 1 /* float16 */
#define MANTISSA 10
#define SMALLEST (-14)
#define INFINITE 0x7C00u
#define A_NAN 0x7E00u
#define SIGN 0x8000u
#else /* float32 */
#define MANTISSA 23
#define SMALLEST (-126)
#define INFINITE 0x7F800000u
#define A_NAN 0x7FC00000u
#define SIGN 0x80000000u
#endif

/* The bits of x rounded to nearest, ties to even. */
ANYWHERE u32 rounded(double x)
{
    union double_bits of = {x};
    u32 sign = of.bits >> 63 ? SIGN : 0;
    int field = (int)(of.bits >> 52 & 0x7FF);
    u64 mantissa = of.bits & ((1ull << 52) - 1);
    if (field == 0x7FF && mantissa)
        return A_NAN;
    if (field == 0)
        return sign; /* below half of the smallest number */
    int exponent = field - 1023, shift = 52 - MANTISSA;
    mantissa |= 1ull << 52;
    if (exponent < SMALLEST) {
        shift += SMALLEST - exponent;
        exponent = SMALLEST;
        if (shift > 54)
            return sign;
    }
    u64 whole = mantissa >> shift, rest = mantissa & ((1ull << shift) - 1), half = 1ull << (shift - 1);
    whole += rest > half || (rest == half && (whole & 1));
    /* the hidden bit, where there is one, and a carry count the exponent up */
    u64 magnitude = ((u64)(exponent - SMALLEST) << MANTISSA) + whole;
    return sign | (magnitude > INFINITE ? INFINITE : (u32)magnitude);
}

#define LIMBS 25
#define LOWEST (-448) /* the exponent of the lowest bit of limb 0; each limb takes 32 bits and more in between */

ANYWHERE void add_product(i64 *limbs, double x, double y)
{
    union double_bits a = {x}, b = {y};
    int place = (int)(a.bits >> 52 & 0x7FF) + (int)(b.bits >> 52 & 0x7FF) - 2150 - LOWEST;
    u64 m = (a.bits & ((1ull << 52) - 1)) | 1ull << 52, n = (b.bits & ((1ull << 52) - 1)) | 1ull << 52;
    if (x == 0 || y == 0)
        return;
    u64 low = m * n;
#ifdef __CUDACC_RTC__
    u64 high = __umul64hi(m, n);
#else
    u64 high = (u64)((unsigned __int128)m * n >> 64);
#endif
    int first = place >> 5, shift = place & 31;
    u64 words[3] = {low << shift, high << shift, 0};
    if (shift) {
        words[1] |= low >> (64 - shift);
        words[2] = high >> (64 - shift);
    }
    i64 sign = (a.bits ^ b.bits) >> 63 ? -1 : 1;
    for (int i = 0; i < 5; i++)
        limbs[first + i] += sign * (i64)(u32)(words[i >> 1] >> 32 * (i & 1));
}

/* The sum of `limbs`: the float64 nearest it on the side of zero, with an odd last bit where something is left. That rounds as the
   sum itself does (Boldo and Melquiond, IEEE Trans. Comput. 57, 2008). */
ANYWHERE double to_odd(i64 *limbs)
{
    for (int i = 0; i < LIMBS - 1; i++) {
        limbs[i + 1] += limbs[i] >> 32;
        limbs[i] &= 0xFFFFFFFFll;
    }
    u64 negative = limbs[LIMBS - 1] < 0;
    if (negative) {
        i64 carry = 1;
        for (int i = 0; i < LIMBS; i++) {
            carry += ~limbs[i] & 0xFFFFFFFFll;
            limbs[i] = carry & 0xFFFFFFFFll;
            carry >>= 32;
        }
    }
    int top = LIMBS - 1;
    while (top >= 0 && !limbs[top])
        top--;
    if (top < 0)
        return 0.0;
    u64 head = (u64)limbs[top] << 32 | (top > 0 ? (u64)limbs[top - 1] : 0);
    int zeros = 0; /* in front; below 32 */
    while (!(head << zeros >> 63))
        zeros++;
    u64 next = top > 1 ? (u64)limbs[top - 2] : 0;
    head = head << zeros | (zeros ? next >> (32 - zeros) : 0);
    u64 left = (head & 0x7FF) | (u32)(next << zeros);
    for (int i = 0; i < top - 2; i++)
        left |= (u64)limbs[i];
    int exponent = LOWEST + 32 * top + 31 - zeros;
    union double_bits of;
    of.bits = negative << 63 | (u64)(exponent + 1023) << 52 | (head >> 11 & ((1ull << 52) - 1)) | (left != 0);
    return of.number;
}

/* The bits of W + Σ_k scaling_k · B_k · A_k. `Terms` tells scaling(k), B(k) and A(k) as doubles, for k below r. */
template <class Terms> ANYWHERE u32 settled(double weight, int r, const Terms &of)
{
    double total = weight, size = weight < 0 ? -weight : weight;
#pragma unroll 4
    for (int k = 0; k < r; k++) {
        double product = of.scaling(k) * of.B(k) * of.A(k);
        total += product;
        size += product < 0 ? -product : product;
    }
    /* 2^-53 of each of R + 6 roundings; Higham, Accuracy and Stability of Numerical Algorithms, section 3.1 */
    double error = size * ((r + 6) * 1.1102230246251565e-16 * 1.001);
    if (!(size < 1e300))
        return rounded(total); /* an infinity or a NaN has no error to be careful of */
    u32 low = rounded(total - error);
    if (low == rounded(total + error))
        return low;
    i64 limbs[LIMBS] = {0};
    add_product(limbs, weight, 1.0);
    for (int k = 0; k < r; k++)
        add_product(limbs, of.B(k) * of.A(k), of.scaling(k)); /* B · A is exact: 48 bits */
    return rounded(to_odd(limbs));
}

#endif
