/* Sums made codes again, with the scales and zero points that are stored: each goes to one of the two numbers beside it that a code
 * stands for. What is decided is told in `checkpoints/encodings/rewrite.py`, of the sum correctly rounded to float64 and with each
 * operation rounded; the bits are the same.
 *
 * Here the job's weight is zero, so that what it makes is dW alone, in float32, off by a bound that is known. Seen in units of its scale
 * that is some share of the step from the number of the old code to the next; whether it is more than what the element has drawn
 * is told in float32 for nearly all elements, since rounding changes less than 2^-20 of a step or so. Where that leaves it open, the
 * sum is made without error, and looked at in float64.
 */
#define floats JOIN(floatx, FLOATS)
#define u32s JOIN(u32x, FLOATS)
#define u16s JOIN(u16x, FLOATS)
#define i32s JOIN(i32x, FLOATS)
typedef VECTOR(uint8_t, FLOATS) u8s;
#define OF_FLOATS(name) JOIN(JOIN(name, x), FLOATS)

/* How numbers are made codes. Tables of two sides are for sums above the number of a code, and 256 entries on for those below. */
struct recoding {
  const struct codes *codes;
  const struct codes *units;  /* the same, but that its spreads multiply with the unit of an element */
  const int64_t *shifts;      /* (each) at which bit of its byte each code stands */
  int64_t bits;
  const double *numbers;      /* (256) what a code stands for, of which `values`, (count), are those in order, */
  const double *values;
  const uint8_t *names;       /* (2, count) and the code of each: of what is positive, and of what is negative; */
  int64_t count, nearest;     /* whether all go to the nearer one, or as drawn */
  const float *gaps;          /* (2, 256) 1 / the distance to the next number, negative where that is nearer to zero */
  const float *distances;     /* (2, 256) that distance, with its sign, or 0 */
  const uint32_t *pairs;      /* (2, 256) the code of what stays with this number; from bit 8 on that of what moves to the next; */
                              /* bit 16: whether the first is another code than this one */
  int64_t mantissa, exponent; /* of codes that are floats with a sign: bits, and the smallest exponent; -1 for others */
  double slack;               /* more than what operations in float64 lose, in units */
  double widening;            /* by how much the job's bounds are too small for its way of summing */
  uint8_t *out;               /* room for rows of bytes, */
  uint8_t *old, *made;        /* for the codes of a row, twice, */
  float *inverse, *unit;      /* and for 1 / the unit of each element of a row, and the unit */
  double dot, square;         /* out: the inner products of kept, of the last rows */
};
const int lorafold_recoding_bytes = sizeof(struct recoding);

/* What a code must stand for, so that it states `number` at row `i` of the spreads. */
static double undone(const struct codes *codes, int64_t i, int64_t j, double number) {
  for (int64_t n = codes->count - 1; n >= 0; n--) {
    const struct spread *spread = codes->spreads + n;
    double other = spread_at(spread, i, j, codes->columns);
    if (spread->how == by_subtraction) number += other;
    else if (spread->how == by_multiplication) number /= other;
    else number *= other;
  }
  return number;
}

/* The place in `values` of what `x` goes to. */
static int64_t place_of(const struct recoding *how, double x, double drawn) {
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
  int64_t place = low + (how->nearest ? share > 0.5 || (share == 0.5 && (low & 1)) : share > drawn);
  return mirrored ? last - place : place;
}

/* What `code` states at row `i` of the spreads. */
static double stated(const struct recoding *how, int64_t i, int64_t j, int code) {
  double number = how->numbers[code];
  for (int64_t n = 0; n < how->codes->count; n++) {
    const struct spread *spread = how->codes->spreads + n;
    double other = spread_at(spread, i, j, how->codes->columns);
    if (spread->how == by_subtraction) number -= other;
    else if (spread->how == by_multiplication) number *= other;
    else number /= other;
  }
  return number;
}

