/* Vectors of LANES doubles added and multiplied without loss: as errorfree.h does with single numbers.
 *
 * A product that a sum is made of must not be fused with it, or the sum's own loss would be taken for another.
 */
#define doubles JOIN(doublex, LANES)
#define u64s JOIN(u64x, LANES)
#if defined(__x86_64__)
#define ROUNDED(x) __asm__("" : "+v"(x))
#elif defined(__aarch64__)
#define ROUNDED(x) __asm__("" : "+w"(x))
#else
#define ROUNDED(x) __asm__("" : "+m"(x))
#endif

INLINE doubles JOIN(two_sums_x, LANES)(doubles a, doubles b, doubles *lost) {
  doubles sum = a + b, shadow = sum - a;
  *lost = (a - (sum - shadow)) + (b - shadow);
  return sum;
}

/* fl(a b), and what it loses, where nothing underflows. */
INLINE doubles JOIN(two_product_x, LANES)(doubles a, doubles b, doubles *lost) {
  doubles product = a * b;
  ROUNDED(product);
#if defined(__AVX512F__) && LANES == 8
  *lost = (doubles)_mm512_fmsub_pd((__m512d)a, (__m512d)b, (__m512d)product);
#elif defined(__FMA__) && LANES == 4
  *lost = (doubles)_mm256_fmsub_pd((__m256d)a, (__m256d)b, (__m256d)product);
#elif defined(__aarch64__)
  for (int lane = 0; lane < LANES; lane++) (*lost)[lane] = __builtin_fma(a[lane], b[lane], -product[lane]);
#else /* by halves of 26 bits, whose products are exact (Dekker, Numerische Mathematik 18, 1971) */
  doubles a_part = a * 0x1.0000002p27, b_part = b * 0x1.0000002p27;
  ROUNDED(a_part);
  ROUNDED(b_part);
  doubles a_high = a_part - (a_part - a), b_high = b_part - (b_part - b);
  doubles a_low = a - a_high, b_low = b - b_high;
  *lost = ((a_high * b_high - product) + a_high * b_low + a_low * b_high) + a_low * b_low;
#endif
  return product;
}

/* The lanes in which a and b differ, or one is NaN. */
#if defined(__AVX512F__) && LANES == 8
INLINE uint32_t apart_x8(doubles a, doubles b) { return _mm512_cmp_pd_mask((__m512d)a, (__m512d)b, _CMP_NEQ_UQ); }
#elif defined(__AVX2__) && LANES == 4
INLINE uint32_t apart_x4(doubles a, doubles b) { return _mm256_movemask_pd(_mm256_cmp_pd((__m256d)a, (__m256d)b, _CMP_NEQ_UQ)); }
#else
INLINE uint32_t JOIN(apart_x, LANES)(doubles a, doubles b) {
  uint32_t lanes = 0;
  for (int lane = 0; lane < LANES; lane++) lanes |= (uint32_t)!(a[lane] == b[lane]) << lane;
  return lanes;
}
#endif

#undef doubles
#undef u64s
#undef ROUNDED
