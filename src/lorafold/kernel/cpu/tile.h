/* One kind of job; included once for each, with FROM and TO (bf16, f16, f32), HOW (float, double, fast, each _stochastic or
 * not), EXACT (1, 0), STOCHASTIC (1, 0), WIDE (float, double) and LANES set.
 *
 * How `exact` knows that a rounded sum is right: the real sum lies between two numbers, its ends, and both round to the same.
 *
 *   total = W + delta,   outer = total (1 + MARGIN) + bound,   inner = total (1 - MARGIN) - bound,   `bound` with the sign of `total`
 *
 * The bound, which packing.py counts, holds for delta. Let u be half the step of 1, and p the power of two at or below |total|: that the
 * total was rounded is an error of at most u p. Rounding an end is one of u p too, or of 2 u p where the end lies beyond 2 p, and that
 * is so where |total| is nearly 2 p, or the bound so large that its slack covers it. So a margin of 2 u, of which at least 2 u p comes,
 * is enough, and 4 u where the product is rounded too. Of numbers below the smallest normal one the total is without error.
 *
 * Of float64 sums on their way to float32 more is known sooner. Where the total is large enough, 2^40 times the bound, that and the
 * rounding of the total are less than 2^14 last bits of it; then only ties so near matter, which the 29 bits tell that are lost.
 *
 * Stochastic rounding is of the sum rounded to float32. That lies between the ends rounded to float32; where both become the same number
 * with what the element has drawn, so does it.
 */
#define KIND(name) JOIN(JOIN(JOIN(name, FROM), JOIN(_, TO)), JOIN(_, HOW)) /* as in lorafold_bf16_bf16_float */
#define from_t JOIN(FROM, _stored)
#define to_t JOIN(TO, _stored)
#define froms JOIN(FROM, _vector)(LANES)
#define tos JOIN(TO, _vector)(LANES)
#define differ_t JOIN(TO, _differ)(LANES)
#define OF_LANES(name) JOIN(JOIN(name, x), LANES)
#define wides OF_LANES(WIDE)
#define floats OF_LANES(JOIN(TO, _float))
#define WIDEN(bits) __builtin_convertvector(OF_LANES(JOIN(widen_, FROM))(bits), wides)
#define WIDEN_MERGED(bits) __builtin_convertvector(OF_LANES(JOIN(widen_, TO))(bits), wides)
#if STOCHASTIC /* the numbers that lanes draw are in `drawn`, those of row i from column j on */
#define DRAW(i, j) OF_LANES(u32) drawn = OF_LANES(drawn_)(job->first + (uint64_t)((i) * job->columns + (j)), job->key)
#define TO_FLOATS(wide) OF_LANES(JOIN(noised_, TO))(__builtin_convertvector(wide, floats), drawn)
#define FROM_DOUBLE(x) (float)(x)
#else
#define DRAW(i, j)
#define TO_FLOATS(wide) __builtin_convertvector(wide, floats)
#define FROM_DOUBLE JOIN(TO, _from)
#endif
#define ENDS OF_LANES(JOIN(ends_, TO))
#define WITH_SIGN OF_LANES(JOIN(with_sign_, WIDE))
#define NAN_LANES OF_LANES(JOIN(nan_lanes_, WIDE))
#define OF_DOUBLES(name) JOIN(JOIN(name, x), DOUBLES)
#define WIDTH (VECTORS * LANES)
#define BY_LOST_BITS (EXACT && JOIN(TO, _is_f32))
#define MARGIN JOIN(WIDE, _margin)

#if EXACT
/* The element (i, j), of which the weight is `w`, done without rounding error, as a number to be rounded; whether that could be done. */
COLD int KIND(summed_)(const struct job *job, int64_t i, int64_t j, double w, double *total) {
  const WIDE *a = (const WIDE *)job->packed_A + j / WIDTH * WIDTH * job->r + j % WIDTH;
  int64_t b = (job->B_row + i) * job->B_row_stride;
  struct expansion sum = {{w}, w != 0};
  for (int64_t k = 0; k < job->r; k++, a += WIDTH, b += job->B_stride)
    if (!add_products(&sum, number_at(job->given_B, b, job->B_dtype), job->scaling[k], *a)) return 0;
#if JOIN(TO, _is_f64)
  *total = nearest_total(&sum);
#else
  *total = odd_total(&sum);
#endif
  return isfinite(*total);
}
#endif

