/* Vectors of LANES numbers, and the conversions between stored numbers and floats; included once for each number of lanes.
 *
 * Rounding is to nearest, ties to even. What it makes of NaN does not matter: those places are looked at one by one.
 */
#define floats JOIN(floatx, LANES)
#define doubles JOIN(doublex, LANES)
#define u64s JOIN(u64x, LANES)
#define u16s JOIN(u16x, LANES)
#define u32s JOIN(u32x, LANES)
typedef VECTOR(float, LANES) floats;
typedef VECTOR(uint16_t, LANES) u16s;
typedef VECTOR(uint32_t, LANES) u32s;
typedef VECTOR(double, LANES) doubles;
typedef VECTOR(uint64_t, LANES) u64s;

INLINE floats JOIN(absolute_floatx, LANES)(floats x) { return (floats)((u32s)x & 0x7fffffff); }
INLINE doubles JOIN(absolute_doublex, LANES)(doubles x) { return (doubles)((u64s)x & 0x7fffffffffffffff); }

/* The power of two at or below |x|; 0 for a subnormal number, infinity for NaN. */
INLINE floats JOIN(power_floatx, LANES)(floats x) { return (floats)((u32s)x & 0x7f800000); }
INLINE doubles JOIN(power_doublex, LANES)(doubles x) { return (doubles)((u64s)x & 0x7ff0000000000000); }

INLINE floats JOIN(larger_floatx, LANES)(floats x, floats y) {
#if defined(__AVX512F__) && LANES == 16
  return (floats)_mm512_max_ps((__m512)x, (__m512)y);
#endif
  u32s first = (u32s)(x > y);
  return (floats)(((u32s)x & first) | ((u32s)y & ~first));
}
INLINE doubles JOIN(larger_doublex, LANES)(doubles x, doubles y) {
#if defined(__AVX512F__) && LANES == 8
  return (doubles)_mm512_max_pd((__m512d)x, (__m512d)y);
#endif
  u64s first = (u64s)(x > y);
  return (doubles)(((u64s)x & first) | ((u64s)y & ~first));
}

/* The lanes whose sign is set, a bit each. */
INLINE uint32_t JOIN(signs_floatx, LANES)(u32s x) {
#if defined(__AVX512DQ__) && LANES == 16
  return _mm512_movepi32_mask((__m512i)x);
#elif defined(__AVX2__) && LANES == 8
  return _mm256_movemask_ps((__m256)x);
#else
  uint32_t mask = 0;
  for (int lane = 0; lane < LANES; lane++) mask |= x[lane] >> 31 << lane;
  return mask;
#endif
}
INLINE uint32_t JOIN(signs_doublex, LANES)(u64s x) {
#if defined(__AVX512DQ__) && LANES == 8
  return _mm512_movepi64_mask((__m512i)x);
#elif defined(__AVX2__) && LANES == 4
  return _mm256_movemask_pd((__m256d)x);
#else
  uint32_t mask = 0;
  for (int lane = 0; lane < LANES; lane++) mask |= (uint32_t)(x[lane] >> 63) << lane;
  return mask;
#endif
}

#if defined(__AVX512F__) && LANES == 16 /* GCC would go by way of two halves */
INLINE u32s zero_extended_x16(u16s bits) { return (u32s)_mm512_cvtepu16_epi32((__m256i)bits); }
INLINE u16s truncated_x16(u32s bits) { return (u16s)_mm512_cvtepi32_epi16((__m512i)bits); }
#else
INLINE u32s JOIN(zero_extended_x, LANES)(u16s bits) { return __builtin_convertvector(bits, u32s); }
INLINE u16s JOIN(truncated_x, LANES)(u32s bits) { return __builtin_convertvector(bits, u16s); }
#endif

INLINE floats JOIN(widen_bf16x, LANES)(u16s bits) { return (floats)(JOIN(zero_extended_x, LANES)(bits) << 16); }

INLINE u16s JOIN(round_bf16x, LANES)(floats x) {
  u32s bits = (u32s)x;
  return JOIN(truncated_x, LANES)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

INLINE floats JOIN(widen_f32x, LANES)(u32s bits) { return (floats)bits; }

INLINE u32s JOIN(round_f32x, LANES)(floats x) { return (u32s)x; }

/* As round_, and the number itself as a float. */
INLINE floats JOIN(rounded_bf16x, LANES)(floats x, u16s *stored) {
  u32s bits = (u32s)x;
  bits += 0x7fff + ((bits >> 16) & 1);
  *stored = JOIN(truncated_x, LANES)(bits >> 16);
  return (floats)(bits & 0xffff0000);
}

INLINE floats JOIN(rounded_f32x, LANES)(floats x, u32s *stored) {
  *stored = (u32s)x;
  return x;
}

#if defined(__F16C__) && LANES == 4
INLINE floats widen_f16x4(u16s bits) { return (floats)_mm_cvtph_ps(_mm_cvtsi64_si128((int64_t)bits)); }
INLINE u16s round_f16x4(floats x) { return (u16s)_mm_cvtsi128_si64(_mm_cvtps_ph((__m128)x, _MM_FROUND_TO_NEAREST_INT)); }
#elif defined(__F16C__) && LANES == 8
INLINE floats widen_f16x8(u16s bits) { return (floats)_mm256_cvtph_ps((__m128i)bits); }
INLINE u16s round_f16x8(floats x) { return (u16s)_mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT); }
#elif defined(__AVX512F__) && LANES == 16
INLINE floats widen_f16x16(u16s bits) { return (floats)_mm512_cvtph_ps((__m256i)bits); }
INLINE u16s round_f16x16(floats x) { return (u16s)_mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT); }
#else
INLINE floats JOIN(widen_f16x, LANES)(u16s bits) {
  u32s wide = __builtin_convertvector(bits, u32s);
  u32s sign = (wide & 0x8000) << 16, rest = wide & 0x7fff;
  floats finite = (floats)(rest << 13) * 0x1p112f; /* the exponents' biases differ by 112; subnormals come out right */
  u32s special = (u32s)(rest >= 0x7c00);
  return (floats)(sign | ((u32s)finite & ~special) | (((rest << 13) | 0x7f800000) & special));
}

INLINE u16s JOIN(round_f16x, LANES)(floats x) {
  u32s bits = (u32s)x, sign = (bits >> 16) & 0x8000, size = bits & 0x7fffffff;
  u32s normal = (size - (112u << 23) + 0xfff + ((size >> 13) & 1)) >> 13;
  u32s tiny = (u32s)((floats)size + 0.5f) - 0x3f000000; /* the sum's last bit weighs 2^-24, as a subnormal's does */
  u32s is_tiny = (u32s)(size < 0x38800000), is_large = (u32s)(size >= 0x477ff000);
  u32s rounded = (normal & ~is_tiny) | (tiny & is_tiny);
  return __builtin_convertvector(sign | (rounded & ~is_large) | (0x7c00 & is_large), u16s);
}
#endif

INLINE floats JOIN(rounded_f16x, LANES)(floats x, u16s *stored) {
  *stored = JOIN(round_f16x, LANES)(x);
  return JOIN(widen_f16x, LANES)(*stored);
}

#undef floats
#undef doubles
#undef u64s
#undef u16s
#undef u32s
