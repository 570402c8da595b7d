/* Sums without any rounding error, for the few elements that float64 leaves undecided. Those are ties for the most part, which are common
 * where weight and factors are short numbers.
 *
 * A sum is kept as float64 numbers by size of which no two have a bit of the same weight: an expansion. To add a number is to add it to
 * one part after the other and keep what each addition loses (Shewchuk, "Adaptive Precision Floating-Point Arithmetic and Fast Robust
 * Geometric Predicates", Discrete & Computational Geometry 18, 1997, Theorem 10).
 */
#define PARTS 64
struct expansion {
  double parts[PARTS]; /* none zero, the largest last */
  int count;
};

/* fl(a + b), and what it loses (Knuth). */
INLINE double two_sum(double a, double b, double *lost) {
  double sum = a + b, shadow = sum - a;
  *lost = (a - (sum - shadow)) + (b - shadow);
  return sum;
}

/* Whether there was room. */
INLINE int add(struct expansion *sum, double x) {
  int kept = 0;
  for (int i = 0; i < sum->count; i++) {
    double lost;
    x = two_sum(sum->parts[i], x, &lost);
    if (lost != 0) sum->parts[kept++] = lost;
  }
  sum->count = kept;
  if (x == 0) return 1;
  if (kept == PARTS) return 0;
  sum->parts[sum->count++] = x;
  return 1;
}

/* Add a * b; whether that was exact, which underflow might prevent. */
INLINE int add_product(struct expansion *sum, double a, double b) {
  double product = a * b;
  if (fabs(product) < 0x1p-900) return a == 0 || b == 0;
  return add(sum, product) && add(sum, fma(a, b, -product));
}

/* Add a * b * c; whether that was exact. */
INLINE int add_products(struct expansion *sum, double a, double b, double c) {
  double product = a * b;
  if (fabs(product) < 0x1p-900) return a == 0 || b == 0 || c == 0;
  return add_product(sum, product, c) && add_product(sum, fma(a, b, -product), c);
}

/* The sum rounded to nearest, ties to even. A tie with the parts so far is none if one is left that has the sign of what was lost. */
INLINE double nearest_total(const struct expansion *sum) {
  double total = 0, lost = 0;
  int i = sum->count;
  while (i > 0 && lost == 0) total = two_sum(total, sum->parts[--i], &lost);
  if (i == 0 || (sum->parts[i - 1] > 0) != (lost > 0)) return total;
  double beyond = total + 2 * lost;
  return beyond - total == 2 * lost ? beyond : total;
}

/* The float64 that stands for the sum in any later rounding to fewer bits: the one nearer to zero, its last bit set if it is not the sum.
 *
 * Additions from the largest part down are without loss as long as what there is fits a float64. What the first one loses has the sign
 * of all that is left, for the parts behind are smaller than any bit of it. */
INLINE double odd_total(const struct expansion *sum) {
  double total = 0, lost = 0;
  for (int i = sum->count; i-- > 0 && lost == 0;) total = two_sum(total, sum->parts[i], &lost);
  if (lost == 0) return total;
  uint64_t bits;
  memcpy(&bits, &total, sizeof bits);
  bits = (bits - ((lost > 0) != (total > 0))) | 1;
  memcpy(&total, &bits, sizeof bits);
  return total;
}
