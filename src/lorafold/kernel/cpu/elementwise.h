/* LoHa and LoKr: dW is a product, element by element, of two matrices P and Q that are products themselves, or stored as they are; of
 * LoKr each of them is repeated. What is exact, and the bound on the error of a sum in float64, are told in kernel/elementwise.py.
 *
 * A strip of ROWS rows goes through in panels of columns: first dW is summed in float64, for which of LoHa both products are made in
 * registers, and of LoKr those rows of P and Q that the strip needs before. Then W is added and both ends of the sum are rounded; where
 * they differ the element is summed without rounding error.
 */
#define PANEL 512 /* columns, whole blocks */

/* P or Q. */
struct product_side {
  const void *matrix;      /* B, or the matrix itself: its number (i, k) lies `i * row_stride + k * stride` numbers further on */
  const void *packed_A;    /* (columns / BLOCK, r, BLOCK) float where `narrow`, or double, missing columns zero; null: none but the matrix */
  int64_t dtype, row_stride, stride, narrow, r, rows, columns;
};

/* One of the products that are added up. */
struct product_term {
  struct product_side one, other; /* without `other.matrix`, P alone */
  int64_t kronecker;              /* each number of P is multiplied with all of Q; else with the one in its place */
  double scaling;
};

/* Some rows of one weight. */
struct products {
  struct rows all;
  const struct product_term *terms;
  int64_t count;
  const double *row_errors, *column_errors; /* of the whole matrix, the columns with zeros up to a whole block; null for `fast` */
  double largest_column_error; /* or more */
  double *room; /* for ROWS · PANEL, and for each term ROWS times the columns of P and Q up to whole blocks, or their r */
};
const int lorafold_product_term_bytes = sizeof(struct product_term), lorafold_products_bytes = sizeof(struct products);

INLINE int64_t whole_blocks(int64_t columns) { return (columns + BLOCK - 1) / BLOCK * BLOCK; }

INLINE double number_of(const struct product_side *side, int64_t i, int64_t k) {
  return number_at(side->matrix, i * side->row_stride + k * side->stride, (int)side->dtype);
}

INLINE double number_of_A(const struct product_side *side, int64_t k, int64_t j) {
  int64_t place = j / BLOCK * BLOCK * side->r + k * BLOCK + j % BLOCK;
  return side->narrow ? ((const float *)side->packed_A)[place] : ((const double *)side->packed_A)[place];
}

/* ROWS rows of B from `row` on, packed. */
INLINE void pack_rows(const struct product_side *side, int64_t row, double *packed) {
  for (int64_t k = 0; k < side->r; k++)
    for (int64_t i = 0; i < ROWS; i++) packed[k * ROWS + i] = row + i < side->rows ? number_of(side, row + i, k) : 0;
}

/* A block of ROWS rows of P or Q. */
INLINE void block_of(const struct product_side *side, const double *b, int64_t j, doubles sums[ROWS][VECTORS], int narrow) {
  const float *narrow_a = (const float *)side->packed_A + j * side->r;
  const double *a = (const double *)side->packed_A + j * side->r;
  UNROLL for (int row = 0; row < ROWS; row++) UNROLL for (int v = 0; v < VECTORS; v++) sums[row][v] = (doubles){0};
  for (int64_t k = 0; k < side->r; k++, a += BLOCK, narrow_a += BLOCK, b += ROWS) {
    doubles lora_A[VECTORS];
    UNROLL for (int v = 0; v < VECTORS; v++) lora_A[v] = narrow ? OF_DOUBLES(floats_at)(narrow_a + v * DOUBLES) : at(a + v * DOUBLES);
    UNROLL for (int row = 0; row < ROWS; row++) UNROLL for (int v = 0; v < VECTORS; v++) sums[row][v] += lora_A[v] * b[row];
  }
}

