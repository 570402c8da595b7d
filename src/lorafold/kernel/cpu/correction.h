/* What separates a base from a guess at it, both of one float dtype: see bits.py, which does the same with torch and says how it is
 * kept. Elements are worked on by so many, a quarter of the tile after the other, since a byte of codes has one of each quarter.
 */
struct correction {
  void *base;        /* (n): read by pack, written by unpack */
  const void *guess; /* (n) */
  int64_t n, quarter, infinity; /* numbers; bytes of codes; the bits of infinity: what has all of them is not finite, and counts as 0 */
  uint8_t *codes;    /* (quarter), padding included */
  int8_t *near;      /* room for n, or those that there are */
  void *far;         /* the same, of the integers' type */
  int64_t near_count, far_count; /* how many pack found */
  int64_t by_column, by_row;     /* the checksum of the base */
};

int lorafold_correction_bytes = sizeof(struct correction);

enum { TOGETHER = 64, WORDS = 256 };

/* The sums of `count` bytes read as rows of WORDS integers, the last filled up with zeros; see checksum in bits.py. */
static void sum_words(const void *bytes, int64_t count, int64_t *by_column, int64_t *by_row) {
  uint64_t columns[WORDS] = {0}, rows = 0;
  for (int64_t row = 0; row * WORDS * 8 < count; row++) {
    uint64_t words[WORDS], sum = 0;
    int64_t left = count - row * WORDS * 8, size = left < WORDS * 8 ? left : WORDS * 8;
    if (size < WORDS * 8) memset(words, 0, sizeof words);
    memcpy(words, (const char *)bytes + row * WORDS * 8, (size_t)size);
    for (int i = 0; i < WORDS; i++) columns[i] += words[i], sum += words[i];
    rows += sum * (2 * (uint64_t)row + 1);
  }
  uint64_t total = 0;
  for (int i = 0; i < WORDS; i++) total += columns[i] * (2 * (uint64_t)i + 1);
  *by_column = (int64_t)total, *by_row = (int64_t)rows;
}

/* Which of the TOGETHER codes are 3. */
INLINE uint64_t threes(const uint8_t *code) {
#if defined(__AVX512BW__)
  return _mm512_cmpeq_epi8_mask(_mm512_loadu_si512(code), _mm512_set1_epi8(3));
#elif defined(__AVX2__)
  __m256i three = _mm256_set1_epi8(3), low = _mm256_loadu_si256((const void *)code), high = _mm256_loadu_si256((const void *)(code + 32));
  uint64_t first = (uint32_t)_mm256_movemask_epi8(_mm256_cmpeq_epi8(low, three));
  return first | (uint64_t)(uint32_t)_mm256_movemask_epi8(_mm256_cmpeq_epi8(high, three)) << 32;
#else
  uint64_t found = 0;
  for (int i = 0; i < TOGETHER; i++) found |= (uint64_t)(code[i] == 3) << i;
  return found;
#endif
}

