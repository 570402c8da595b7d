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

/* |size| with the sign of x; `size` is not negative. */
#if defined(__AVX512F__) && LANES == 16 /* GCC would take two operations */
INLINE floats with_sign_floatx16(floats size, floats x) {
  return (floats)_mm512_ternarylogic_epi32((__m512i)size, (__m512i)x, _mm512_set1_epi32(INT32_MIN), 0xf8);
}
#else
INLINE floats JOIN(with_sign_floatx, LANES)(floats size, floats x) { return (floats)((u32s)size | ((u32s)x & 0x80000000)); }
#endif
INLINE doubles JOIN(with_sign_doublex, LANES)(doubles size, doubles x) {
  return (doubles)((u64s)size | ((u64s)x & 0x8000000000000000));
}

INLINE doubles JOIN(absolute_doublex, LANES)(doubles x) { return (doubles)((u64s)x & 0x7fffffffffffffff); }

/* LANES numbers in memory as doubles. */
INLINE doubles JOIN(doubles_atx, LANES)(const double *memory) {
  doubles x;
  memcpy(&x, memory, sizeof x);
  return x;
}
INLINE doubles JOIN(floats_atx, LANES)(const float *memory) {
#if defined(__AVX512F__) && LANES == 8 /* GCC would go by way of two halves */
  return (doubles)_mm512_cvtps_pd(_mm256_loadu_ps(memory));
#else
  floats x;
  memcpy(&x, memory, sizeof x);
  return __builtin_convertvector(x, doubles);
#endif
}

/* The lanes in which any bit is set, a bit each; those that are NaN; those of `among` in which |x| is `limit` or more and no tie of floats
 * lies within 2^14 last bits of x. */
#if defined(__AVX512F__) && LANES == 16
INLINE uint32_t lanes_x16(u32s x) { return _mm512_test_epi32_mask((__m512i)x, (__m512i)x); }
INLINE uint32_t nan_lanes_floatx16(floats x) { return _mm512_cmp_ps_mask((__m512)x, (__m512)x, _CMP_UNORD_Q); }
INLINE int any_f16x16(u16s x) { return !_mm256_testz_si256((__m256i)x, (__m256i)x); }
#elif defined(__AVX512F__) && LANES == 8
INLINE uint32_t lanes_x8(u32s x) { return _mm256_test_epi32_mask((__m256i)x, (__m256i)x); }
INLINE uint32_t nan_lanes_doublex8(doubles x) { return _mm512_cmp_pd_mask((__m512d)x, (__m512d)x, _CMP_UNORD_Q); }
INLINE uint32_t off_ties_x8(doubles x, doubles limit, uint32_t among) {
  among = _mm512_mask_cmp_pd_mask(among, (__m512d)absolute_doublex8(x), (__m512d)limit, _CMP_GE_OQ);
  return _mm512_mask_test_epi64_mask(among, (__m512i)((u64s)x + NO_TIE), _mm512_set1_epi64(LOST_BITS));
}
INLINE int any_f16x8(u16s x) { return !_mm_testz_si128((__m128i)x, (__m128i)x); }
#elif defined(__AVX2__) && LANES == 8
INLINE uint32_t lanes_x8(u32s x) { return _mm256_movemask_ps((__m256)(x != 0)); }
INLINE uint32_t nan_lanes_floatx8(floats x) { return _mm256_movemask_ps((__m256)(x != x)); }
INLINE int any_f16x8(u16s x) { return !_mm_testz_si128((__m128i)x, (__m128i)x); }
#elif defined(__AVX2__) && LANES == 4
INLINE uint32_t lanes_x4(u32s x) { return _mm_movemask_ps((__m128)(x != 0)); }
INLINE uint32_t nan_lanes_doublex4(doubles x) { return _mm256_movemask_pd((__m256d)(x != x)); }
INLINE uint32_t off_ties_x4(doubles x, doubles limit, uint32_t among) {
  return among & _mm256_movemask_pd((__m256d)((absolute_doublex4(x) >= limit) & ((((u64s)x + NO_TIE) & LOST_BITS) != 0)));
}
INLINE int any_f16x4(u16s x) { return lanes_x4(__builtin_convertvector(x, u32s)) != 0; }
#else
INLINE uint32_t JOIN(lanes_x, LANES)(u32s x) {
  uint32_t lanes = 0;
  for (int lane = 0; lane < LANES; lane++) lanes |= (uint32_t)(x[lane] != 0) << lane;
  return lanes;
}
INLINE uint32_t JOIN(nan_lanes_floatx, LANES)(floats x) { return JOIN(lanes_x, LANES)((u32s)(x != x)); }
INLINE uint32_t JOIN(nan_lanes_doublex, LANES)(doubles x) { return JOIN(lanes_x, LANES)(__builtin_convertvector(x != x, u32s)); }
INLINE uint32_t JOIN(off_ties_x, LANES)(doubles x, doubles limit, uint32_t among) {
  u64s off = (u64s)(JOIN(absolute_doublex, LANES)(x) >= limit) & (u64s)((((u64s)x + NO_TIE) & LOST_BITS) != 0);
  return among & JOIN(lanes_x, LANES)(__builtin_convertvector(off, u32s));
}
INLINE int JOIN(any_f16x, LANES)(u16s x) { return JOIN(lanes_x, LANES)(__builtin_convertvector(x, u32s)) != 0; }
#endif
INLINE int JOIN(any_f32x, LANES)(u32s x) { return JOIN(lanes_x, LANES)(x) != 0; }
INLINE int JOIN(any_f64x, LANES)(u32s x) { return JOIN(lanes_x, LANES)(x) != 0; }
INLINE int JOIN(any_bf16x, LANES)(u32s x) { return JOIN(lanes_x, LANES)(x) != 0; }