/* W + dW of the element (i, j), correctly rounded; whether that could be done. */
static int nearest_sum(const struct job *job, int64_t i, int64_t j, double weight, double *total) {
  const int64_t width = VECTORS * FLOATS;
  const float *a = (const float *)job->packed_A + j / width * width * job->r + j % width;
  int64_t b = (job->B_row + i) * job->B_row_stride;
  struct expansion sum = {{weight}, weight != 0};
  for (int64_t k = 0; k < job->r; k++, a += width, b += job->B_stride)
    if (!add_products(&sum, number_at(job->given_B, b, job->B_dtype), job->scaling[k], *a)) return 0;
  *total = nearest_total(&sum);
  return isfinite(*total);
}

/* The code of an element of the old code `code`, or -1 where that is left to others: what is far out of range is to be counted, and what
 * is no number refused. `first`: row 0 of the job. */
COLD int settled_code(const struct recoding *how, const struct job *job, int64_t first, int64_t i, int64_t j, int code, double drawn) {
  double weight = stated(how, first + i, j, code), number;
  if (!isfinite(weight) || !nearest_sum(job, i, j, weight, &number)) return -1;
  if (number == weight) return code;
  double x = undone(how->codes, first + i, j, number), far = (how->values[how->count - 1] - how->values[0]) / 2;
  if (isnan(x)) return code;
  if (!isfinite(x) || x > how->values[how->count - 1] + far || x < how->values[0] - far) return -1;
  return how->names[place_of(how, x, drawn) + (signbit(x) ? how->count : 0)];
}

/* What the elements from `first` on have drawn, as floats. */
INLINE floats limits(const struct job *job, uint64_t first) {
  return __builtin_convertvector((i32s)(OF_FLOATS(drawn_)(first, job->key) >> 9 << 1 | 1), floats) * 0x1p-24f;
}

INLINE floats absolute(floats x) { return (floats)((u32s)x & 0x7fffffff); }

INLINE floats among(u32s mask, floats x) { return (floats)((u32s)x & mask); }

INLINE u32s bytes_at(const uint8_t *memory) {
  u8s bytes;
  memcpy(&bytes, memory, sizeof bytes);
#if defined(__AVX512F__)
  return (u32s)_mm512_cvtepu8_epi32((__m128i)bytes);
#else
  return __builtin_convertvector(bytes, u32s);
#endif
}

INLINE void put_bytes(u32s x, uint8_t *memory) {
#if defined(__AVX512F__)
  _mm_storeu_si128((__m128i *)memory, _mm512_cvtepi32_epi8((__m512i)x));
#else
  u8s bytes = __builtin_convertvector(x, u8s);
  memcpy(memory, &bytes, sizeof bytes);
#endif
}

/* What the tables have for codes of a side, of which all bits are set in `below`. */
INLINE void look_up(const struct recoding *how, u32s old, u32s below, int narrow, floats *gap, floats *distance, u32s *pair) {
#if defined(__AVX512F__)
  if (narrow) {
    __m512i index = (__m512i)(old | (below & 16));
    *distance = (floats)_mm512_permutex2var_ps(_mm512_loadu_ps(how->distances), index, _mm512_loadu_ps(how->distances + 256));
    *gap = (floats)_mm512_permutex2var_ps(_mm512_loadu_ps(how->gaps), index, _mm512_loadu_ps(how->gaps + 256));
    *pair = (u32s)_mm512_permutex2var_epi32(_mm512_loadu_si512(how->pairs), index, _mm512_loadu_si512(how->pairs + 256));
  } else {
    *gap = (floats)_mm512_i32gather_ps((__m512i)(old | (below & 256)), how->gaps, 4);
    *distance = (floats)_mm512_i32gather_ps((__m512i)(old | (below & 256)), how->distances, 4);
    *pair = (u32s)_mm512_i32gather_epi32((__m512i)(old | (below & 256)), how->pairs, 4);
  }
#elif defined(__AVX2__)
  *gap = (floats)_mm256_i32gather_ps(how->gaps, (__m256i)(old | (below & 256)), 4);
  *distance = (floats)_mm256_i32gather_ps(how->distances, (__m256i)(old | (below & 256)), 4);
  *pair = (u32s)_mm256_i32gather_epi32((const int *)how->pairs, (__m256i)(old | (below & 256)), 4);
#else
  uint32_t index[FLOATS], pairs[FLOATS];
  float gaps[FLOATS], distances[FLOATS];
  old |= below & 256;
  memcpy(index, &old, sizeof index);
  for (int lane = 0; lane < FLOATS; lane++) {
    gaps[lane] = how->gaps[index[lane]];
    distances[lane] = how->distances[index[lane]];
    pairs[lane] = how->pairs[index[lane]];
  }
  memcpy(gap, gaps, sizeof gaps);
  memcpy(distance, distances, sizeof distances);
  memcpy(pair, pairs, sizeof pairs);
#endif
}

