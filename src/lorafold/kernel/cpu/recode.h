/* Sums made codes again, with the scales and zero points that are stored: each goes to one of the two numbers beside it that a code
 * stands for. What is decided is told in `checkpoints/encodings/rewrite.py`, of the sum correctly rounded to float64 and with each
 * operation rounded; the bits are the same.
 *
 * Here a sum is W + dW in float64, within `bound` of the real one. Seen in units of its scale it lies some share of a step past a code;
 * whether that is more than what the element has drawn is told in float32 for nearly all elements, since what rounding may change is
 * less than 2^-20 of a step or so. The others are looked at in float64, and where that leaves it open, the sum is made without error.
 */
#define floats JOIN(floatx, FLOATS)
#define doubles JOIN(doublex, FLOATS)
#define u32s JOIN(u32x, FLOATS)
#define i32s JOIN(i32x, FLOATS)
#define u64s JOIN(u64x, FLOATS)
#define OF_FLOATS(name) JOIN(JOIN(name, x), FLOATS)

/* How numbers are made codes. Tables of two sides are for sums above the number of a code, and 256 entries on for those below. */
struct recoding {
  const struct codes *codes;
  const int64_t *shifts;        /* (each) at which bit of its byte each code stands */
  int64_t bits;
  const double *numbers;        /* (256) what a code stands for, of which `values`, (count), are those in order, */
  const double *values;
  const uint8_t *names;         /* (2, count) and the code of each: of what is positive, and of what is negative; */
  int64_t count, nearest;       /* whether all go to the nearer one, or as drawn */
  const float *gaps, *outward;  /* (2, 256) 1 / the distance to the next number; 1 where that lies farther from zero, or 0 */
  const uint8_t *stays, *moves; /* (2, 256) the codes of a sum that stays with this number, or moves to the next */
  int64_t mantissa, exponent;   /* of codes that are floats with a sign: bits, and the smallest exponent; -1 for others */
  uint8_t *out;                 /* room for rows of bytes, */
  uint8_t *old, *made;          /* for the codes of a row, twice, */
  double *inverse;              /* and for 1 / the unit of each element of a row */
  double dot, square;           /* out: the inner products of kept, of the last rows */
};
const int lorafold_recoding_bytes = sizeof(struct recoding);

/* An element: its place in the job, the sum, what that is off by at most, the weight, its code, and what it has drawn. */
struct element {
  int64_t i, j;
  double total, bound, weight, inverse, drawn;
  uint8_t code;
};

/* What a code must stand for, so that it states `number` at row `i` of the spreads. */
static double undone(const struct codes *codes, int64_t i, int64_t j, double number) {
  for (int64_t n = codes->count - 1; n >= 0; n--) {
    const struct spread *spread = codes->spreads + n;
    int64_t place = j + spread->column_skipped, block = 0;
    if (spread->rows) block = (i + spread->row_skipped) / spread->rows * spread->stride;
    else place += i * codes->columns;
    double other = spread->numbers[block + place / spread->columns];
    if (spread->how == by_subtraction) number += other;
    else if (spread->how == by_multiplication) number /= other;
    else number *= other;
  }
  return number;
}

/* The place in `values` of what `x` goes to. `open`: whether that could be another one where x is off by `error`. */
static int64_t place_of(const struct recoding *how, double x, double error, double drawn, int *open) {
  int mirrored = x < 0 && !how->nearest;
  double sign = mirrored ? -1 : 1;
  int64_t last = how->count - 1, low = 0, high = how->count; /* how many of the values, seen from their side, are x or less */
  x *= sign;
  while (low < high) {
    int64_t middle = (low + high) / 2;
    if (sign * how->values[mirrored ? last - middle : middle] <= x) low = middle + 1;
    else high = middle;
  }
  low = low < 1 ? 0 : low > last ? last - 1 : low - 1;
  double below = sign * how->values[mirrored ? last - low : low], above = sign * how->values[mirrored ? last - low - 1 : low + 1];
  double share = (x - below) / (above - below);
  *open = fabs(share - drawn) * (above - below) <= error || fabs(x) <= error;
  int64_t place = low + (how->nearest ? share > 0.5 || (share == 0.5 && (low & 1)) : share > drawn);
  return mirrored ? last - place : place;
}