/* Add the columns from `start` to `end` of a strip of P ∘ Q, or of P alone, to `delta`. */
INLINE void add_blocks(const struct product_term *term, const double *b, const double *other_b, int64_t start, int64_t end, double *delta,
                       int narrow, int other_narrow, int alone) {
  doubles scaling = (doubles){0} + term->scaling;
  for (int64_t j = start; j < end; j += BLOCK) {
    doubles P[ROWS][VECTORS], Q[ROWS][VECTORS];
    block_of(&term->one, b, j, P, narrow);
    if (!alone) {
      doubles kept[ROWS][VECTORS]; /* so that there are registers for Q */
      memcpy(kept, P, sizeof kept);
      block_of(&term->other, other_b, j, Q, other_narrow);
      memcpy(P, kept, sizeof kept);
    }
    UNROLL for (int row = 0; row < ROWS; row++) UNROLL for (int v = 0; v < VECTORS; v++) {
      double *place = delta + row * PANEL + (j - start) + v * DOUBLES;
      doubles product = P[row][v] * scaling;
      product = at(place) + (alone ? product : product * Q[row][v]);
      memcpy(place, &product, sizeof product);
    }
  }
}

static void add_hadamard(const struct product_term *term, const double *b, const double *other_b, int64_t start, int64_t end, double *delta) {
  int narrow = term->one.narrow != 0, other = term->other.narrow != 0;
  if (!term->other.matrix) narrow ? add_blocks(term, b, b, start, end, delta, 1, 1, 1) : add_blocks(term, b, b, start, end, delta, 0, 0, 1);
  else if (narrow && other) add_blocks(term, b, other_b, start, end, delta, 1, 1, 0);
  else if (narrow) add_blocks(term, b, other_b, start, end, delta, 1, 0, 0);
  else if (other) add_blocks(term, b, other_b, start, end, delta, 0, 1, 0);
  else add_blocks(term, b, other_b, start, end, delta, 0, 0, 0);
}

/* Row `i` of P or Q. */
static void side_row(const struct product_side *side, int64_t i, double *out) {
  if (!side->packed_A) {
    if (side->stride == 1) widen_numbers(side->matrix, i * side->row_stride, out, side->columns, side->dtype);
    else for (int64_t j = 0; j < side->columns; j++) out[j] = number_of(side, i, j);
    return;
  }
  for (int64_t j = 0; j < side->columns; j += BLOCK) {
    doubles sums[VECTORS] = {0};
    for (int64_t k = 0; k < side->r; k++) {
      double b = number_of(side, i, k);
      int64_t place = j * side->r + k * BLOCK;
      UNROLL for (int v = 0; v < VECTORS; v++)
        sums[v] += (side->narrow ? OF_DOUBLES(floats_at)((const float *)side->packed_A + place + v * DOUBLES)
                                 : at((const double *)side->packed_A + place + v * DOUBLES)) * b;
    }
    memcpy(out + j, sums, sizeof sums);
  }
}

/* Rows of P and Q for a strip of P ⊗ Q from `row` on. */
static void side_rows(const struct product_term *term, int64_t row, int64_t height, double *P, double *Q) {
  int64_t width_P = whole_blocks(term->one.columns), width_Q = whole_blocks(term->other.columns);
  for (int64_t i = 0; i < height; i++) {
    int64_t of_P = (row + i) / term->other.rows;
    if (i && of_P == (row + i - 1) / term->other.rows) memcpy(P + i * width_P, P + (i - 1) * width_P, width_P * sizeof *P);
    else side_row(&term->one, of_P, P + i * width_P);
    side_row(&term->other, (row + i) % term->other.rows, Q + i * width_Q);
  }
}

/* Add the columns from `start` to `end` of a row of P ⊗ Q to `delta`. */
INLINE void add_kronecker(const struct product_term *term, const double *P, const double *Q, int64_t start, int64_t end, double *delta) {
  int64_t size = term->other.columns, of_P = start / size, first = start % size;
  for (int64_t j = start; j < end; of_P++, first = 0) {
    double factor = P[of_P] * term->scaling;
    int64_t count = size - first < end - j ? size - first : end - j, k = 0;
    double *to = delta + (j - start);
    for (; k + DOUBLES <= count; k += DOUBLES) {
      doubles sum = at(to + k) + at(Q + first + k) * factor;
      memcpy(to + k, &sum, sizeof sum);
    }
    for (; k < count; k++) to[k] += Q[first + k] * factor;
    j += count;
  }
}

/* The number (i, j) of P or Q, without rounding error; whether that could be done. */
static int expand(const struct product_side *side, int64_t i, int64_t j, struct expansion *sum) {
  sum->count = 0;
  if (!side->packed_A) return add(sum, number_of(side, i, j));
  for (int64_t k = 0; k < side->r; k++)
    if (!add_product(sum, number_of(side, i, k), number_of_A(side, k, j))) return 0;
  return 1;
}

