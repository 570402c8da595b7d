/* One kind of job; included once for each, with FROM and TO (bf16, f16, f32), WIDE (float, double) and LANES set. */
#define KIND(name) JOIN(JOIN(JOIN(name, FROM), JOIN(_, TO)), JOIN(_, WIDE)) /* as in lorafold_bf16_bf16_float */
#define from_t JOIN(FROM, _stored)
#define to_t JOIN(TO, _stored)
#define froms JOIN(FROM, _vector)(LANES)
#define tos JOIN(TO, _vector)(LANES)
#define OF_LANES(name) JOIN(JOIN(name, x), LANES)
#define wides OF_LANES(WIDE)
#define floats OF_LANES(float)
#define WIDEN(bits) __builtin_convertvector(OF_LANES(JOIN(widen_, FROM))(bits), wides)
#define WIDEN_MERGED(bits) __builtin_convertvector(OF_LANES(JOIN(widen_, TO))(bits), wides)
#define ROUND_FLOATS OF_LANES(JOIN(round_, TO))
#define ROUND(wide) ROUND_FLOATS(__builtin_convertvector(wide, floats))

/* Settle the lanes of one row in which both ends differ, and those of NaN: in float64, each alone. What that leaves open is listed.
 * `merged` becomes the row's result; (i, j): the place of its first lane.
 */
COLD void KIND(settle_)(struct job *job, int64_t i, int64_t j, froms weight, tos differ, tos *merged) {
  wides base = WIDEN(weight);
  const double *b = job->scaled_B + i * job->r;
  int live = ((const WIDE *)job->row_errors)[i] != 0;
  floats lower = {0}, upper = {0};
  for (int lane = 0; lane < LANES; lane++) {
    if (!differ[lane] || !isfinite(base[lane])) continue;
    double w = base[lane], sum, size;
    products(b, job->lora_A + (j + lane) * job->lora_A_strides[1], job->lora_A_strides[0], job->r, &sum, &size);
    double error = (fabs(w) + size) * job->unit + (live && ((const WIDE *)job->column_errors)[j + lane] != 0 ? job->tiny : 0);
    lower[lane] = JOIN(TO, _from)(w + sum - error);
    upper[lane] = JOIN(TO, _from)(w + sum + error);
  }
  tos low = ROUND_FLOATS(lower), high = ROUND_FLOATS(upper), same = ROUND(base);
  for (int lane = 0; lane < LANES; lane++) {
    if (isnan(base[lane])) (*merged)[lane] = JOIN(TO, _nan);
    else if (differ[lane] && isinf(base[lane])) (*merged)[lane] = same[lane];
    else if (differ[lane]) {
      (*merged)[lane] = low[lane];
      if (low[lane] == high[lane]) continue;
      ((from_t *)job->open_weight)[job->opened] = weight[lane];
      job->open[job->opened++] = (int32_t)(i * job->columns + j + lane);
    }
  }
}

/* ROWS rows of one vector: sum, round both ends, settle where they differ, store; add to the inner products. */
INLINE void KIND(block_)(struct job *job, int64_t i, int64_t j, const from_t *from, int64_t from_stride, to_t *to, int64_t to_stride,
                         wides *dot, wides *square) {
  const WIDE *a = (const WIDE *)job->packed_A + j * job->r, *b = (const WIDE *)job->packed_B + i * job->r;
  const WIDE *row_errors = (const WIDE *)job->row_errors + i;
  wides delta[ROWS], base[ROWS], column_errors, sum_of_bases = {0};
  froms weight[ROWS];
  tos merged[ROWS], differ[ROWS], any_differs = {0};

  UNROLL for (int row = 0; row < ROWS; row++) delta[row] = (wides){0};
  for (int64_t k = 0; k < job->r; k += SPAN) {
    int64_t span = job->r - k < SPAN ? job->r - k : SPAN;
    wides part[ROWS];
    UNROLL for (int row = 0; row < ROWS; row++) part[row] = (wides){0};
    for (int64_t l = 0; l < span; l++, a += LANES, b += ROWS) {
      wides lora_A;
      memcpy(&lora_A, a, sizeof lora_A);
      UNROLL for (int row = 0; row < ROWS; row++) part[row] += lora_A * b[row];
    }
    UNROLL for (int row = 0; row < ROWS; row++) delta[row] += part[row];
  }

  memcpy(&column_errors, (const WIDE *)job->column_errors + j, sizeof column_errors);
  UNROLL for (int row = 0; row < ROWS; row++) {
    memcpy(&weight[row], from + row * from_stride, sizeof weight[row]);
    base[row] = WIDEN(weight[row]);
    wides total = base[row] + delta[row];
    wides margin = OF_LANES(JOIN(absolute_, WIDE))(total) * (WIDE)job->relative + column_errors * row_errors[row];
    merged[row] = ROUND(total - margin);
    differ[row] = merged[row] ^ ROUND(total + margin);
    any_differs |= differ[row];
    sum_of_bases += base[row]; /* NaN where any of them is */
  }
  tos nan = __builtin_convertvector(sum_of_bases != sum_of_bases, tos);
  if (any(any_differs | nan))
    for (int row = 0; row < ROWS; row++)
      if (any(differ[row] | nan)) KIND(settle_)(job, i + row, j, weight[row], differ[row], &merged[row]);

  UNROLL for (int row = 0; row < ROWS; row++) {
    memcpy(to + row * to_stride, &merged[row], sizeof merged[row]);
    *dot += (WIDEN_MERGED(merged[row]) - base[row]) * delta[row];
    *square += delta[row] * delta[row];
  }
}

/* All blocks: in panels of columns, so that a panel's part of A is fetched once for all rows. */
void KIND(lorafold_)(struct job *job) {
  int64_t panel = PANEL_BYTES / ((int64_t)sizeof(wides) * job->r);
  panel = LANES * (panel < 1 ? 1 : panel > 32 ? 32 : panel);
  job->opened = 0;
  job->dot = job->square = 0;
  for (int64_t start = 0; start < job->columns; start += panel) {
    int64_t end = start + panel < job->columns ? start + panel : job->columns;
    for (int64_t i = 0; i < job->rows; i += ROWS) {
      wides dot = {0}, square = {0};
      for (int64_t j = start; j < end; j += LANES) {
        const from_t *from = (const from_t *)job->weight + i * job->weight_stride + j;
        to_t *to = (to_t *)job->out + i * job->out_stride + j;
        int64_t height = job->rows - i, width = end - j;
        if (height >= ROWS && width >= LANES) {
          KIND(block_)(job, i, j, from, job->weight_stride, to, job->out_stride, &dot, &square);
        } else { /* at the edge: a whole block with zeros where there is no weight */
          from_t weight[ROWS * LANES] = {0};
          to_t merged[ROWS * LANES];
          height = height < ROWS ? height : ROWS;
          width = width < LANES ? width : LANES;
          for (int row = 0; row < height; row++) memcpy(weight + row * LANES, from + row * job->weight_stride, width * sizeof *from);
          KIND(block_)(job, i, j, weight, LANES, merged, LANES, &dot, &square);
          for (int row = 0; row < height; row++) memcpy(to + row * job->out_stride, merged + row * LANES, width * sizeof *to);
        }
      }
      for (int lane = 0; lane < LANES; lane++) {
        job->dot += dot[lane];
        job->square += square[lane];
      }
    }
  }
}

#undef KIND
#undef from_t
#undef to_t
#undef froms
#undef tos
#undef wides
#undef floats
#undef OF_LANES
#undef WIDEN
#undef WIDEN_MERGED
#undef ROUND_FLOATS
#undef ROUND
#undef FROM
#undef TO
