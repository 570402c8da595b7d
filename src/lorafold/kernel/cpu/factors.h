/* One side of the factors of a merge made ready: read once, widened, scaled, its norms taken, and laid out in the blocks that jobs
 * read. Small work beside the merge itself, but with a tensor operation for each step it would take a fifth of its time.
 */

/* B, whose entries are the rows of ΔW, or A, whose entries are the columns. */
struct side {
  const void *matrix;      /* number k of entry i lies `i * entry_stride + k * stride` numbers further on */
  int64_t dtype;           /* of_f64 and so on */
  int64_t entry_stride, stride, entries, r;
  const double *scaling;   /* (r) */
  int64_t block, number;   /* entries of a block; bytes of a packed number, of float or double */
  void *packed;            /* out: (entries / block, r, block) scaling * number, zeros up to a whole block */
  const double *weights;   /* (r) */
  double *norms;           /* out: (entries) sqrt of the sum of weight * (scaling * number)^2, or a trifle more */
  double *scaled;          /* out, or null: (entries, r) scaling * number */
};
const int lorafold_side_bytes = sizeof(struct side);

enum { of_f64, of_f32, of_f16, of_bf16 };

INLINE double number_at(const void *matrix, int64_t place, int dtype) {
  if (dtype == of_f64) return ((const double *)matrix)[place];
  if (dtype == of_f32) return ((const float *)matrix)[place];
  uint16_t half = ((const uint16_t *)matrix)[place];
  if (dtype == of_f16) return JOIN(widen_f16x, FLOATS)((JOIN(u16x, FLOATS)){half})[0];
  uint32_t bits = (uint32_t)half << 16;
  float number;
  memcpy(&number, &bits, sizeof number);
  return number;
}

/* Number k of entry `first + i`, the i-th of a block. */
INLINE void put(const struct side *side, int64_t first, int64_t i, int64_t k, int dtype, int doubles, double *squares) {
  double scaled = number_at(side->matrix, (first + i) * side->entry_stride + k * side->stride, dtype) * side->scaling[k];
  int64_t place = first * side->r + k * side->block + i;
  if (doubles) ((double *)side->packed)[place] = scaled;
  else ((float *)side->packed)[place] = (float)scaled;
  if (side->scaled) side->scaled[(first + i) * side->r + k] = scaled;
  squares[i] += side->weights[k] * (scaled * scaled);
}

INLINE void side_of(const struct side *side, int dtype, int doubles) {
  const struct side all = *side; /* which no store can change */
  for (int64_t first = 0; first < all.entries; first += all.block) {
    int64_t count = all.entries - first < all.block ? all.entries - first : all.block;
    size_t bytes = all.block * all.r * all.number;
    if (count < all.block) memset((char *)all.packed + first * all.r * all.number, 0, bytes);
    double squares[VECTORS * FLOATS] = {0}; /* no block is of more */
    if (all.stride == 1)
      for (int64_t i = 0; i < count; i++)
        for (int64_t k = 0; k < all.r; k++) put(&all, first, i, k, dtype, doubles, squares);
    else
      for (int64_t k = 0; k < all.r; k++)
        for (int64_t i = 0; i < count; i++) put(&all, first, i, k, dtype, doubles, squares);
    for (int64_t i = 0; i < count; i++) all.norms[first + i] = sqrt(squares[i]) * (1 + 0x1p-40); /* for its own rounding */
  }
}

void lorafold_side(struct side *side) {
  environment_t before = entered();
  int doubles = side->number == sizeof(double);
#define OF(kind) case kind: if (doubles) side_of(side, kind, 1); else side_of(side, kind, 0); break;
  switch (side->dtype) { OF(of_f64) OF(of_f32) OF(of_f16) OF(of_bf16) }
#undef OF
  left(before);
}
