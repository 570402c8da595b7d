/* DoRA and its like: W + dW in float64, the lengths of its rows or columns, and what comes of rescaling it by them, rounded once. What
 * is added, multiplied and rounded, and in which order, is defined in wide.py and in the rescale.py beside it; here it is done with the
 * same bits, a strip of ROWS rows at a time, which stay in the processor's cache while their lengths are summed.
 */
#define SUMS 64 /* of squares, side by side: of the columns j, j + 64, j + 128 ... */

/* What one update does to what there is: value <- keep * value + factor * (value + dW), a factor for each row or each column. */
struct stage {
  const double *packed_B;    /* (rows / ROWS, r, ROWS), missing rows zero; null where B is W @ inner */
  const void *packed_A;      /* (columns / BLOCK, r, BLOCK) float where `narrow`, or double; missing columns zero */
  const double *magnitude;   /* (rows) the lengths that rows are brought to, or null */
  const double *row_factors; /* (rows) the factors of rows, or null */
  const double *factors;     /* (columns, zeros up to a whole block) the factors of columns, or null; with none of these they are 1 */
  const double *inner;       /* (columns, r up to a whole block), or null */
  int64_t r, narrow, unrounded, from_sum; /* whether float64 holds the products of W and `inner` */
  double scaling, strength, eps, keep;
};

/* Some rows of one weight. */
struct rescaling {
  struct rows all;             /* those from a multiple of ROWS on */
  const struct stage *stages;  /* of the whole matrix */
  int64_t count;               /* stages */
  double *room;                /* for ROWS rows of whole blocks, three times, and of the largest r up to a whole block; finite numbers */
  double *column_squares;      /* (columns, up to a whole block) null, or where the squares of the first stage's sums are added */
};
const int lorafold_stage_bytes = sizeof(struct stage), lorafold_rescaling_bytes = sizeof(struct rescaling);

/* W @ inner of ROWS rows, packed: the products are added one after another. */
INLINE void multiplied(const struct stage *stage, const double *base, int64_t columns, int64_t whole, double *packed_B, int unrounded) {
  int64_t r = (stage->r + BLOCK - 1) / BLOCK * BLOCK;
  for (int64_t k = 0; k < r; k += BLOCK) {
    doubles sums[ROWS][VECTORS];
    UNROLL for (int row = 0; row < ROWS; row++) UNROLL for (int v = 0; v < VECTORS; v++) sums[row][v] = (doubles){0};
    const double *place = stage->inner + k;
    for (int64_t j = 0; j < columns; j++, place += r) {
      doubles inner[VECTORS];
      UNROLL for (int v = 0; v < VECTORS; v++) inner[v] = at(place + v * DOUBLES);
      UNROLL for (int row = 0; row < ROWS; row++) UNROLL for (int v = 0; v < VECTORS; v++) {
        if (unrounded) sums[row][v] += inner[v] * base[row * whole + j];
        else sums[row][v] += separate(inner[v] * base[row * whole + j]);
      }
    }
    for (int64_t lane = 0; lane < BLOCK && k + lane < stage->r; lane++)
      for (int row = 0; row < ROWS; row++) packed_B[(k + lane) * ROWS + row] = sums[row][lane / DOUBLES][lane % DOUBLES];
  }
}

/* The sums of ROWS rows, value + dW, of which B is packed from `b_start` on, and the squares of those of base + dW. */
INLINE void summed(const struct stage *stage, const double *b_start, const double *base, const double *value, double *total,
                   int64_t whole, double (*squares)[SUMS], int narrow, int first) {
  doubles scaling = (doubles){0} + stage->scaling;
  for (int64_t j = 0; j < whole; j += BLOCK) {
    doubles sums[ROWS][VECTORS];
    UNROLL for (int row = 0; row < ROWS; row++) UNROLL for (int v = 0; v < VECTORS; v++) sums[row][v] = (doubles){0};
    const double *b = b_start;
    const float *narrow_a = (const float *)stage->packed_A + j * stage->r;
    const double *a = (const double *)stage->packed_A + j * stage->r;
    for (int64_t k = 0; k < stage->r; k++, a += BLOCK, narrow_a += BLOCK, b += ROWS) {
      doubles lora_A[VECTORS];
      UNROLL for (int v = 0; v < VECTORS; v++)
        lora_A[v] = narrow ? OF_DOUBLES(floats_at)(narrow_a + v * DOUBLES) : at(a + v * DOUBLES);
      UNROLL for (int row = 0; row < ROWS; row++) UNROLL for (int v = 0; v < VECTORS; v++) {
        if (narrow) sums[row][v] += lora_A[v] * b[row];
        else sums[row][v] += separate(lora_A[v] * b[row]);
      }
    }
    UNROLL for (int row = 0; row < ROWS; row++) UNROLL for (int v = 0; v < VECTORS; v++) {
      int64_t place = row * whole + j + v * DOUBLES;
      double *square = squares[row] + (j + v * DOUBLES) % SUMS;
      doubles delta = separate(sums[row][v] * scaling), w = at(base + place);
      doubles sum = w + delta, here = first ? sum : at(value + place) + delta;
      memcpy(total + place, &here, sizeof here);
      doubles squared = at(square) + separate(sum * sum);
      memcpy(square, &squared, sizeof squared);
    }
  }
}

