/* DoRA and its like: W + dW in float64, the lengths of its rows or columns, and what comes of rescaling it by them, rounded once. What
 * is added, multiplied and rounded, and in which order, is defined in wide.py and in the rescale.py beside it; here it is done with the
 * same bits, a strip of ROWS rows at a time, which stay in the processor's cache while their lengths are summed.
 *
 * A compiler may fuse a product and an addition, which rounds once and not twice. It must not where the product is rounded: those go
 * through `separate`. Products of numbers that floats hold are not rounded in float64, so theirs may be fused.
 */
#define SUMS 64 /* of squares, side by side: of the columns j, j + 64, j + 128 ... */

#define doubles JOIN(doublex, DOUBLES)
#define u64s JOIN(u64x, DOUBLES)
#define floats JOIN(floatx, DOUBLES)
#define u16s JOIN(u16x, DOUBLES)
#define u32s JOIN(u32x, DOUBLES)
#define OF_DOUBLES(name) JOIN(JOIN(name, x), DOUBLES)
#define BLOCK (VECTORS * DOUBLES)

/* What one update does to what there is: value <- keep * value + factor * (value + dW), a factor for each row or each column. */
struct stage {
  const double *packed_B;  /* (rows / ROWS, r, ROWS), missing rows zero */
  const void *packed_A;    /* (columns / BLOCK, r, BLOCK) float where `narrow`, or double; missing columns zero */
  const double *magnitude; /* (rows) the lengths that rows are brought to, or null */
  const double *factors;   /* (columns, zeros up to a whole block) the factors of columns, or null; with neither they are 1 */
  int64_t r, narrow, from_sum;
  double scaling, strength, eps, keep;
};

/* Some rows of one weight. */
struct rescaling {
  const void *weight;          /* (rows, columns), each row contiguous */
  void *out;                   /* the same, elsewhere; null where only `column_squares` are asked for */
  const struct stage *stages;  /* of the whole matrix, of which the rows */
  int64_t row;                 /* are those from `row` on, a multiple of ROWS */
  int64_t count;               /* stages */
  int64_t weight_dtype, out_dtype, weight_stride, out_stride, rows, columns;
  double *room;                /* for ROWS rows of whole blocks, three times, all of it finite numbers */
  double *column_squares;      /* (columns, up to a whole block) null, or where the squares of the first stage's sums are added */
  double dot, square;          /* out: the inner products of kept */
};

/* And from file to file: rows are read, rescaled, and written or compared with what was written. */
struct rescale_stream {
  const struct rescaling *job;     /* of all rows, but that its weight and its out are room for `each` rows */
  int64_t from, from_at, from_row; /* the file that is read: its descriptor, the byte of the first row, bytes of a row */
  int64_t to, to_at, to_row;       /* the file that is written, or compared */
  char *found;                     /* null, or room for all rows as they stand in `to`: nothing is written then */
  int64_t rows, each;              /* all of them, and at once, a multiple of ROWS */
  int64_t done;                    /* out: rows that went through */
  double dot, square;              /* out: the sums of those of the rows */
};
const int lorafold_stage_bytes = sizeof(struct stage), lorafold_rescaling_bytes = sizeof(struct rescaling);
const int lorafold_rescale_stream_bytes = sizeof(struct rescale_stream);

/* x, of which the compiler knows nothing from here on. */
#if defined(__AVX512F__)
#define SEPARATE "+v"
#elif defined(__x86_64__)
#define SEPARATE "+x"
#elif defined(__aarch64__)
#define SEPARATE "+w"
#endif
#if defined(SEPARATE)
INLINE doubles separate(doubles x) {
  __asm__("" : SEPARATE(x));
  return x;
}
INLINE double separate_one(double x) {
  __asm__("" : SEPARATE(x));
  return x;
}
#else
INLINE doubles separate(doubles x) {
  volatile doubles there = x;
  return there;
}
INLINE double separate_one(double x) {
  volatile double there = x;
  return there;
}
#endif