#if EXACT && JOIN(TO, _is_f64)
#include "float64.h"
#else
#if EXACT
/* Both ends of the sums. On the way from float64 to float16 they are brought to the next floats outside, so that rounding to float does
 * nothing to them, and hits no tie. */
INLINE void KIND(ends_)(wides total, wides bound, wides *outer, wides *inner) {
  bound = WITH_SIGN(bound, total);
  *outer = total * (WIDE)(1 + MARGIN) + bound;
  *inner = total * (WIDE)(1 - MARGIN) - bound;
#if JOIN(WIDE, _is_double) && JOIN(TO, _is_f16) && !STOCHASTIC
  *outer = (wides)(((OF_LANES(u64))*outer + 0x1fffffff) & ~(uint64_t)0x1fffffff);
  *inner = (wides)((OF_LANES(u64))*inner & ~(uint64_t)0x1fffffff);
#endif
}

/* What becomes of some floats that stand for the element (i, j). */
INLINE JOIN(TO, _vector)(DOUBLES) KIND(finished_)(const struct job *job, int64_t i, int64_t j, OF_DOUBLES(float) x) {
#if STOCHASTIC
  x = OF_DOUBLES(JOIN(noised_, TO))(x, (OF_DOUBLES(u32)){0} + drawn_at(job->first + (uint64_t)(i * job->columns + j), job->key));
#endif
  return OF_DOUBLES(JOIN(round_, TO))(x);
}

/* Do the undecided elements of DOUBLES, which begin at (i, j), again in float64, and where that does not decide them without rounding
 * error, and put them into `to`. What underflow might spoil is listed. */
INLINE void KIND(settled_)(struct job *job, int64_t i, int64_t j, uint32_t undecided, const from_t *weight, const WIDE *bounds, to_t *to) {
  const double *b = job->scaled_B + i * job->r;
  const WIDE *a = (const WIDE *)job->packed_A + j / WIDTH * WIDTH * job->r + j % WIDTH;
  OF_DOUBLES(double) sums[4] = {0}; /* several, since each waits for its last addition */
  int64_t k = 0;
  for (; k + 4 <= job->r; k += 4)
    UNROLL for (int turn = 0; turn < 4; turn++) sums[turn] += OF_DOUBLES(JOIN(WIDE, s_at))(a + (k + turn) * WIDTH) * b[k + turn];
  for (; k < job->r; k++) sums[0] += OF_DOUBLES(JOIN(WIDE, s_at))(a + k * WIDTH) * b[k];
  OF_DOUBLES(double) sum = (sums[0] + sums[1]) + (sums[2] + sums[3]);
  JOIN(FROM, _vector)(DOUBLES) bits;
  OF_DOUBLES(WIDE) bound;
  memcpy(&bits, weight, sizeof bits);
  memcpy(&bound, bounds, sizeof bound);
  OF_DOUBLES(double) base = __builtin_convertvector(OF_DOUBLES(JOIN(widen_, FROM))(bits), OF_DOUBLES(double));
  OF_DOUBLES(double) error = OF_DOUBLES(absolute_double)(base) * job->unit + __builtin_convertvector(bound, OF_DOUBLES(double)) * job->share;
  for (; undecided; undecided &= undecided - 1) {
    int lane = __builtin_ctz(undecided);
    double w = base[lane];
    if (isnan(w)) {
      to[lane] = JOIN(TO, _nan);
      continue;
    }
    OF_DOUBLES(float) ends = {FROM_DOUBLE(w + sum[lane] - error[lane]), FROM_DOUBLE(w + sum[lane] + error[lane])};
    JOIN(TO, _vector)(DOUBLES) found = KIND(finished_)(job, i, j + lane, ends);
    to[lane] = found[0];
    if (found[0] == found[1]) continue;
    double odd;
    if (KIND(summed_)(job, i, j + lane, w, &odd)) {
      to[lane] = KIND(finished_)(job, i, j + lane, (OF_DOUBLES(float)){FROM_DOUBLE(odd)})[0];
      continue;
    }
    ((from_t *)job->undecided_weight)[job->undecided_count] = weight[lane];
    job->undecided[job->undecided_count++] = (int32_t)(i * job->columns + j + lane);
  }
}
#endif