/* The element (i, j) of the whole matrix, of which the weight is `w`, without rounding error; whether that could be done. */
COLD int element(const struct products *job, int64_t i, int64_t j, double w, struct expansion *sum) {
  *sum = (struct expansion){{w}, w != 0};
  for (int64_t n = 0; n < job->count; n++) {
    const struct product_term *term = job->terms + n;
    struct expansion P, Q = {{1}, 1};
    int64_t rows = term->kronecker ? term->other.rows : 1, columns = term->kronecker ? term->other.columns : 1;
    if (!expand(&term->one, i / rows, j / columns, &P)) return 0;
    if (term->other.matrix && !expand(&term->other, term->kronecker ? i % rows : i, term->kronecker ? j % columns : j, &Q)) return 0;
    for (int p = 0; p < P.count; p++)
      for (int q = 0; q < Q.count; q++)
        if (!add_products(sum, P.parts[p], Q.parts[q], term->scaling)) return 0;
  }
  return 1;
}

/* The undecided lanes of a vector that begins at (i, j) of the job, whose weights are `base`: stored in `out` as they are. */
COLD void settle_products(struct products *job, int64_t i, int64_t j, uint32_t undecided, doubles base, char *out, int dtype, int width) {
  for (; undecided; undecided &= undecided - 1) {
    int lane = __builtin_ctz(undecided);
    struct expansion sum;
    char stored_there[DOUBLES * sizeof(double)];
    if (!element(job, job->all.row + i, j + lane, base[lane], &sum)) {
      job->all.undecided++;
      continue;
    }
    double x = width == 8 ? nearest_total(&sum) : odd_total(&sum);
    if (!isfinite(x)) job->all.undecided++;
    u32s drawn = drawn_here(&job->all, i, j);
    if (width == 2 && job->all.stochastic) stored_half(noised((doubles){0} + x, (u32s){0} + drawn[lane], dtype), stored_there, dtype);
    else stored((doubles){0} + x, stored_there, dtype);
    memcpy(out + lane * width, stored_there, width);
  }
}

/* The lanes of `total` whose rounding is that of the real sum, which is nearer than 2^-26 of it where it is `limit` or more: no tie lies
 * within two steps of a float. Of smaller numbers than the least normal one nothing is said. For floats see tile.h. */
INLINE uint32_t sure_lanes(doubles total, doubles limit, int dtype) {
  if (dtype == of_f32) return OF_DOUBLES(off_ties_)(total, limit, (1u << DOUBLES) - 1);
  u32s bits = (u32s)__builtin_convertvector(total, floats);
  u32s near = dtype == of_bf16 ? (u32s)(((bits + 0x8002) & 0xffff) <= 4) : (u32s)(((bits + 0x1002) & 0x1fff) <= 4);
  return at_least(total, limit) & ~OF_DOUBLES(lanes_)(near);
}

/* A vector that begins at (i, j) of the job: both ends of its sums rounded, and where they differ the real sums; stored, and as it is then. */
static __attribute__((noinline)) doubles ends_stored(struct products *job, int64_t i, int64_t j, doubles base, doubles total, double row_error, char *to, int dtype,
                         int width) {
  doubles bound = at(job->column_errors + j) * row_error + OF_DOUBLES(absolute_double)(total) * 0x1p-51;
  doubles low = total - bound, high = total + bound, least, merged;
  char other[DOUBLES * sizeof(double)];
  if (width == 2 && job->all.stochastic) {
    u32s drawn = drawn_here(&job->all, i, j);
    least = stored_half(noised(low, drawn, dtype), other, dtype);
    merged = stored_half(noised(high, drawn, dtype), to, dtype);
  } else {
    least = stored(low, other, dtype);
    merged = stored(high, to, dtype);
  }
  uint32_t undecided = differing(least, merged);
  if (undecided) {
    double again[DOUBLES];
    settle_products(job, i, j, undecided, base, to, dtype, width);
    widen_numbers(to, 0, again, DOUBLES, dtype);
    merged = at(again);
  }
  return merged;
}