/* The new codes of FLOATS elements in a table, the lanes of which are left to settled_code, and by how many units each number moves. */
INLINE u32s by_table(const struct recoding *how, u32s old, int narrow, floats d, floats error, floats drawn, u32s *left, floats *by) {
  floats gap, distance;
  u32s pair;
  look_up(how, old, (u32s)(d < 0), narrow, &gap, &distance, &pair);
  u32s inward = (u32s)((i32s)gap < 0);
  gap = absolute(gap);
  floats size = absolute(d), m = size * gap;
  floats t = (floats)(((u32s)drawn & ~inward) | ((u32s)(1 - drawn) & inward));
  u32s moved = (u32s)(m > t), same = (u32s)((pair & 0x10000) == 0);
  *left = ~((u32s)(absolute(m - t) > t * 0x1p-20f + error * gap) & (u32s)(m < 1 - 0x1p-10f) & (same | (u32s)(size > error)));
  *by = among(moved, distance);
  return (((pair >> 8) & moved) | (pair & ~moved)) & 0xff;
}

/* The same where codes are floats of a sign, `exponent` and `mantissa`. */
INLINE u32s by_steps(const struct recoding *how, u32s old, floats d, floats error, floats drawn, u32s *left, floats *by) {
  u32s bias = (u32s){0} + (uint32_t)((253 + how->exponent) << 23); /* of 2^126 times the step from one exponent to the next */
  floats largest = (floats){0} + (float)how->values[how->count - 1];
  floats before = (floats)((old & 0x7f) << (23 - how->mantissa)) * (floats)bias;
  u32s unknown = (u32s)(before > largest);
  before = (floats)((u32s)before | (old & 0x80) << 24);
  floats x = before + d, size = absolute(x);
  u32s sign = (u32s)x & 0x80000000;
  u32s out = (u32s)(size > largest), far = ~(u32s)(size < largest * 1.99f);
  size = (floats)(((u32s)size & ~out) | ((u32s)largest & out));
  u32s least = (u32s){0} + (uint32_t)((127 + how->exponent) << 23), power = (u32s)size & 0x7f800000, under = (u32s)(power < least);
  power = (power & ~under) | (least & under);
  u32s one = (u32s){0} + (uint32_t)((254 + how->mantissa) << 23), back = (u32s){0} + (uint32_t)(how->mantissa << 23);
  floats per_step = (floats)(one - power), step = (floats)(power - back), steps = size * per_step;
  i32s low = __builtin_convertvector(steps, i32s);
  floats share = steps - __builtin_convertvector(low, floats);
  low -= (i32s)(share > drawn);
  u32s code = (u32s)low + (((power - least) >> 23) << how->mantissa), zero = (u32s)(code == 0);
  uint32_t unsigned_zero = how->names[how->count + how->count / 2] ? 0 : 0xffffffff;
  code |= (sign >> 24) & ~(zero & unsigned_zero);
  *left = ((u32s)(absolute(share - drawn) <= 0x1p-16f + error * per_step) & ~out) | far | unknown | (zero & (u32s)((old & 0x7f) == 0));
  *by = (floats)((u32s)(__builtin_convertvector(low, floats) * step) | sign) - before;
  return code;
}

