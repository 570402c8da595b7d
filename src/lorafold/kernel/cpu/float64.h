/* The strips of an exact result in float64; tile.h has the rest. Sums in float64 tell nothing of the last bit here, so they are kept as two
 * numbers: the sum, and the sum of all that products and additions lose (Ogita, Rump and Oishi, "Accurate sum and dot product", SIAM J.
 * Sci. Comput. 26, 2005, Dot2).
 *
 * Let u be 2^-53, and S the sum of |s B A|. Every s B is two numbers without error, of which the second is at most u times the first.
 * For each of r products the loss of a product is at most u |s B A|, what the second number adds no more, and the loss of an addition at
 * most u (1 + r u) S. Summing these in float64, each through at most r + 2 roundings, is an error of at most (r + 6)^2 u^2 S: the job's
 * share of its bound. Adding W is without error but for the last sum of what is lost. So the real sum lies between head + (tail - error)
 * and head + (tail + error), and where both round to the same, so does it. Where not, there is a tie nearby: those are summed without
 * error.
 */

/* ROWS rows of one vector: the sums, and what they lost. */
INLINE void KIND(products_)(const struct job *job, int64_t i, int64_t j, int v, wides sum[ROWS], wides lost[ROWS]) {
  const double *a = (const double *)job->packed_A + j * job->r + v * LANES, *b = (const double *)job->packed_B + i * job->r;
  const double *rest = job->packed_rest ? job->packed_rest + i * job->r : 0;
  for (int row = 0; row < ROWS; row++) sum[row] = lost[row] = (wides){0};
  for (int first = 0; first < ROWS; first += 4) { /* as many as there are registers for */
    wides sums[4], losses[4];
    UNROLL for (int row = 0; row < 4; row++) sums[row] = losses[row] = (wides){0};
    for (int64_t k = 0; k < job->r; k++) {
      wides lora_A = OF_LANES(doubles_at)(a + k * WIDTH);
      UNROLL for (int row = 0; row < 4; row++) {
        wides scaled_B = (wides){0} + b[k * ROWS + first + row], error, loss;
        wides product = OF_LANES(two_product_)(lora_A, scaled_B, &error);
        if (rest) error += lora_A * rest[k * ROWS + first + row];
        sums[row] = OF_LANES(two_sums_)(sums[row], product, &loss);
        losses[row] += loss + error;
      }
    }
    for (int row = 0; row < 4; row++) {
      sum[first + row] = sums[row];
      lost[first + row] = losses[row];
    }
  }
}

/* The elements of a vector that are left over, which begin at (i, j): done without rounding error, or listed. */
COLD void KIND(settle_)(struct job *job, int64_t i, int64_t j, uint32_t undecided, const from_t *weight, uint64_t *to) {
  for (; undecided; undecided &= undecided - 1) {
    int lane = __builtin_ctz(undecided);
    from_t stored = weight[lane];
    double w = WIDEN((froms){stored})[0], total;
    if (isnan(w)) to[lane] = f64_nan;
    else if (KIND(summed_)(job, i, j + lane, w, &total)) memcpy(to + lane, &total, sizeof total);
    else {
      ((from_t *)job->undecided_weight)[job->undecided_count] = stored;
      job->undecided[job->undecided_count++] = (int32_t)(i * job->columns + j + lane);
    }
  }
}

INLINE void KIND(strip_)(struct job *job, int64_t i, int64_t start, int64_t end, const from_t *from, int64_t from_stride, uint64_t *to,
                         int64_t to_stride, int measured, wides *dot, wides *square) {
  for (int64_t j = start; j < end; j += WIDTH, from += WIDTH, to += WIDTH)
    for (int v = 0; v < VECTORS; v++) {
      wides sums[ROWS], losses[ROWS];
      KIND(products_)(job, i, j, v, sums, losses);
      wides columns = OF_LANES(doubles_at)((const double *)job->column_errors + j + v * LANES);
      for (int row = 0; row < ROWS; row++) {
        const from_t *place = from + row * from_stride + v * LANES;
        froms weight;
        memcpy(&weight, place, sizeof weight);
        wides base = WIDEN(weight), loss, tail;
        wides error = columns * (((const double *)job->row_errors)[i + row] * job->share);
        wides head = OF_LANES(two_sums_)(base, sums[row], &loss);
        loss += losses[row];
        head = OF_LANES(two_sums_)(head, loss, &tail);
        error += (OF_LANES(absolute_double)(loss) + 2 * OF_LANES(absolute_double)(tail)) * 0x1p-52;
        wides low = head + (tail - error), total = head + (tail + error);
        uint32_t undecided = OF_LANES(apart_)(low, total);
        from_t weights[LANES]; /* which may be where the result goes */
        if (__builtin_expect(undecided != 0, 0)) memcpy(weights, place, sizeof weights);
        uint64_t *out = to + row * to_stride + v * LANES;
        memcpy(out, &total, sizeof total);
        if (__builtin_expect(undecided != 0, 0)) {
          KIND(settle_)(job, i + row, j + v * LANES, undecided, weights, out);
          memcpy(&total, out, sizeof total);
        }
        if (measured) {
          wides delta = sums[row] + losses[row];
          *dot += (total - base) * delta;
          *square += delta * delta;
        }
      }
    }
}
