/* What works on rows in float64 and stores them rounded once: rescale.h, elementwise.h and rotate.h. Here is what these have in common: rows
 * widened, numbers stored, and the way from file to file.
 *
 * A compiler may fuse a product and an addition, which rounds once and not twice. It must not where the product is rounded and that is
 * told: those go through `separate`. Products of numbers that floats hold are not rounded in float64, so theirs may be fused.
 */
#define doubles JOIN(doublex, DOUBLES)
#define u64s JOIN(u64x, DOUBLES)
#define floats JOIN(floatx, DOUBLES)
#define u16s JOIN(u16x, DOUBLES)
#define u32s JOIN(u32x, DOUBLES)
#define OF_DOUBLES(name) JOIN(JOIN(name, x), DOUBLES)
#define BLOCK (VECTORS * DOUBLES)

/* Some rows of one weight, each contiguous; the first of every job. */
struct rows {
  const void *weight;              /* (rows, columns) */
  void *out;                       /* the same, elsewhere; null where nothing is stored */
  int64_t weight_dtype, out_dtype, weight_stride, out_stride, rows, columns;
  int64_t row;                     /* which row of what is done they begin with */
  int64_t stochastic;              /* whether they are rounded so: */
  uint64_t first, key;             /* the whole tensor's index of the first element of row 0, and what draws */
  double dot, square;              /* out: the inner products of kept */
  int64_t undecided;               /* out: sums that are left to others */
};

/* And from file to file: rows are read, worked on, and written or compared with what was written. */
struct row_stream {
  void (*function)(struct rows *); /* of the job */
  struct rows *job;                /* its weight and its out are room for `each` rows */
  int64_t from, from_at, from_row; /* the file that is read: its descriptor, the byte of the first row, bytes of a row */
  int64_t to, to_at, to_row;       /* the file that is written, or compared */
  char *found;                     /* null, or room for all rows as they stand in `to`: nothing is written then */
  int64_t rows, each;              /* all of them, and at once, a multiple of what belongs together */
  int64_t low, high;               /* which of them are stored: the others are only read */
  int64_t done;                    /* out: rows that are stored */
  double dot, square;              /* out: the sums of those of the rows */
};
const int lorafold_row_stream_bytes = sizeof(struct row_stream);

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

/* x rounded once and stored, and as it is then; where it is drawn for, by way of float32. */
INLINE doubles stored_half(floats x, void *out, int dtype) {
  floats merged;
  u16s bits = dtype == of_bf16 ? OF_DOUBLES(rounded_bf16)(x, &merged) : OF_DOUBLES(rounded_f16)(x, &merged);
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
INLINE floats noised(doubles x, u32s drawn, int dtype) {
  floats single = __builtin_convertvector(x, floats);
  return dtype == of_bf16 ? OF_DOUBLES(noised_bf16)(single, drawn) : OF_DOUBLES(noised_f16)(single, drawn);
}
INLINE doubles stored(doubles x, void *out, int dtype) {
  return dtype == of_f64 ? stored_f64(x, out) : dtype == of_f32 ? stored_f32(x, out) : stored_half(odd_floats(x), out, dtype);
}

/* The lanes in which bits of a and b differ. */
INLINE uint32_t differing(doubles a, doubles b) {
#if defined(__AVX512F__)
  return _mm512_cmpneq_epi64_mask((__m512i)a, (__m512i)b);
#elif defined(__AVX2__)
  return _mm256_movemask_pd((__m256d)((u64s)a != (u64s)b));
#else
  uint32_t lanes = 0;
  for (int lane = 0; lane < DOUBLES; lane++) lanes |= (uint32_t)(((u64s)a)[lane] != ((u64s)b)[lane]) << lane;
  return lanes;
#endif
}

/* The lanes in which |x| is `limit` or more; none that are NaN. */
INLINE uint32_t at_least(doubles x, doubles limit) {
#if defined(__AVX512F__)
  return _mm512_cmp_pd_mask((__m512d)OF_DOUBLES(absolute_double)(x), (__m512d)limit, _CMP_GE_OQ);
#elif defined(__AVX2__)
  return _mm256_movemask_pd((__m256d)(OF_DOUBLES(absolute_double)(x) >= limit));
#else
  uint32_t lanes = 0;
  for (int lane = 0; lane < DOUBLES; lane++) lanes |= (uint32_t)(fabs(x[lane]) >= limit[lane]) << lane;
  return lanes;
#endif
}

/* What lanes draw that begin with the column `j` of row `i` of the job. */
INLINE u32s drawn_here(const struct rows *job, int64_t i, int64_t j) {
  return OF_DOUBLES(drawn_)(job->first + (uint64_t)((job->row + i) * job->columns + j), job->key);
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

/* `count` numbers of any dtype from number `first` on, in float64. */
INLINE void widen_numbers(const void *numbers, int64_t first, double *wide, int64_t count, int64_t dtype) {
  switch (dtype) {
    case of_f64: widen_row((const double *)numbers + first, wide, count, of_f64); break;
    case of_f32: widen_row((const float *)numbers + first, wide, count, of_f32); break;
    case of_f16: widen_row((const uint16_t *)numbers + first, wide, count, of_f16); break;
    default: widen_row((const uint16_t *)numbers + first, wide, count, of_bf16);
  }
}

#if !defined(_WIN32)
/* Go on until all rows are done, or the next are not for this way: they cannot be read or written, are not the same, not finite, or some
 * are left undecided. */
void lorafold_row_stream(struct row_stream *stream) {
  struct rows *job = stream->job;
  int64_t row = job->row;
  stream->dot = stream->square = stream->done = 0;
  for (int64_t i = 0; i < stream->rows; i += stream->each) {
    job->rows = stream->rows - i < stream->each ? stream->rows - i : stream->each;
    job->row = row + i;
    if (!all_read(stream->from, (char *)job->weight, job->rows * stream->from_row, stream->from_at + i * stream->from_row)) return;
    stream->function(job);
    int64_t low = i < stream->low ? stream->low : i, high = i + job->rows < stream->high ? i + job->rows : stream->high;
    if (job->out) {
      int64_t bytes = (high - low) * stream->to_row, here = (low - stream->low) * stream->to_row;
      const char *made = (const char *)job->out + (low - i) * stream->to_row;
      if (job->undecided || !isfinite(job->dot + job->square)) return;
      if (stream->found) {
        if (!all_read(stream->to, stream->found + here, bytes, stream->to_at + here) || memcmp(stream->found + here, made, bytes)) return;
      } else if (!all_written(stream->to, made, bytes, stream->to_at + here)) return;
    }
    stream->dot += job->dot;
    stream->square += job->square;
    stream->done = high - stream->low;
  }
}
#endif
