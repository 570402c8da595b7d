/* One kind of job; included once for each, with FROM and TO (bf16, f16, f32), HOW (float, double, fast), EXACT (1, 0), WIDE (float,
 * double) and LANES set.
 */
#define KIND(name) JOIN(JOIN(JOIN(name, FROM), JOIN(_, TO)), JOIN(_, HOW)) /* as in lorafold_bf16_bf16_float */
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
#define ROUNDED(wide, stored) \
  __builtin_convertvector(OF_LANES(JOIN(rounded_, TO))(__builtin_convertvector(wide, floats), stored), wides)
#define POWER OF_LANES(JOIN(power_, WIDE))
#define ABSOLUTE OF_LANES(JOIN(absolute_, WIDE))
#define SIGNS OF_LANES(JOIN(signs_, WIDE))
#define bits_t OF_LANES(JOIN(WIDE, _bits))

#if EXACT
/* How far sums are from being open: by how much the nearest ties are farther away than the bound. Both numbers of a lane are
 * positive or zero where its rounded sum is right.
 *
 * With p the power of two below |x|, the tie on the other side of x than the rounded number, `merged`, is p * half_step -
 * |x - merged| away, which is exact. The one behind `merged` is at least p * half_step / 2 away: there the step may be half as wide.
 * `relative` covers the rounding of the sum itself, half a last bit of x, and by a quarter more the three roundings here, of numbers
 * below p * half_step each.
 */
INLINE void KIND(slack_)(WIDE relative, wides total, wides merged, wides bound, wides *ahead, wides *behind) {
  const WIDE half_step = JOIN(TO, _half_step);
  wides power = POWER(total);
#if JOIN(TO, _is_f16)
  power = OF_LANES(JOIN(larger_, WIDE))(power, (wides){0} + (WIDE)0x1p-14); /* below, all steps are the same */
#endif
  *ahead = power * (half_step - relative) - ABSOLUTE(total - merged) - bound;
  *behind = power * (half_step / 2 - relative) - bound;
}
#endif

#if EXACT
/* Do the open lanes of one row again, alone, in float64, and put them into `stored`; what that leaves open is listed. (i, j): the place of
 * the first lane.
 */
INLINE void KIND(settled_)(struct job *job, int64_t i, int64_t j, uint32_t open, froms weight, wides base, wides bound, tos *stored) {
  enum { TOGETHER = LANES < DOUBLES ? LANES : DOUBLES };
  typedef VECTOR(WIDE, TOGETHER) part;
  typedef VECTOR(double, TOGETHER) sums;
  const double *b = job->scaled_B + i * job->r;
  for (int first = 0; first < LANES; first += TOGETHER) {
    uint32_t here = open >> first & ((1u << TOGETHER) - 1);
    if (!here) continue;
    const WIDE *a = (const WIDE *)job->packed_A + j * job->r + first;
    sums sum = {0}, other = {0}; /* two that take turns, since each waits for its last addition */
    for (int64_t k = 0; k < job->r; k++, a += LANES) {
      part lora_A;
      memcpy(&lora_A, a, sizeof lora_A);
      other += __builtin_convertvector(lora_A, sums) * b[k];
      sums swap = sum;
      sum = other, other = swap;
    }
    sum += other;
    for (; here; here &= here - 1) {
      int lane = __builtin_ctz(here), at = first + lane;
      double w = base[at], error = fabs(w) * job->unit + bound[at] * job->share;
      if (isnan(w)) {
        (*stored)[at] = JOIN(TO, _nan);
        continue;
      }
      floats ends = {JOIN(TO, _from)(isinf(w) ? w : w + sum[lane] - error), JOIN(TO, _from)(isinf(w) ? w : w + sum[lane] + error)};
      tos found = ROUND_FLOATS(ends);
      (*stored)[at] = found[0];
      if (found[0] == found[1]) continue;
      ((from_t *)job->open_weight)[job->opened] = weight[at];
      job->open[job->opened++] = (int32_t)(i * job->columns + j + at);
    }
  }
}
#endif