/* Look at VECTORS vectors of a row of which some sum is undecided or NaN, and store what becomes of them; the new value of `moved`. */
COLD void KIND(settle_)(struct job *job, int64_t i, int64_t j, const froms *weight, const wides *delta, to_t *to, wides *moved) {
  *moved = (wides){0};
  for (int v = 0; v < VECTORS; v++, j += LANES, to += LANES) {
    wides base = WIDEN(weight[v]);
    floats merged;
    tos stored;
    DRAW(i, j);
#if EXACT
    wides bound, outer, inner;
    memcpy(&bound, (const WIDE *)job->column_errors + j, sizeof bound);
    bound *= ((const WIDE *)job->row_errors)[i];
    KIND(ends_)(base + delta[v], bound, &outer, &inner);
    differ_t differ = ENDS(TO_FLOATS(outer), TO_FLOATS(inner), &stored, &merged);
    uint32_t undecided = OF_LANES(lanes_)(__builtin_convertvector(differ, OF_LANES(u32))) | NAN_LANES(outer);
    if (!undecided && !job->measured) continue; /* it is stored already */
    memcpy(to, &stored, sizeof stored);
    for (int first = 0; undecided >> first; first += DOUBLES) {
      uint32_t here = undecided >> first & ((1u << DOUBLES) - 1);
      if (here)
        KIND(settled_)(job, i, j + first, here, (const from_t *)(weight + v) + first, (const WIDE *)&bound + first, to + first);
    }
    memcpy(&stored, to, sizeof stored);
#else
    wides total = base + delta[v];
    stored = OF_LANES(JOIN(rounded_, TO))(TO_FLOATS(total), &merged);
    memcpy(to, &stored, sizeof stored);
    for (uint32_t undecided = NAN_LANES(total); undecided; undecided &= undecided - 1) to[__builtin_ctz(undecided)] = JOIN(TO, _nan);
    memcpy(&stored, to, sizeof stored);
#endif
    *moved += (WIDEN_MERGED(stored) - base) * delta[v];
  }
}

/* delta, of ROWS rows of VECTORS vectors: the r products, in `exact` of floats by spans. */
INLINE void KIND(products_)(const WIDE *a, const WIDE *b, int64_t r, wides delta[ROWS][VECTORS]) {
  for (int64_t done = 0; done < r;) {
    wides sums[ROWS][VECTORS];
    UNROLL for (int row = 0; row < ROWS; row++) UNROLL for (int v = 0; v < VECTORS; v++) sums[row][v] = (wides){0};
    int64_t end = EXACT && JOIN(WIDE, _is_float) && r - done > SPAN ? done + SPAN : r;
    for (int64_t k = done; k < end; k++, a += WIDTH, b += ROWS) {
      wides lora_A[VECTORS];
      UNROLL for (int v = 0; v < VECTORS; v++) memcpy(lora_A + v, a + v * LANES, sizeof *lora_A);
      UNROLL for (int row = 0; row < ROWS; row++) UNROLL for (int v = 0; v < VECTORS; v++) sums[row][v] += lora_A[v] * b[row];
    }
    if (done)
      UNROLL for (int row = 0; row < ROWS; row++) UNROLL for (int v = 0; v < VECTORS; v++) delta[row][v] += sums[row][v];
    else
      UNROLL for (int row = 0; row < ROWS; row++) UNROLL for (int v = 0; v < VECTORS; v++) delta[row][v] = sums[row][v];
    done = end;
  }
}