/* One row of a job; whether all of it could be done. */
INLINE int recoded_row(struct recoding *how, const struct job *job, int64_t first, int64_t i, const uint8_t *old, uint8_t *made, int safe,
                       int floating, int narrow) {
  int64_t columns = job->columns;
  const float *delta = (const float *)job->out + i * columns;
  float bound = ((const float *)job->row_errors)[i] * (float)(job->largest_column_error * how->widening) * (1 + 0x1p-20f) + 0x1p-140f;
  uint64_t place = job->first + (uint64_t)(i * columns);
  const struct recoding local = *how; /* which no store can change */
  floats slack = (floats){0} + (float)how->slack, dots = {0};
  JOIN(doublex, DOUBLES) square = {0};
  for (int64_t j = 0; j < columns; j += FLOATS) {
    int64_t width = columns - j < FLOATS ? columns - j : FLOATS;
    uint32_t open = (uint32_t)(((uint64_t)1 << width) - 1);
    floats drawn = (floats){0} + 0.5f;
    if (!local.nearest) drawn = limits(job, place + j);
    if (width == FLOATS) {
      floats change, inverse, unit, by;
      memcpy(&change, delta + j, sizeof change);
      for (int64_t k = j; k < j + FLOATS; k += DOUBLES) square += JOIN(floats_atx, DOUBLES)(delta + k) * JOIN(floats_atx, DOUBLES)(delta + k);
      if (safe) {
        memcpy(&inverse, local.inverse + j, sizeof inverse);
        memcpy(&unit, local.unit + j, sizeof unit);
        floats d = change * inverse, error = bound * absolute(inverse) + slack;
        u32s before = bytes_at(old + j), left, code;
        if (floating) code = by_steps(&local, before, d, error, drawn, &left, &by);
        else code = by_table(&local, before, narrow, d, error, drawn, &left, &by);
        put_bytes(code, made + j);
        dots += among((u32s)(code != before) & ~left, by * change * unit);
        open = OF_FLOATS(lanes_)(left);
      }
    } else
      for (int64_t k = j; k < j + width; k++) square[0] += (double)delta[k] * delta[k];
    for (; __builtin_expect(open != 0, 0); open &= open - 1) {
      int lane = __builtin_ctz(open);
      int64_t k = j + lane;
      int code = settled_code(how, job, first, i, k, old[k], drawn[lane]);
      if (code < 0) return 0;
      made[k] = code;
      if (code != old[k]) how->dot += (stated(how, first + i, k, code) - stated(how, first + i, k, old[k])) * delta[k];
    }
  }
  for (int lane = 0; lane < DOUBLES; lane++) how->square += square[lane];
  for (int lane = 0; lane < FLOATS; lane++) how->dot += dots[lane];
  return isfinite(how->square + how->dot);
}

/* The codes of a row one by one, and back. */
static void unpack(const struct recoding *how, int64_t each, int64_t columns, const uint8_t *from, uint8_t *to) {
  int64_t b = 0;
  int mask = (1 << how->bits) - 1;
#if !defined(__BYTE_ORDER__) || __BYTE_ORDER__ != __ORDER_BIG_ENDIAN__
  if (each == 2)
    for (int one = how->shifts[0], other = how->shifts[1]; b + FLOATS <= columns / 2; b += FLOATS) {
      u8s bytes;
      memcpy(&bytes, from + b, sizeof bytes);
      u16s both = __builtin_convertvector(bytes, u16s);
      both = ((both >> one) & 15) | ((both >> other) & 15) << 8;
      memcpy(to + 2 * b, &both, sizeof both);
    }
#endif
  for (; b < columns / each; b++)
    for (int64_t k = 0; k < each; k++) to[b * each + k] = from[b] >> how->shifts[k] & mask;
}
static void pack(const struct recoding *how, int64_t each, int64_t columns, const uint8_t *from, uint8_t *to) {
  int64_t b = 0;
#if !defined(__BYTE_ORDER__) || __BYTE_ORDER__ != __ORDER_BIG_ENDIAN__
  if (each == 2)
    for (int one = how->shifts[0], other = how->shifts[1]; b + FLOATS <= columns / 2; b += FLOATS) {
      u16s both;
      memcpy(&both, from + 2 * b, sizeof both);
      u8s bytes = __builtin_convertvector(((both & 15) << one) | ((both >> 8) << other), u8s);
      memcpy(to + b, &bytes, sizeof bytes);
    }
#endif
  for (; b < columns / each; b++) {
    int byte = 0;
    for (int64_t k = 0; k < each; k++) byte |= from[b * each + k] << how->shifts[k];
    to[b] = byte;
  }
}