/* The code of an element, or -1 where that is left to others: what is far out of range is to be counted. `first`: row 0 of the job. */
COLD int settled_code(const struct recoding *how, const struct job *job, int64_t first, struct element at) {
  double far = (how->values[how->count - 1] - how->values[0]) / 2;
  double error = (at.bound + fabs(at.total) * 0x1p-46) * fabs(at.inverse);
  int open = fabs(at.total - at.weight) <= at.bound;
  double x = undone(how->codes, first + at.i, at.j, at.total);
  error += fabs(x) * 0x1p-46;
  int64_t place = 0;
  if (!open) place = place_of(how, x, error, at.drawn, &open);
  if (open || !isfinite(x)) {
    double number;
    if (!summed_f64_f64_double(job, at.i, at.j, at.weight, &number)) return -1;
    if (number == at.weight) return at.code;
    x = undone(how->codes, first + at.i, at.j, number);
    if (isnan(x)) return at.code;
    place = place_of(how, x, 0, at.drawn, &open);
  }
  if (!isfinite(x) || x > how->values[how->count - 1] + far || x < how->values[0] - far) return -1;
  return how->names[place + (signbit(x) ? how->count : 0)];
}

/* What the elements from `first` on have drawn, as floats. */
INLINE floats limits(const struct job *job, uint64_t first) {
  return __builtin_convertvector((i32s)(OF_FLOATS(drawn_)(first, job->key) >> 9 << 1 | 1), floats) * 0x1p-24f;
}

/* Codes of FLOATS elements in a table of their numbers: `made`; the lanes that are left to settled_code. */
INLINE uint32_t by_table(const struct recoding *how, const uint8_t *old, floats d, floats error, floats drawn, uint8_t *made) {
  floats gap, outward;
  uint8_t stay[FLOATS], move[FLOATS];
  uint32_t below = OF_FLOATS(lanes_)((u32s)(d < 0)), open, moved;
  for (int lane = 0; lane < FLOATS; lane++) {
    int code = old[lane] | (below >> lane & 1) << 8;
    gap[lane] = how->gaps[code];
    outward[lane] = how->outward[code];
    stay[lane] = how->stays[code];
    move[lane] = how->moves[code];
  }
  floats m = (floats)((u32s)d & 0x7fffffff) * gap, t = drawn + (1 - outward) * (1 - 2 * drawn);
  floats off = (floats)((u32s)(m - t) & 0x7fffffff);
  open = OF_FLOATS(lanes_)((u32s)~((off > t * 0x1p-20f + error * gap) & (m < 1 - 0x1p-10f)));
  moved = OF_FLOATS(lanes_)((u32s)(m > t));
  uint32_t tiny = OF_FLOATS(lanes_)((u32s)((floats)((u32s)d & 0x7fffffff) <= error));
  for (int lane = 0; lane < FLOATS; lane++) {
    made[lane] = moved >> lane & 1 ? move[lane] : stay[lane];
    open |= (uint32_t)(stay[lane] != old[lane]) << lane & tiny;
  }
  return open;
}

/* The same where codes are floats of a sign, `exponent` and `mantissa`. */
INLINE uint32_t by_steps(const struct recoding *how, const uint8_t *old, floats x, floats error, floats drawn, uint8_t *made) {
  u32s sign = (u32s)x & 0x80000000, size = (u32s)x & 0x7fffffff;
  floats largest = (floats){0} + (float)how->values[how->count - 1];
  u32s out = (u32s)((floats)size > largest);
  u32s far = (u32s)~((floats)size < largest * 1.99f);
  size = (size & ~out) | ((u32s)largest & out);
  u32s least = (u32s){0} + (uint32_t)((127 + how->exponent) << 23);
  u32s power = size & 0x7f800000, under = (u32s)(power < least);
  power = (power & ~under) | (least & under);
  floats per_step = (floats)((u32s){0} + (uint32_t)((254 + how->mantissa) << 23) - power);
  floats steps = (floats)size * per_step;
  i32s low = __builtin_convertvector(steps, i32s);
  floats share = steps - __builtin_convertvector(low, floats);
  low -= (i32s)(share > drawn);
  floats off = (floats)((u32s)(share - drawn) & 0x7fffffff);
  u32s open = (u32s)(off <= 0x1p-17f + error * per_step) & ~out;
  u32s code = (u32s)low + (((power - least) >> 23) << how->mantissa);
  u32s zero = (u32s)(code == 0);
  uint32_t signs = how->names[how->count / 2 + how->count] ? 0 : 1; /* whether what is negative and goes to zero has no sign */
  code |= (sign >> 24) & ~(zero & (0 - signs));
  for (int lane = 0; lane < FLOATS; lane++) made[lane] = code[lane];
  uint32_t left = OF_FLOATS(lanes_)(open | far);
  if (__builtin_expect(OF_FLOATS(lanes_)(zero) != 0, 0))
    for (int lane = 0; lane < FLOATS; lane++)
      if (!(old[lane] & 0x7f)) left |= 1u << lane;
  return left;
}