/* ROWS rows of the columns from `start` on, which are whole blocks of WIDTH: add, round, store. */
INLINE void KIND(strip_)(struct job *job, int64_t i, int64_t start, int64_t end, const from_t *from, int64_t from_stride, to_t *to,
                         int64_t to_stride, int measured, wides *dot, wides *square) {
  const int64_t r = job->r;
  for (int64_t j = start; j < end; j += WIDTH, from += WIDTH, to += WIDTH) {
    wides delta[ROWS][VECTORS];
    KIND(products_)((const WIDE *)job->packed_A + j * r, (const WIDE *)job->packed_B + i * r, r, delta);
    for (int row = 0; row < ROWS; row++) {
      froms weight[VECTORS];
      wides sum = {0}, moved = {0};
      differ_t differ = {0};
#if BY_LOST_BITS
      double large = ((const double *)job->row_errors)[i + row] * job->largest_column_error * 0x1p40;
      wides limit = (wides){0} + (large < 0x1p-125 ? 0x1p-125 : large);
      uint32_t sure = (1u << LANES) - 1;
#endif
      UNROLL for (int v = 0; v < VECTORS; v++) {
        memcpy(weight + v, from + row * from_stride + v * LANES, sizeof *weight);
        wides base = WIDEN(weight[v]);
        tos stored;
        floats merged;
        DRAW(i + row, j + v * LANES);
#if BY_LOST_BITS
        wides total = base + delta[row][v];
        stored = OF_LANES(rounded_f32)(TO_FLOATS(total), &merged);
        sure = OF_LANES(off_ties_)(total, limit, sure);
#elif EXACT
        wides bound, outer, inner;
        memcpy(&bound, (const WIDE *)job->column_errors + j + v * LANES, sizeof bound);
        bound *= ((const WIDE *)job->row_errors)[i + row];
        KIND(ends_)(base + delta[row][v], bound, &outer, &inner);
        differ |= ENDS(TO_FLOATS(outer), TO_FLOATS(inner), &stored, &merged);
        sum += outer;
#else
        wides total = base + delta[row][v];
        stored = OF_LANES(JOIN(rounded_, TO))(TO_FLOATS(total), &merged);
        sum += total;
#endif
        memcpy(to + row * to_stride + v * LANES, &stored, sizeof stored);
        if (measured) {
          moved += (__builtin_convertvector(merged, wides) - base) * delta[row][v];
          *square += delta[row][v] * delta[row][v];
        }
      }
#if BY_LOST_BITS
      int look = sure != (1u << LANES) - 1;
#else
      int look = OF_LANES(JOIN(any_, TO))(differ) | (NAN_LANES(sum) != 0);
#endif
      if (__builtin_expect(look, 0)) {
        froms weights[VECTORS]; /* copies, so that what is copied may stay in registers */
        wides again;
        for (int v = 0; v < VECTORS; v++) weights[v] = weight[v];
        KIND(settle_)(job, i + row, j, weights, delta[row], to + row * to_stride, &again);
        moved = again;
      }
      if (measured) *dot += moved;
    }
  }
}
#endif

/* All blocks from where the job stopped: in panels of columns, so that a panel's part of A is fetched once for all rows. */
INLINE void KIND(blocks_)(struct job *job, int measured) {
  int64_t panel = PANEL_BYTES / ((int64_t)sizeof(WIDE) * WIDTH * job->r);
  panel = WIDTH * (panel < 1 ? 1 : panel);
  job->undecided_count = 0;
  job->dot = job->square = 0;
  for (; job->column < job->columns; job->column += panel, job->row = 0) {
    int64_t start = job->column, end = start + panel < job->columns ? start + panel : job->columns;
    for (; job->row < job->rows; job->row += ROWS) {
      if (EXACT && job->room - job->undecided_count < ROWS * (end - start)) return;
      int64_t i = job->row;
      const from_t *from = (const from_t *)job->weight + i * job->weight_stride;
      to_t *to = (to_t *)job->out + i * job->out_stride;
      int64_t height = job->rows - i < ROWS ? job->rows - i : ROWS;
      int64_t edge = height < ROWS ? start : end - (end - start) % WIDTH; /* from here on blocks are not whole */
      wides dot = {0}, square = {0};
      if (start < edge)
        KIND(strip_)(job, i, start, edge, from + start, job->weight_stride, to + start, job->out_stride, measured, &dot, &square);
      for (int64_t j = edge; j < end; j += WIDTH) { /* with zeros where there is no weight */
        from_t weight[ROWS * WIDTH] = {0};
        to_t merged[ROWS * WIDTH];
        int64_t width = end - j < WIDTH ? end - j : WIDTH;
        for (int row = 0; row < height; row++) memcpy(weight + row * WIDTH, from + row * job->weight_stride + j, width * sizeof *from);
        KIND(strip_)(job, i, j, j + WIDTH, weight, WIDTH, merged, WIDTH, measured, &dot, &square);
        for (int row = 0; row < height; row++) memcpy(to + row * job->out_stride + j, merged + row * WIDTH, width * sizeof *to);
      }
      for (int lane = 0; measured && lane < LANES; lane++) {
        job->dot += dot[lane];
        job->square += square[lane];
      }
    }
  }
}

void KIND(lorafold_)(struct job *job) {
  environment_t before = entered();
  if (job->measured) KIND(blocks_)(job, 1);
  else KIND(blocks_)(job, 0);
  left(before);
}

#undef KIND
#undef from_t
#undef to_t
#undef froms
#undef tos
#undef differ_t
#undef OF_LANES
#undef wides
#undef floats
#undef WIDEN
#undef WIDEN_MERGED
#undef TO_FLOATS
#undef DRAW
#undef FROM_DOUBLE
#undef ENDS
#undef WITH_SIGN
#undef NAN_LANES
#undef OF_DOUBLES
#undef WIDTH
#undef BY_LOST_BITS
#undef MARGIN
#undef FROM
#undef TO
