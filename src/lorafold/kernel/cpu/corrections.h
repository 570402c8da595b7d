/* What separates a weight from a number computed again, packed and applied; see kernel/undo/bits.py for how it lies.
 *
 * The parts of four quarters of the elements share a byte each. First all codes are made or applied, as if none were a 3, and then the few
 * that are one are looked for.
 */
struct corrections {
  const void *base;  /* (n) floats of `width` bytes; of what is packed */
  void *guess;       /* (n) of the same; where corrections are applied, they become the base */
  int64_t n, width, quarter;
  uint8_t *codes;    /* (quarter) */
  int8_t *near;      /* room for near_count, */
  void *far;         /* and for far_count of `width` bytes; */
  int64_t near_count, far_count; /* packing: out; applying: how many there are, and out: how many were taken */
  int64_t moved;     /* packing, out: whether any element differs */
};
const int lorafold_corrections_bytes = sizeof(struct corrections);

#define THREES(word, part) ((word) >> 2 * (part) & (word) >> (2 * (part) + 1) & 0x0101010101010101)

#define CORRECTIONS(bits) \
  typedef uint##bits##_t word##bits; \
  INLINE word##bits ordered##bits(word##bits x) { /* and back */ \
    return ((word##bits)((int##bits##_t)x >> (bits - 1)) & (word##bits)INT##bits##_MAX) ^ x; \
  } \
  static void packed##bits(struct corrections *all) { \
    const word##bits *restrict base = all->base, *restrict guess = all->guess; \
    uint8_t *restrict codes = all->codes; \
    memset(codes, 0, all->quarter); \
    for (int part = 0; part < 4; part++) { \
      int64_t start = part * all->quarter, count = all->n - start < all->quarter ? all->n - start : all->quarter; \
      word##bits moved = 0; \
      for (int64_t i = 0; i < count; i++) { \
        word##bits step = ordered##bits(base[start + i]) - ordered##bits(guess[start + i]), code = step + 1; \
        codes[i] |= (uint8_t)(code < 3 ? code : 3) << 2 * part; \
        moved |= step; \
      } \
      all->moved |= moved != 0; \
      for (int64_t i = 0; i < count; i++) { \
        uint64_t word; \
        if (i % 8 == 0 && (memcpy(&word, codes + i, 8), !THREES(word, part))) { \
          i += 7; \
          continue; \
        } \
        if ((codes[i] >> 2 * part & 3) != 3) continue; \
        int##bits##_t step = (int##bits##_t)(word##bits)(ordered##bits(base[start + i]) - ordered##bits(guess[start + i])); \
        int is_far = step <= -128 || step > 127; \
        if (is_far) ((word##bits *)all->far)[all->far_count++] = (word##bits)step; \
        all->near[all->near_count++] = is_far ? -128 : (int8_t)step; \
      } \
    } \
  } \
  static void applied##bits(struct corrections *all) { \
    word##bits *restrict guess = all->guess; \
    const uint8_t *restrict codes = all->codes; \
    int64_t near_count = 0, far_count = 0; \
    for (int part = 0; part < 4; part++) { \
      int64_t start = part * all->quarter, count = all->n - start < all->quarter ? all->n - start : all->quarter; \
      for (int64_t i = 0; i < count; i++) \
        guess[start + i] = ordered##bits(ordered##bits(guess[start + i]) + (codes[i] >> 2 * part & 3) - 1); \
      for (int64_t i = 0; i < count; i++) { \
        uint64_t word; \
        if (i % 8 == 0 && (memcpy(&word, codes + i, 8), !THREES(word, part))) { \
          i += 7; \
          continue; \
        } \
        if ((codes[i] >> 2 * part & 3) != 3) continue; \
        if (near_count++ >= all->near_count) continue; \
        word##bits step = (word##bits)(int##bits##_t)all->near[near_count - 1]; \
        if (all->near[near_count - 1] == -128) { \
          if (far_count++ >= all->far_count) continue; \
          step = ((const word##bits *)all->far)[far_count - 1]; \
        } \
        guess[start + i] = ordered##bits(ordered##bits(guess[start + i]) - 2 + step); \
      } \
    } \
    all->near_count = near_count; \
    all->far_count = far_count; \
  }
CORRECTIONS(16)
CORRECTIONS(32)
CORRECTIONS(64)

void lorafold_pack(struct corrections *all) {
  all->near_count = all->far_count = all->moved = 0;
  if (all->width == 2) packed16(all);
  else if (all->width == 4) packed32(all);
  else packed64(all);
}

void lorafold_apply(struct corrections *all) {
  if (all->width == 2) applied16(all);
  else if (all->width == 4) applied32(all);
  else applied64(all);
}