INLINE doubles at(const double *memory) { return OF_DOUBLES(doubles_at)(memory); }

/* Whether any x is neither zero nor a normal float. */
INLINE int any_tiny(doubles x) {
#if defined(__AVX512F__)
  return _mm512_mask_cmp_pd_mask(_mm512_test_epi64_mask((__m512i)x, (__m512i)x), (__m512d)OF_DOUBLES(absolute_double)(x),
                                 _mm512_set1_pd(0x1p-126), _CMP_LT_OQ) != 0;
#elif defined(__AVX2__)
  return _mm256_movemask_pd((__m256d)((OF_DOUBLES(absolute_double)(x) < 0x1p-126) & (x != 0))) != 0;
#else
  for (int lane = 0; lane < DOUBLES; lane++)
    if (fabs(x[lane]) < 0x1p-126 && x[lane] != 0) return 1;
  return 0;
#endif
}

/* x rounded to odd, as floats: they stand for x in a rounding to fewer bits. */
INLINE floats odd_floats(doubles x) {
  const uint64_t lost = 0x1fffffff;
  u64s bits = (u64s)x;
  doubles odd = (doubles)((bits | ((bits & lost) + lost)) & ~lost);
  floats single = __builtin_convertvector(odd, floats);
  if (__builtin_expect(any_tiny(x), 0))
    for (int lane = 0; lane < DOUBLES; lane++) single[lane] = odd_float(x[lane]);
  return single;
}

/* x rounded once and stored, and as it is then. */
INLINE doubles stored_bf16(doubles x, void *out) {
  floats merged;
  u16s bits = OF_DOUBLES(rounded_bf16)(odd_floats(x), &merged);
  memcpy(out, &bits, sizeof bits);
  return __builtin_convertvector(merged, doubles);
}
INLINE doubles stored_f16(doubles x, void *out) {
  floats merged;
  u16s bits = OF_DOUBLES(rounded_f16)(odd_floats(x), &merged);
  memcpy(out, &bits, sizeof bits);
  return __builtin_convertvector(merged, doubles);
}
INLINE doubles stored_f32(doubles x, void *out) {
  floats merged = __builtin_convertvector(x, floats);
  memcpy(out, &merged, sizeof merged);
  return __builtin_convertvector(merged, doubles);
}
INLINE doubles stored_f64(doubles x, void *out) {
  memcpy(out, &x, sizeof x);
  return x;
}
INLINE doubles stored(doubles x, void *out, int dtype) {
  return dtype == of_bf16 ? stored_bf16(x, out) : dtype == of_f16 ? stored_f16(x, out) : dtype == of_f32 ? stored_f32(x, out) : stored_f64(x, out);
}

/* `count` numbers in float64. */
INLINE void widen_row(const void *row, double *wide, int64_t count, int dtype) {
  int64_t j = 0;
  for (; j + DOUBLES <= count; j += DOUBLES) {
    doubles x;
    if (dtype == of_f64) x = at((const double *)row + j);
    else if (dtype == of_f32) x = OF_DOUBLES(floats_at)((const float *)row + j);
    else {
      u16s bits;
      memcpy(&bits, (const uint16_t *)row + j, sizeof bits);
      x = __builtin_convertvector(dtype == of_f16 ? OF_DOUBLES(widen_f16)(bits) : OF_DOUBLES(widen_bf16)(bits), doubles);
    }
    memcpy(wide + j, &x, sizeof x);
  }
  for (; j < count; j++) wide[j] = number_at(row, j, dtype);
}