/* Look at a block of which some sums are open or NaN, and store what becomes of them; the new value of `dot`. */
COLD void KIND(settle_)(struct job *job, int64_t i, int64_t j, const froms *weight, const wides *delta, to_t *to, int64_t to_stride,
                        wides *dot) {
  *dot = (wides){0};
  for (int row = 0; row < ROWS; row++, to += to_stride) {
    wides base = WIDEN(weight[row]), total = base + delta[row];
    tos stored;
#if EXACT
    wides bound, ahead, behind, rounded = ROUNDED(total, &stored);
    memcpy(&bound, (const WIDE *)job->column_errors + j, sizeof bound);
    bound *= ((const WIDE *)job->row_errors)[i + row];
    KIND(slack_)(job->relative, total, rounded, bound, &ahead, &behind);
    uint32_t open = SIGNS((bits_t)(ahead < 0) | (bits_t)(behind < 0) | (bits_t)(ahead != ahead));
    if (open) {
      KIND(settled_)(job, i + row, j, open, weight[row], base, bound, &stored);
      memcpy(to, &stored, sizeof stored);
    }
#else
    ROUNDED(total, &stored);
    for (uint32_t open = SIGNS((bits_t)(total != total)); open; open &= open - 1)
      stored[__builtin_ctz(open)] = JOIN(TO, _nan);
    memcpy(to, &stored, sizeof stored);
#endif
    *dot += (WIDEN_MERGED(stored) - base) * delta[row];
  }
}

/* One product more for each of ROWS rows of a vector; a and b go on to the next. */
INLINE void KIND(add_product_)(const WIDE **a, const WIDE **b, wides *sums) {
  wides lora_A;
  memcpy(&lora_A, *a, sizeof lora_A);
  UNROLL for (int row = 0; row < ROWS; row++) sums[row] += lora_A * (*b)[row];
  *a += LANES, *b += ROWS;
}

/* What is left of the r products when the first `done`, at most a span, are in `sums`. */
INLINE void KIND(add_products_)(const WIDE *a, const WIDE *b, int64_t done, int64_t r, wides *sums) {
  for (; done < r && (!EXACT || done < SPAN); done++) KIND(add_product_)(&a, &b, sums);
  while (done < r) {
    wides span[ROWS];
    UNROLL for (int row = 0; row < ROWS; row++) span[row] = (wides){0};
    for (int64_t end = done + SPAN < r ? done + SPAN : r; done < end; done++) KIND(add_product_)(&a, &b, span);
    UNROLL for (int row = 0; row < ROWS; row++) sums[row] += span[row];
  }
}

/* One row of one vector: add, round, store. `weight`: as it was, since it may have been overwritten; `sum`: NaN where any is; `signs`:
 * set where something may be open. */
INLINE void KIND(row_)(const from_t *from, to_t *to, wides delta, wides bound, WIDE relative, int measured, froms *weight, wides *sum,
                       bits_t *signs, wides *dot, wides *square) {
  memcpy(weight, from, sizeof *weight);
  wides base = WIDEN(*weight), total = base + delta;
  tos stored;
  wides merged = ROUNDED(total, &stored);
  memcpy(to, &stored, sizeof stored);
#if EXACT && JOIN(HOW, _is_double) && JOIN(TO, _is_f32)
  /* Told from the 29 bits that are lost: within 2^14 of their middle is a tie, and the bound is less where the sum is large enough. */
  bits_t beside = (((bits_t)total + (1 << 14)) & 0x1fff8000) ^ 0x10000000;
  wides size = ABSOLUTE(total) - 0x1p-125 - bound * 0x1p40;
  *signs |= (beside - 1) | (bits_t)size;
  *sum += size;
#elif EXACT
  wides ahead, behind;
  KIND(slack_)(relative, total, merged, bound, &ahead, &behind);
  *signs |= (bits_t)ahead | (bits_t)behind;
  *sum += ahead;
#else
  *sum += total;
#endif
  if (measured) {
    *dot += (merged - base) * delta;
    *square += delta * delta;
  }
}

/* ROWS rows of the vectors from column `start` on, as many as are whole: while one is rounded, the sums of the next are begun, since
 * a processor does not look far enough ahead to do it by itself. */