/* Multiply `out`, or where it `fills` fill it, with the numbers of `spread` for row `i`, and `inverse` with 1 / these; whether none of them
 * is too small or large to be multiplied as a float. */
static int multiply_row(const struct spread *spread, int64_t i, int64_t columns, float *out, float *inverse, int fills) {
  int safe = 1;
  int64_t place = spread->column_skipped + (spread->rows ? 0 : i * columns);
  const double *numbers = spread->numbers + (spread->rows ? (i + spread->row_skipped) / spread->rows * spread->stride : 0);
  numbers += place / spread->columns;
  place %= spread->columns;
  for (int64_t j = 0; j < columns; numbers++, place = 0) {
    int64_t end = j + spread->columns - place < columns ? j + spread->columns - place : columns;
    float number = (float)*numbers, size = fabsf(number), other = (float)(1 / *numbers);
    safe &= size >= 0x1p-40f && size <= 0x1p40f;
    if (fills) for (int64_t k = j; k < end; k++) out[k] = number;
    else for (int64_t k = j; k < end; k++) out[k] *= number;
    if (fills) for (; j < end; j++) inverse[j] = other;
    else for (; j < end; j++) inverse[j] *= other;
  }
  return safe;
}

/* 1 / the unit of each element of row `i` of the spreads; whether floats are enough for them. */
static int inverse_row(struct recoding *how, int64_t i) {
  const struct codes *units = how->units;
  int safe = 1;
  if (!units->count) for (int64_t j = 0; j < units->columns; j++) how->inverse[j] = how->unit[j] = 1;
  for (int64_t n = 0; n < units->count; n++) safe &= multiply_row(units->spreads + n, i, units->columns, how->unit, how->inverse, n == 0);
  return safe;
}

/* Whether rows `i` and the one before have the same units. */
static int same_units(const struct codes *units, int64_t i) {
  for (int64_t n = 0; n < units->count; n++) {
    const struct spread *spread = units->spreads + n;
    if (!spread->rows || (i + spread->row_skipped) % spread->rows == 0) return 0;
  }
  return 1;
}

/* Make codes of the sums that `job` has made of its weight, and put them into `out` as `raw` has those of the weight; whether that could
 * be done. `first`: which row of the spreads is the job's first. */
static int recoded_rows(struct recoding *how, const struct job *job, int64_t first, const uint8_t *raw) {
  const struct codes *codes = how->codes;
  int64_t columns = codes->columns, each = codes->each;
  int safe = 0;
  how->dot = how->square = 0;
  memcpy(how->out, raw, job->rows * codes->row_bytes);
  for (int64_t i = 0; i < job->rows; i++, raw += codes->row_bytes) {
    uint8_t *to = how->out + i * codes->row_bytes;
    if (i == 0 || !same_units(how->units, first + i)) safe = inverse_row(how, first + i);
    if (each == 1) {
      if (how->mantissa >= 0 ? !recoded_row(how, job, first, i, raw, to, safe, 1, 0) : !recoded_row(how, job, first, i, raw, to, safe, 0, 0)) return 0;
    } else {
      unpack(how, each, columns, raw, how->old);
      if (!recoded_row(how, job, first, i, how->old, how->made, safe, 0, 1)) return 0;
      pack(how, each, columns, how->made, to);
    }
  }
  return 1;
}

static int recoded(struct recoding *how, const struct job *job, int64_t first, const uint8_t *raw) {
  environment_t before = entered();
  int whole = recoded_rows(how, job, first, raw);
  left(before);
  return whole;
}

#undef floats
#undef u32s
#undef u16s
#undef i32s
#undef OF_FLOATS
