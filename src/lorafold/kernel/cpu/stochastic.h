/* Stochastic rounding of LANES floats at once, see rounding.py; included once for each number of lanes.
 *
 * An element draws a random number of 23 bits, h, from its index; it goes to the neighbour beyond, away from zero, where the share of a
 * step that it lies past the one nearer zero is more than (2 h + 1) / 2^24. For a number drawn that is a monotone function of the
 * element, so that `exact` decides here as it does to nearest: the ends of a sum that become the same number decide it.
 *
 * The share has as many bits as the rounding drops, 16 or 13, but below the smallest normal float16. Being more than (2 h + 1) / 2^24 is
 * being more than the first 16 or 13 bits of h; and so it is to add what is left of a step beyond those, and drop the bits.
 */
#define floats JOIN(floatx, LANES)
#define u32s JOIN(u32x, LANES)
#define i32s JOIN(i32x, LANES)
#define u64s JOIN(every_other_u64x, LANES)
#define BROADCAST(x) ((u64s){0} + (uint64_t)(x))
typedef VECTOR(int32_t, LANES) i32s;
typedef VECTOR(uint64_t, LANES / 2) u64s; /* every other element */

/* As drawn_at, of the elements first, first + 2, and so on; in the upper halves. */
INLINE u64s JOIN(hashed_x, LANES)(uint64_t first, uint64_t key) {
  u64s step;
  for (int lane = 0; lane < LANES / 2; lane++) step[lane] = 2 * lane * GOLDEN;
  u64s z = BROADCAST((first + 1) * GOLDEN + key) + step;
  z = (z ^ (z >> 30)) * BROADCAST(MIX_1);
  return (z ^ (z >> 27)) * BROADCAST(MIX_2);
}

/* What the elements from `first` on draw; h is its upper 23 bits. */
INLINE u32s JOIN(drawn_x, LANES)(uint64_t first, uint64_t key) {
  u64s even = JOIN(hashed_x, LANES)(first, key), odd = JOIN(hashed_x, LANES)(first + 1, key);
#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ == __ORDER_BIG_ENDIAN__
  return (u32s)((even & ~(uint64_t)0xffffffff) | (odd >> 32));
#else
  return (u32s)((even >> 32) | (odd & ~(uint64_t)0xffffffff));
#endif
}

/* Each x rounded as it has drawn, as a float that bfloat16, or float16, holds. The last step before infinity, where what rounds to a
 * finite number to nearest must stay finite, is left to that rounding. */
INLINE floats JOIN(noised_bf16x, LANES)(floats x, u32s drawn) {
  u32s bits = (u32s)x, last = (u32s)((bits & 0x7fffffff) >= 0x7f7f0000);
  u32s rounded = (bits + (0xffff - (drawn >> 16))) & 0xffff0000;
  return (floats)((bits & last) | (rounded & ~last));
}

INLINE floats JOIN(noised_f16x, LANES)(floats x, u32s drawn) {
  u32s bits = (u32s)x, size = bits & 0x7fffffff;
  u32s last = (u32s)(size >= 0x477fe000), tiny = (u32s)(size < 0x38800000);
  u32s rounded = (bits + (0x1fff - (drawn >> 19))) & 0xffffe000;
  /* The subnormal numbers are multiples of 2^-24. */
  floats steps = (floats)(size & tiny) * 0x1p24f;
  floats limit = __builtin_convertvector((i32s)(drawn >> 9 << 1 | 1), floats) * 0x1p-24f;
  i32s whole = __builtin_convertvector(steps, i32s);
  whole -= (i32s)(steps - __builtin_convertvector(whole, floats) > limit);
  u32s small = (u32s)(__builtin_convertvector(whole, floats) * 0x1p-24f) | (bits & 0x80000000);
  return (floats)((bits & last) | (small & tiny) | (rounded & ~(last | tiny)));
}

#undef floats
#undef u32s
#undef i32s
#undef u64s
#undef BROADCAST