#define CORRECTION(name, integer, unsigned_, largest)                                                                              \
  INLINE integer order_##name(integer bits) { return (integer)(bits ^ (bits >> (8 * sizeof(integer) - 1) & largest)); }            \
  INLINE integer guess_##name(integer bits, integer infinity) {                                                                    \
    return (bits & infinity) == infinity ? 0 : order_##name(bits);                                                                 \
  }                                                                                                                                \
  struct lists_##name {                                                                                                            \
    int8_t *near;                                                                                                                  \
    integer *far;                                                                                                                  \
  };                                                                                                                               \
                                                                                                                                   \
  /* `some` elements, and padding up to `all`: constants where they are TOGETHER. */                                               \
  INLINE void pack_some_##name(const integer *base, const integer *guess, integer infinity, uint8_t *codes, int part,              \
                               int64_t some, int64_t all, struct lists_##name *lists) {                                            \
    integer off[TOGETHER];                                                                                                         \
    uint8_t code[TOGETHER];                                                                                                        \
    if (some < TOGETHER) memset(off, 0, sizeof off);                                                                               \
    for (int64_t j = 0; j < some; j++)                                                                                             \
      off[j] = (integer)((unsigned_)order_##name(base[j]) - (unsigned_)guess_##name(guess[j], infinity));                          \
    for (int j = 0; j < TOGETHER; j++) {                                                                                           \
      unsigned_ up = (unsigned_)((unsigned_)off[j] + 1);                                                                           \
      code[j] = (uint8_t)(up < 3 ? up : 3);                                                                                        \
    }                                                                                                                              \
    for (int64_t j = some; j < all; j++) code[j] = 0;                                                                              \
    for (int64_t j = 0; j < all; j++) codes[j] |= (uint8_t)(code[j] << 2 * part);                                                  \
    for (uint64_t left = threes(code); left; left &= left - 1) {                                                                   \
      integer one = off[__builtin_ctzll(left)];                                                                                    \
      int apart = one <= -128 || one > 127;                                                                                        \
      *lists->near++ = apart ? -128 : (int8_t)one;                                                                                 \
      if (apart) *lists->far++ = one;                                                                                              \
    }                                                                                                                              \
  }                                                                                                                                \
                                                                                                                                   \
  INLINE void unpack_some_##name(integer *base, const integer *guess, integer infinity, const uint8_t *codes, int part,            \
                                 int64_t some, struct lists_##name *lists) {                                                       \
    integer off[TOGETHER];                                                                                                         \
    uint8_t code[TOGETHER];                                                                                                        \
    if (some < TOGETHER) memset(code, 0, sizeof code);                                                                             \
    for (int64_t j = 0; j < some; j++) code[j] = (uint8_t)(codes[j] >> 2 * part & 3), off[j] = (integer)(code[j] - 1);             \
    for (uint64_t left = threes(code); left; left &= left - 1) {                                                                   \
      int j = __builtin_ctzll(left);                                                                                               \
      off[j] = *lists->near++;                                                                                                     \
      if (off[j] == -128) off[j] = *lists->far++;                                                                                  \
    }                                                                                                                              \
    for (int64_t j = 0; j < some; j++)                                                                                             \
      base[j] = order_##name((integer)((unsigned_)guess_##name(guess[j], infinity) + (unsigned_)off[j]));                          \
  }                                                                                                                                \
                                                                                                                                   \
  void lorafold_pack_##name(struct correction *c) {                                                                                \
    struct lists_##name lists = {c->near, c->far};                                                                                 \
    memset(c->codes, 0, (size_t)c->quarter);                                                                                       \
    for (int part = 0; part < 4; part++) {                                                                                         \
      int64_t first = part * c->quarter, left = c->n - first, count = left < 0 ? 0 : left < c->quarter ? left : c->quarter, i = 0; \
      const integer *base = (const integer *)c->base + first, *guess = (const integer *)c->guess + first;                          \
      integer infinity = (integer)c->infinity;                                                                                     \
      for (; i + TOGETHER <= count; i += TOGETHER)                                                                                 \
        pack_some_##name(base + i, guess + i, infinity, c->codes + i, part, TOGETHER, TOGETHER, &lists);                           \
      if (i < count) {                                                                                                             \
        int64_t all = c->quarter - i < TOGETHER ? c->quarter - i : TOGETHER;                                                       \
        pack_some_##name(base + i, guess + i, infinity, c->codes + i, part, count - i, all, &lists);                               \
      }                                                                                                                            \
    }                                                                                                                              \
    c->near_count = lists.near - c->near, c->far_count = lists.far - (integer *)c->far;                                            \
    sum_words(c->base, c->n * (int64_t)sizeof(integer), &c->by_column, &c->by_row);                                                \
  }                                                                                                                                \
                                                                                                                                   \
  void lorafold_unpack_##name(struct correction *c) {                                                                              \
    struct lists_##name lists = {c->near, c->far};                                                                                 \
    for (int part = 0; part < 4; part++) {                                                                                         \
      int64_t first = part * c->quarter, left = c->n - first, count = left < 0 ? 0 : left < c->quarter ? left : c->quarter, i = 0; \
      integer *base = (integer *)c->base + first, infinity = (integer)c->infinity;                                                 \
      const integer *guess = (const integer *)c->guess + first;                                                                    \
      for (; i + TOGETHER <= count; i += TOGETHER)                                                                                 \
        unpack_some_##name(base + i, guess + i, infinity, c->codes + i, part, TOGETHER, &lists);                                   \
      if (i < count) unpack_some_##name(base + i, guess + i, infinity, c->codes + i, part, count - i, &lists);                     \
    }                                                                                                                              \
    sum_words(c->base, c->n * (int64_t)sizeof(integer), &c->by_column, &c->by_row);                                                \
  }

CORRECTION(2, int16_t, uint16_t, 0x7fff)
CORRECTION(4, int32_t, uint32_t, 0x7fffffff)
CORRECTION(8, int64_t, uint64_t, 0x7fffffffffffffff)
