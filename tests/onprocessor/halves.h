/* Halves, in arithmetic of integers: rounded to nearest, ties to even; a NaN is 0x7FFF, as GPUs write it. */

/* The bits of |x| / 2^(exponent of the lowest bit of a half), rounded: `x` is not a NaN. */
static u32 narrowed(float number, int mantissa, int smallest, u32 infinite)
{
    u32 x = (u32)__float_as_int(number), sign = x >> 31 << 15, size = x & 0x7FFFFFFF;
    if (size > 0x7F800000)
        return 0x7FFF;
    if (size == 0x7F800000)
        return sign | infinite;
    int field = (int)(size >> 23), exponent = (field ? field : 1) - 127, shift = 23 - mantissa;
    u64 whole = (size & 0x7FFFFF) | (field ? 0x800000 : 0);
    if (exponent < smallest) {
        shift += smallest - exponent;
        exponent = smallest;
        if (shift > 40)
            return sign;
    }
    u64 rest = whole & ((1ull << shift) - 1), half = 1ull << (shift - 1);
    whole = (whole >> shift) + (rest > half || (rest == half && (whole >> shift & 1)));
    u64 magnitude = ((u64)(exponent - smallest) << mantissa) + whole; /* the hidden bit and a carry count the exponent up */
    return sign | (magnitude > infinite ? infinite : (u32)magnitude);
}

static inline u32 packed_bf16(float low, float high)
{
    return narrowed(high, 7, -126, 0x7F80) << 16 | narrowed(low, 7, -126, 0x7F80);
}

static inline u32 packed_f16(float low, float high)
{
    return narrowed(high, 10, -14, 0x7C00) << 16 | narrowed(low, 10, -14, 0x7C00);
}

static inline float widened_f16(u32 x)
{
    u32 sign = x >> 15 << 31, field = x >> 10 & 0x1F, mantissa = x & 0x3FF;
    if (field == 0x1F)
        return __int_as_float((int)(sign | 0x7F800000 | mantissa << 13));
    if (field)
        return __int_as_float((int)(sign | (field + 112) << 23 | mantissa << 13));
    return (sign ? -1.0f : 1.0f) * (float)mantissa * 0x1p-24f;
}

static u32 larger(u32 x, u32 y, u32 infinite)
{
    bool nan_x = (x & 0x7FFF) > infinite, nan_y = (y & 0x7FFF) > infinite;
    if (nan_x || nan_y)
        return nan_x && nan_y ? 0x7FFF : nan_x ? y : x;
    int order_x = x & 0x8000 ? -(int)(x & 0x7FFF) - 1 : (int)x, order_y = y & 0x8000 ? -(int)(y & 0x7FFF) - 1 : (int)y;
    return order_x > order_y ? x : y;
}

static inline u32 larger_bf16(u32 x, u32 y)
{
    return larger(x >> 16, y >> 16, 0x7F80) << 16 | larger(x & 0xFFFF, y & 0xFFFF, 0x7F80);
}

static inline u32 larger_f16(u32 x, u32 y)
{
    return larger(x >> 16, y >> 16, 0x7C00) << 16 | larger(x & 0xFFFF, y & 0xFFFF, 0x7C00);
}