#if defined(__AVX512F__) && LANES == 16 /* GCC would go by way of two halves */
INLINE u32s zero_extended_x16(u16s bits) { return (u32s)_mm512_cvtepu16_epi32((__m256i)bits); }
INLINE u16s truncated_x16(u32s bits) { return (u16s)_mm512_cvtepi32_epi16((__m512i)bits); }
#else
INLINE u32s JOIN(zero_extended_x, LANES)(u16s bits) { return __builtin_convertvector(bits, u32s); }
INLINE u16s JOIN(truncated_x, LANES)(u32s bits) { return __builtin_convertvector(bits, u16s); }
#endif

INLINE floats JOIN(widen_bf16x, LANES)(u16s bits) { return (floats)(JOIN(zero_extended_x, LANES)(bits) << 16); }

INLINE floats JOIN(widen_f32x, LANES)(u32s bits) { return (floats)bits; }

INLINE u32s JOIN(round_f32x, LANES)(floats x) { return (u32s)x; }

INLINE doubles JOIN(widen_f64x, LANES)(u64s bits) { return (doubles)bits; }

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

/* As round_, and the numbers themselves as floats. */
INLINE u16s JOIN(rounded_bf16x, LANES)(floats x, floats *merged) {
  u32s bits = (u32s)x;
  bits += 0x7fff + ((bits >> 16) & 1);
  *merged = (floats)(bits & 0xffff0000);
  return JOIN(truncated_x, LANES)(bits >> 16);
}
INLINE u16s JOIN(round_bf16x, LANES)(floats x) { return JOIN(rounded_bf16x, LANES)(x, &(floats){0}); }

INLINE u16s JOIN(rounded_f16x, LANES)(floats x, floats *merged) {
  u16s stored = JOIN(round_f16x, LANES)(x);
  *merged = JOIN(widen_f16x, LANES)(stored);
  return stored;
}

INLINE u32s JOIN(rounded_f32x, LANES)(floats x, floats *merged) {
  *merged = x;
  return (u32s)x;
}

INLINE u64s JOIN(rounded_f64x, LANES)(doubles x, doubles *merged) {
  *merged = x;
  return (u64s)x;
}

/* What all numbers from `outer` to `inner`, which is the nearer to zero, round to, as bits and as floats; something is set in the lanes
 * of the result where that is not one number. Of bfloat16 the ties at the ends of a step are left out, so that ends may have been
 * rounded to float before. */
INLINE u32s JOIN(ends_bf16x, LANES)(floats outer, floats inner, u16s *stored, floats *merged) {
  u32s bits = (u32s)outer + 0x8000;
  *merged = (floats)(bits & 0xffff0000);
  *stored = JOIN(truncated_x, LANES)(bits >> 16);
  return (bits ^ ((u32s)inner + 0x7fff)) & 0xffff0000;
}

INLINE u16s JOIN(ends_f16x, LANES)(floats outer, floats inner, u16s *stored, floats *merged) {
  *stored = JOIN(rounded_f16x, LANES)(outer, merged);
  return *stored ^ JOIN(round_f16x, LANES)(inner);
}

INLINE u32s JOIN(ends_f32x, LANES)(floats outer, floats inner, u32s *stored, floats *merged) {
  *stored = JOIN(rounded_f32x, LANES)(outer, merged);
  return *stored ^ (u32s)inner;
}

#undef floats
#undef doubles
#undef u64s
#undef u16s
#undef u32s