/* Columns from `start` to `end` of row `i` of the job: W and dW are added, rounded and stored. */
INLINE void finish_row(struct products *job, int64_t i, int64_t start, int64_t end, const double *delta, int dtype, int width, int exact) {
  struct rows *all = &job->all;
  char *out = (char *)all->out + i * all->out_stride * width;
  double wide[PANEL], row_error = exact ? job->row_errors[all->row + i] : 0;
  double least = row_error * job->largest_column_error * (dtype == of_f32 ? 0x1p40 : 0x1p26);
  double smallest = dtype == of_f16 ? 0x1p-14 : 0x1p-125;
  doubles limit = (doubles){0} + (least < smallest ? smallest : least), dot = {0}, square = {0};
  int drawn_for = width == 2 && all->stochastic;
  widen_numbers(all->weight, i * all->weight_stride + start, wide, end - start, all->weight_dtype);
  for (int64_t j = end - start; j % DOUBLES; j++) wide[j] = 0;
  for (int64_t j = start; j < end; j += DOUBLES) {
    int whole = j + DOUBLES <= all->columns;
    char edge[DOUBLES * sizeof(double)];
    char *to = whole ? out + j * width : edge;
    doubles base = at(wide + (j - start)), here = at(delta + (j - start)), total = base + here + 0.0, merged; /* a sum of zero is +0 */
    if (!exact && drawn_for) merged = stored_half(noised(total, drawn_here(all, i, j), dtype), to, dtype);
    else if (!exact) merged = stored(total, to, dtype);
    else if (__builtin_expect(drawn_for || sure_lanes(total, limit, dtype) != (1u << DOUBLES) - 1, 0))
      merged = ends_stored(job, i, j, base, total, row_error, to, dtype, width);
    else if (width == 2) merged = stored_half(__builtin_convertvector(total, floats), to, dtype); /* no tie is near */
    else merged = stored(total, to, dtype);
    if (!whole) memcpy(out + j * width, edge, (all->columns - j) * width);
    dot += (merged - base) * here;
    square += here * here;
  }
  for (int lane = 0; lane < DOUBLES; lane++) {
    all->dot += dot[lane];
    all->square += square[lane];
  }
}

static void products_strip(struct products *job, int64_t i, int64_t height) {
  struct rows *all = &job->all;
  double *delta = job->room, *room = delta + ROWS * PANEL;
  for (int64_t n = 0; n < job->count; n++) {
    const struct product_term *term = job->terms + n;
    if (term->kronecker) {
      double *Q = room + ROWS * whole_blocks(term->one.columns);
      side_rows(term, all->row + i, height, room, Q);
      room = Q + ROWS * whole_blocks(term->other.columns);
    } else {
      pack_rows(&term->one, all->row + i, room);
      room += ROWS * term->one.r;
      if (term->other.matrix) {
        pack_rows(&term->other, all->row + i, room);
        room += ROWS * term->other.r;
      }
    }
  }
  for (int64_t start = 0; start < all->columns; start += PANEL) {
    int64_t end = start + PANEL < all->columns ? start + PANEL : all->columns;
    memset(delta, 0, ROWS * PANEL * sizeof *delta);
    room = delta + ROWS * PANEL;
    for (int64_t n = 0; n < job->count; n++) {
      const struct product_term *term = job->terms + n;
      if (term->kronecker) {
        int64_t width_P = whole_blocks(term->one.columns), width_Q = whole_blocks(term->other.columns);
        double *Q = room + ROWS * width_P;
        for (int64_t row = 0; row < height; row++)
          add_kronecker(term, room + row * width_P, Q + row * width_Q, start, end, delta + row * PANEL);
        room = Q + ROWS * width_Q;
      } else {
        double *other = room + ROWS * term->one.r;
        add_hadamard(term, room, other, start, end, delta);
        room = other + (term->other.matrix ? ROWS * term->other.r : 0);
      }
    }
    for (int64_t row = 0; row < height; row++) {
#define OF(kind, width) \
  case kind: \
    if (job->row_errors) finish_row(job, i + row, start, end, delta + row * PANEL, kind, width, 1); \
    else finish_row(job, i + row, start, end, delta + row * PANEL, kind, width, 0); \
    break;
      switch (all->out_dtype) { OF(of_f32, 4) OF(of_f16, 2) OF(of_bf16, 2) }
#undef OF
    }
  }
}

void lorafold_products(struct rows *all) {
  struct products *job = (struct products *)all; /* of which they are the first */
  environment_t before = entered();
  all->dot = all->square = all->undecided = 0;
  for (int64_t i = 0; i < all->rows; i += ROWS) products_strip(job, i, all->rows - i < ROWS ? all->rows - i : ROWS);
  left(before);
}
