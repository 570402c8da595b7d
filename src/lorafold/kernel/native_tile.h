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
#define SIGN JOIN(WIDE, _sign)
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
/* Do the open lanes of one row again, each alone, in float64; what that leaves open is listed. (i, j): the place of its first lane. */
INLINE tos KIND(settled_)(struct job *job, int64_t i, int64_t j, froms weight, wides base, bits_t open, tos merged) {
  const double *b = job->scaled_B + i * job->r;
  const WIDE *column_errors = (const WIDE *)job->column_errors + j;
  int live = ((const WIDE *)job->row_errors)[i] != 0;
  union { wides all; WIDE of[LANES]; } bases = {base}; /* lanes are looked at one by one in memory */
  union { bits_t all; JOIN(WIDE, _word) of[LANES]; } opens = {open};
  union { froms all; from_t of[LANES]; } weights = {weight};
  union { tos all; to_t of[LANES]; } result = {merged}, low, high, same;
  union { floats all; float of[LANES]; } lower = {{0}}, upper = {{0}};
  for (int lane = 0; lane < LANES; lane++) {
    if (!opens.of[lane] || !isfinite(bases.of[lane])) continue;
    double w = bases.of[lane], sum, size;
    products(b, job->lora_A + (j + lane) * job->lora_A_strides[1], job->lora_A_strides[0], job->r, &sum, &size);
    double error = (fabs(w) + size) * job->unit + (live && column_errors[lane] != 0 ? job->tiny : 0);
    lower.of[lane] = JOIN(TO, _from)(w + sum - error);
    upper.of[lane] = JOIN(TO, _from)(w + sum + error);
  }
  low.all = ROUND_FLOATS(lower.all), high.all = ROUND_FLOATS(upper.all);
  same.all = ROUND_FLOATS(__builtin_convertvector(base, floats));
  for (int lane = 0; lane < LANES; lane++) {
    if (!opens.of[lane]) continue;
    WIDE w = bases.of[lane];
    result.of[lane] = isnan(w) ? JOIN(TO, _nan) : isinf(w) ? same.of[lane] : low.of[lane];
    if (!isfinite(w) || low.of[lane] == high.of[lane]) continue;
    ((from_t *)job->open_weight)[job->opened] = weights.of[lane];
    job->open[job->opened++] = (int32_t)(i * job->columns + j + lane);
  }
  return result.all;
}
#endif

/* Look at a block of which some sums are open or NaN, and store what becomes of them. */
COLD void KIND(settle_)(struct job *job, int64_t i, int64_t j, const froms *weight, const wides *delta, to_t *to, int64_t to_stride) {
  for (int row = 0; row < ROWS; row++) {
    wides base = WIDEN(weight[row]), total = base + delta[row];
    tos merged;
#if EXACT
    wides bound, ahead, behind, rounded = ROUNDED(total, &merged);
    memcpy(&bound, (const WIDE *)job->column_errors + j, sizeof bound);
    KIND(slack_)(job->relative, total, rounded, bound * ((const WIDE *)job->row_errors)[i + row], &ahead, &behind);
    bits_t open = (bits_t)(ahead < 0) | (bits_t)(behind < 0) | (bits_t)(ahead != ahead);
    if (!any(open)) continue;
    merged = KIND(settled_)(job, i + row, j, weight[row], base, open, merged);
#else
    ROUNDED(total, &merged);
    for (int lane = 0; lane < LANES; lane++)
      if (isnan(total[lane])) merged[lane] = JOIN(TO, _nan);
#endif
    memcpy(to + row * to_stride, &merged, sizeof merged);
  }
}

/* ROWS rows of one vector: sum, round, store, settle what is open; add to the inner products. */
INLINE void KIND(block_)(struct job *job, int64_t i, int64_t j, const from_t *from, int64_t from_stride, to_t *to, int64_t to_stride,
                         WIDE relative, int measured, wides *dot, wides *square) {
  const WIDE *a = (const WIDE *)job->packed_A + j * job->r, *b = (const WIDE *)job->packed_B + i * job->r;
  wides delta[ROWS], merged[ROWS], sum = {0}; /* NaN where any is */
  froms weight[ROWS];

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

  UNROLL for (int row = 0; row < ROWS; row++) memcpy(&weight[row], from + row * from_stride, sizeof weight[row]);
#if EXACT
  const WIDE *row_errors = (const WIDE *)job->row_errors + i;
  wides column_errors;
  bits_t signs = {0};
  memcpy(&column_errors, (const WIDE *)job->column_errors + j, sizeof column_errors);
#endif
  UNROLL for (int row = 0; row < ROWS; row++) {
    wides total = WIDEN(weight[row]) + delta[row];
    tos stored;
    merged[row] = ROUNDED(total, &stored);
    memcpy(to + row * to_stride, &stored, sizeof stored);
#if EXACT
    wides ahead, behind;
    KIND(slack_)(relative, total, merged[row], column_errors * row_errors[row], &ahead, &behind);
    signs |= (bits_t)ahead | (bits_t)behind;
    sum += ahead;
#else
    sum += total;
#endif
  }
  bits_t look = (bits_t)(sum != sum);
#if EXACT
  look = (look | signs) & SIGN;
#endif
  if (__builtin_expect(any(look), 0)) {
    wides deltas[ROWS]; /* copies, so that what is copied may stay in registers */
    froms weights[ROWS];
    for (int row = 0; row < ROWS; row++) deltas[row] = delta[row], weights[row] = weight[row];
    KIND(settle_)(job, i, j, weights, deltas, to, to_stride);
    for (int row = 0; row < ROWS; row++) {
      tos stored;
      memcpy(&stored, to + row * to_stride, sizeof stored);
      merged[row] = WIDEN_MERGED(stored);
    }
  }

  if (measured)
    UNROLL for (int row = 0; row < ROWS; row++) {
      *dot += (merged[row] - WIDEN(weight[row])) * delta[row];
      *square += delta[row] * delta[row];
    }
}

/* All blocks: in panels of columns, so that a panel's part of A is fetched once for all rows. */
INLINE void KIND(blocks_)(struct job *job, int measured) {
  int64_t panel = PANEL_BYTES / ((int64_t)sizeof(wides) * job->r);
  panel = LANES * (panel < 1 ? 1 : panel);
  const WIDE relative = job->relative;
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
          KIND(block_)(job, i, j, from, job->weight_stride, to, job->out_stride, relative, measured, &dot, &square);
        } else { /* at the edge: a whole block with zeros where there is no weight */
          from_t weight[ROWS * LANES] = {0};
          to_t merged[ROWS * LANES];
          height = height < ROWS ? height : ROWS;
          width = width < LANES ? width : LANES;
          for (int row = 0; row < height; row++) memcpy(weight + row * LANES, from + row * job->weight_stride, width * sizeof *from);
          KIND(block_)(job, i, j, weight, LANES, merged, LANES, relative, measured, &dot, &square);
          for (int row = 0; row < height; row++) memcpy(to + row * job->out_stride, merged + row * LANES, width * sizeof *to);
        }
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
#undef SIGN
#undef bits_t
#undef FROM
#undef TO