/* One row of a job; whether all of it could be done. */
static int recoded_row(struct recoding *how, const struct job *job, int64_t first, int64_t i, const double *weight, const double *total) {
  int64_t columns = job->columns;
  double bound = ((const double *)job->row_errors)[i] * job->largest_column_error;
  uint64_t place = job->first + (uint64_t)(i * columns);
  const uint8_t *old = how->old;
  doubles square = {0};
  for (int64_t j = 0; j < columns; j += FLOATS) {
    int64_t width = columns - j < FLOATS ? columns - j : FLOATS;
    uint32_t open = (uint32_t)((1u << width) - 1);
    floats drawn = (floats){0} + 0.5f;
    if (!how->nearest) drawn = limits(job, place + j);
    if (width == FLOATS) {
      doubles w, sum, inverse;
      memcpy(&w, weight + j, sizeof w);
      memcpy(&sum, total + j, sizeof sum);
      memcpy(&inverse, how->inverse + j, sizeof inverse);
      doubles delta = sum - w;
      square += delta * delta;
      floats error = __builtin_convertvector((OF_FLOATS(absolute_double)(sum) * 0x1p-46 + bound) * OF_FLOATS(absolute_double)(inverse), floats);
      if (how->mantissa < 0) open = by_table(how, old + j, __builtin_convertvector(delta * inverse, floats), error, drawn, how->made + j);
      else open = by_steps(how, old + j, __builtin_convertvector(sum * inverse, floats), error, drawn, how->made + j);
    } else
      for (int64_t k = j; k < columns; k++) square[0] += (total[k] - weight[k]) * (total[k] - weight[k]);
    for (; open; open &= open - 1) {
      int lane = __builtin_ctz(open);
      int64_t k = j + lane;
      struct element at = {i, k, total[k], bound, weight[k], how->inverse[k], drawn[lane], old[k]};
      int code = settled_code(how, job, first, at);
      if (code < 0) return 0;
      how->made[k] = code;
    }
  }
  for (int lane = 0; lane < FLOATS; lane++) how->square += square[lane];
  if (!isfinite(how->square)) return 0;
  double dot = 0;
  for (int64_t j = 0; j < columns; j++)
    if (how->made[j] != old[j]) dot += (how->numbers[how->made[j]] - how->numbers[old[j]]) / how->inverse[j] * (total[j] - weight[j]);
  how->dot += dot;
  return 1;
}

/* Make codes of the sums that `job` has made of its weight, and put them into `out` as `raw` has those of the weight; whether that could
 * be done. `first`: which row of the spreads is the job's first. */
static int recoded_rows(struct recoding *how, const struct job *job, int64_t first, const uint8_t *raw) {
  const struct codes *codes = how->codes;
  int64_t columns = codes->columns, each = codes->each, last[MOST_SPREADS], mask = (1 << how->bits) - 1;
  for (int n = 0; n < MOST_SPREADS; n++) last[n] = -1;
  how->dot = how->square = 0;
  memcpy(how->out, raw, job->rows * codes->row_bytes);
  for (int64_t i = 0; i < job->rows; i++, raw += codes->row_bytes) {
    int same = i > 0;
    for (int64_t n = 0; n < codes->count; n++) {
      int64_t before = last[n];
      spread_row(codes->spreads + n, first + i, columns, codes->room + n * columns, last + n);
      same = same && before == last[n] && before >= 0;
    }
    if (!same) {
      for (int64_t j = 0; j < columns; j++) how->inverse[j] = 1;
      for (int64_t n = 0; n < codes->count; n++)
        if (codes->spreads[n].how != by_subtraction)
          apply(by_multiplication + by_division - codes->spreads[n].how, columns, codes->room + n * columns, how->inverse);
    }
    for (int64_t b = 0, j = 0; j < columns; b++)
      for (int64_t k = 0; k < each; k++, j++) how->old[j] = raw[b] >> how->shifts[k] & mask;
    if (!recoded_row(how, job, first, i, (const double *)job->weight + i * columns, (const double *)job->out + i * columns)) return 0;
    uint8_t *to = how->out + i * codes->row_bytes;
    for (int64_t b = 0, j = 0; j < columns; b++) {
      int byte = 0;
      for (int64_t k = 0; k < each; k++, j++) byte |= how->made[j] << how->shifts[k];
      to[b] = byte;
    }
  }
  return isfinite(how->dot);
}

static int recoded(struct recoding *how, const struct job *job, int64_t first, const uint8_t *raw) {
  environment_t before = entered();
  int whole = recoded_rows(how, job, first, raw);
  left(before);
  return whole;
}

#undef floats
#undef doubles
#undef u32s
#undef i32s
#undef u64s
#undef OF_FLOATS