INLINE void KIND(strip_)(struct job *job, int64_t i, int64_t start, int64_t end, const from_t *from, int64_t from_stride, to_t *to,
                         int64_t to_stride, int measured, wides *dot, wides *square) {
  const WIDE relative = job->relative;
  const int64_t r = job->r;
  wides delta[ROWS];
  UNROLL for (int row = 0; row < ROWS; row++) delta[row] = (wides){0};
  KIND(add_products_)((const WIDE *)job->packed_A + start * r, (const WIDE *)job->packed_B + i * r, 0, r, delta);
  for (int64_t j = start; j < end; j += LANES, from += LANES, to += LANES) {
    const WIDE *a = (const WIDE *)job->packed_A + (j + LANES) * r, *b = (const WIDE *)job->packed_B + i * r;
    wides next[ROWS], sum = {0}, moved = {0};
    bits_t signs = {0};
    froms weight[ROWS];
    int more = j + LANES < end;
#if EXACT
    const WIDE *row_errors = (const WIDE *)job->row_errors + i;
    wides column_errors;
    memcpy(&column_errors, (const WIDE *)job->column_errors + j, sizeof column_errors);
#define BOUND(row) (column_errors * row_errors[row])
#else
#define BOUND(row) ((wides){0})
#endif
    UNROLL for (int row = 0; row < ROWS; row++) next[row] = (wides){0};
    if (more && r >= ROWS) {
      UNROLL for (int row = 0; row < ROWS; row++) {
        KIND(add_product_)(&a, &b, next);
        KIND(row_)(from + row * from_stride, to + row * to_stride, delta[row], BOUND(row), relative, measured, weight + row, &sum,
                   &signs, &moved, square);
      }
      KIND(add_products_)(a, b, ROWS, r, next);
    } else {
      UNROLL for (int row = 0; row < ROWS; row++)
        KIND(row_)(from + row * from_stride, to + row * to_stride, delta[row], BOUND(row), relative, measured, weight + row, &sum,
                   &signs, &moved, square);
      if (more) KIND(add_products_)(a, b, 0, r, next);
    }
#undef BOUND
    bits_t look = signs | (bits_t)(sum != sum);
    if (__builtin_expect(SIGNS(look) != 0, 0)) {
      wides deltas[ROWS], again; /* copies, so that what is copied may stay in registers */
      froms weights[ROWS];
      for (int row = 0; row < ROWS; row++) deltas[row] = delta[row], weights[row] = weight[row];
      KIND(settle_)(job, i, j, weights, deltas, to, to_stride, &again);
      moved = again;
    }
    if (measured) *dot += moved;
    UNROLL for (int row = 0; row < ROWS; row++) delta[row] = next[row];
  }
}

/* All blocks: in panels of columns, so that a panel's part of A is fetched once for all rows. */
INLINE void KIND(blocks_)(struct job *job, int measured) {
  int64_t panel = PANEL_BYTES / ((int64_t)sizeof(wides) * job->r);
  panel = LANES * (panel < 1 ? 1 : panel);
  job->opened = 0;
  job->dot = job->square = 0;
  for (int64_t start = 0; start < job->columns; start += panel) {
    int64_t end = start + panel < job->columns ? start + panel : job->columns;
    for (int64_t i = 0; i < job->rows; i += ROWS) {
      const from_t *from = (const from_t *)job->weight + i * job->weight_stride;
      to_t *to = (to_t *)job->out + i * job->out_stride;
      int64_t height = job->rows - i < ROWS ? job->rows - i : ROWS;
      int64_t edge = height < ROWS ? start : end - (end - start) % LANES; /* from here on blocks are not whole */
      wides dot = {0}, square = {0};
      if (start < edge)
        KIND(strip_)(job, i, start, edge, from + start, job->weight_stride, to + start, job->out_stride, measured, &dot, &square);
      for (int64_t j = edge; j < end; j += LANES) { /* with zeros where there is no weight */
        from_t weight[ROWS * LANES] = {0};
        to_t merged[ROWS * LANES];
        int64_t width = end - j < LANES ? end - j : LANES;
        for (int row = 0; row < height; row++) memcpy(weight + row * LANES, from + row * job->weight_stride + j, width * sizeof *from);
        KIND(strip_)(job, i, j, j + LANES, weight, LANES, merged, LANES, measured, &dot, &square);
        for (int row = 0; row < height; row++) memcpy(to + row * job->out_stride + j, merged + row * LANES, width * sizeof *to);
      }
      for (int lane = 0; measured && lane < LANES; lane++) {
        job->dot += dot[lane];
        job->square += square[lane];
      }
    }
  }
}

void KIND(lorafold_)(struct job *job) {
  if (job->measured) KIND(blocks_)(job, 1);
  else KIND(blocks_)(job, 0);
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
#undef ROUNDED
#undef POWER
#undef ABSOLUTE
#undef SIGNS
#undef bits_t
#undef FROM
#undef TO