static void widened(const struct rescaling *job, int64_t i, int64_t height, double *wide, int64_t whole) {
  for (int64_t row = 0; row < height; row++) {
    int64_t first = (i + row) * job->weight_stride;
    double *to = wide + row * whole;
#define OF(kind, stored_t) \
  case kind: widen_row((const stored_t *)job->weight + first, to, job->columns, kind); break;
    switch (job->weight_dtype) { OF(of_f64, double) OF(of_f32, float) OF(of_f16, uint16_t) OF(of_bf16, uint16_t) }
#undef OF
  }
}

/* The sums of ROWS rows, value + dW, from row `i` of the stage's matrix on, and the squares of those of base + dW. */
INLINE void summed(const struct stage *stage, int64_t i, const double *base, const double *value, double *total, int64_t whole,
                   double (*squares)[SUMS], int narrow, int first) {
  const double *b_start = stage->packed_B + i * stage->r;
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

/* Store one row. */
INLINE void store_row(struct rescaling *job, const struct stage *stage, double factor, const double *base, const double *value,
                      const double *total, char *out, int dtype, int width) {
  doubles dot = {0}, square = {0};
  for (int64_t j = 0; j < job->columns; j += DOUBLES) {
    doubles w = at(base + j), x = rescaled(stage, factor, j, value, total) + 0.0; /* a zero is +0 */
    char edge[DOUBLES * sizeof(double)];
    int whole = j + DOUBLES <= job->columns;
    doubles merged = stored(x, whole ? out + j * width : edge, dtype), moved = x - w;
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
  double *base = job->room, *total = base + ROWS * whole, *value = total + ROWS * whole;
  widened(job, i, height, base, whole);
  for (int64_t n = 0; n < job->count; n++) {
    const struct stage *stage = job->stages + n;
    const double *before = n ? value : base;
    double squares[ROWS][SUMS] = {0};
    int64_t row_of_stage = job->row + i;
#define OF(narrow, first) summed(stage, row_of_stage, base, before, total, whole, squares, narrow, first)
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
      double factor = 1;
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
  case kind: store_row(job, stage, factor, w, of_row, sums, (char *)job->out + (i + row) * job->out_stride * width, kind, width); break;
      switch (job->out_dtype) { OF(of_f64, 8) OF(of_f32, 4) OF(of_f16, 2) OF(of_bf16, 2) }
#undef OF
    }
  }
}

void lorafold_rescale(struct rescaling *job) {
  environment_t before = entered();
  int64_t whole = (job->columns + BLOCK - 1) / BLOCK * BLOCK;
  job->dot = job->square = 0;
  for (int64_t i = 0; i < job->rows; i += ROWS) rescale_strip(job, i, job->rows - i < ROWS ? job->rows - i : ROWS, whole);
  left(before);
}

#if !defined(_WIN32)
/* Go on until all rows are done, or the next are not for this way: they cannot be read or written, are not the same, or not finite. */
void lorafold_rescale_stream(struct rescale_stream *stream) {
  stream->dot = stream->square = 0;
  for (int64_t i = stream->done = 0; i < stream->rows; i = stream->done) {
    int64_t count = stream->rows - i < stream->each ? stream->rows - i : stream->each;
    struct rescaling job = *stream->job;
    job.rows = count;
    job.row += i;
    if (!all_read(stream->from, (char *)job.weight, count * stream->from_row, stream->from_at + i * stream->from_row)) return;
    lorafold_rescale(&job);
    if (job.out) {
      int64_t bytes = count * stream->to_row, place = stream->to_at + i * stream->to_row;
      if (!isfinite(job.dot + job.square)) return;
      if (stream->found) {
        char *found = stream->found + i * stream->to_row;
        if (!all_read(stream->to, found, bytes, place) || memcmp(found, job.out, bytes)) return;
      } else if (!all_written(stream->to, job.out, bytes, place)) return;
    }
    stream->dot += job.dot;
    stream->square += job.square;
    stream->done = i + count;
  }
}
#endif

#undef doubles
#undef u64s
#undef floats
#undef u16s
#undef u32s
#undef OF_DOUBLES
#undef BLOCK