/* The square root of the sum of SUMS squares: the first half is added to the second, and so on. */
INLINE double length(double *squares) {
  for (int half = SUMS / 2; half; half /= 2)
    for (int n = 0; n < half; n++) squares[n] += squares[n + half];
  return sqrt(squares[0]);
}

/* What the stage makes of BLOCK-whole rows: of one vector of a row. */
INLINE doubles rescaled(const struct stage *stage, double factor, int64_t j, const double *value, const double *total) {
  doubles factors = stage->factors ? at(stage->factors + j) : (doubles){0} + factor;
  doubles x = separate(at(total + j) * factors);
  return stage->keep == 0 ? x : separate(at(value + j) * stage->keep) + x;
}

/* Store row `i` of the job. */
INLINE void store_row(struct rows *job, int64_t i, const struct stage *stage, double factor, const double *base, const double *value,
                      const double *total, int dtype, int width) {
  doubles dot = {0}, square = {0};
  char *out = (char *)job->out + i * job->out_stride * width;
  for (int64_t j = 0; j < job->columns; j += DOUBLES) {
    doubles w = at(base + j), x = rescaled(stage, factor, j, value, total) + 0.0; /* a zero is +0 */
    char edge[DOUBLES * sizeof(double)];
    int whole = j + DOUBLES <= job->columns;
    void *place = whole ? out + j * width : edge;
    doubles merged, moved = x - w;
    if (width == 2 && job->stochastic) merged = stored_half(noised(x, drawn_here(job, i, j), dtype), place, dtype);
    else merged = stored(x, place, dtype);
    if (!whole) memcpy(out + j * width, edge, (job->columns - j) * width);
    dot += (merged - w) * moved;
    square += moved * moved;
  }
  for (int lane = 0; lane < DOUBLES; lane++) {
    job->dot += dot[lane];
    job->square += square[lane];
  }
}

static void rescale_strip(struct rescaling *job, int64_t i, int64_t height, int64_t whole) {
  struct rows *all = &job->all;
  double *base = job->room, *total = base + ROWS * whole, *value = total + ROWS * whole, *packed = value + ROWS * whole;
  for (int64_t row = 0; row < height; row++)
    widen_numbers(all->weight, (i + row) * all->weight_stride, base + row * whole, all->columns, all->weight_dtype);
  for (int64_t n = 0; n < job->count; n++) {
    const struct stage *stage = job->stages + n;
    const double *before = n ? value : base;
    double squares[ROWS][SUMS] = {0};
    int64_t row_of_stage = all->row + i;
    if (stage->inner) {
      if (stage->unrounded) multiplied(stage, base, all->columns, whole, packed, 1);
      else multiplied(stage, base, all->columns, whole, packed, 0);
    }
    const double *b = stage->inner ? packed : stage->packed_B + row_of_stage * stage->r;
#define OF(narrow, first) summed(stage, b, base, before, total, whole, squares, narrow, first)
    if (n == 0) stage->narrow ? OF(1, 1) : OF(0, 1);
    else stage->narrow ? OF(1, 0) : OF(0, 0);
#undef OF
    if (job->column_squares) {
      for (int64_t row = 0; row < height; row++)
        for (int64_t j = 0; j < whole; j += DOUBLES) {
          doubles x = at(total + row * whole + j), sum = at(job->column_squares + j) + separate(x * x);
          memcpy(job->column_squares + j, &sum, sizeof sum);
        }
      return;
    }
    for (int64_t row = 0; row < height; row++) {
      double factor = stage->row_factors ? stage->row_factors[row_of_stage + row] : 1;
      if (stage->magnitude) {
        factor = stage->magnitude[row_of_stage + row] / (length(squares[row]) + stage->eps);
        factor = stage->from_sum ? 1 + separate_one((factor - 1) * stage->strength) : factor * stage->strength;
      }
      const double *of_row = before + row * whole, *sums = total + row * whole, *w = base + row * whole;
      if (n + 1 < job->count) {
        for (int64_t j = 0; j < whole; j += DOUBLES) {
          doubles x = rescaled(stage, factor, j, of_row, sums);
          memcpy(value + row * whole + j, &x, sizeof x);
        }
        continue;
      }
#define OF(kind, width) \
  case kind: store_row(all, i + row, stage, factor, w, of_row, sums, kind, width); break;
      switch (all->out_dtype) { OF(of_f64, 8) OF(of_f32, 4) OF(of_f16, 2) OF(of_bf16, 2) }
#undef OF
    }
  }
}

void lorafold_rescale(struct rows *all) {
  struct rescaling *job = (struct rescaling *)all; /* of which they are the first */
  environment_t before = entered();
  int64_t whole = (all->columns + BLOCK - 1) / BLOCK * BLOCK;
  all->dot = all->square = all->undecided = 0;
  for (int64_t i = 0; i < all->rows; i += ROWS) rescale_strip(job, i, all->rows - i < ROWS ? all->rows - i : ROWS, whole);
  left(before);
}
