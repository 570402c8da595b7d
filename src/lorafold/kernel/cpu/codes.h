/* Quantised weights: codes of a few bits, and what is done to the numbers that they stand for, made numbers in float64 a row at a time.
 *
 * Operations are those of the expressions that encodings are (`checkpoints/encodings`), in their order, each of them rounded to float64
 * by itself; so the bits are the same. Nothing is fused: each operation is a pass over a row, which stays in the processor's cache.
 */
#define MOST_SPREADS 8

/* Numbers that stand once for each block of a matrix, and what they do to every element of it. */
struct spread {
  const double *numbers; /* of all blocks, row after row */
  int64_t stride;        /* blocks in a row of them */
  int64_t rows, columns; /* of a block; where `rows` is zero, blocks are `columns` numbers of all rows one after another */
  int64_t row_skipped, column_skipped; /* what of the first block lies before the matrix */
  int64_t how;           /* by_subtraction and so on */
};
enum { by_subtraction, by_multiplication, by_division };

/* Rows of codes, which begin with whole bytes. */
struct codes {
  const double *table;   /* (256, each) the numbers of what a byte holds */
  int64_t each, columns; /* codes of a byte, and of a row, a multiple of it */
  int64_t row_bytes;     /* of a row, and maybe more than its codes take */
  const struct spread *spreads;
  int64_t count;         /* of them, the first of which is done first */
  double *room;          /* (count, columns) */
};
const int lorafold_spread_bytes = sizeof(struct spread), lorafold_codes_bytes = sizeof(struct codes);
const int lorafold_most_spreads = MOST_SPREADS;

/* The numbers of `spread` for each element of row `i`, where these are not those of the row before. */
static void spread_row(const struct spread *spread, int64_t i, int64_t columns, double *out, int64_t *last) {
  int64_t place = spread->column_skipped, block = 0;
  if (spread->rows) {
    block = (i + spread->row_skipped) / spread->rows;
    if (block == *last) return;
    *last = block;
    block *= spread->stride;
  } else place += i * columns;
  const double *numbers = spread->numbers + block + place / spread->columns;
  place %= spread->columns;
  for (int64_t j = 0; j < columns; numbers++, place = 0) {
    int64_t end = j + spread->columns - place < columns ? j + spread->columns - place : columns;
    for (double number = *numbers; j < end; j++) out[j] = number;
  }
}

/* The one for the element (i, j). */
INLINE double spread_at(const struct spread *spread, int64_t i, int64_t j, int64_t columns) {
  int64_t place = j + spread->column_skipped, block = 0;
  if (spread->rows) block = (i + spread->row_skipped) / spread->rows * spread->stride;
  else place += i * columns;
  return spread->numbers[block + place / spread->columns];
}

INLINE void apply(int64_t how, int64_t columns, const double *numbers, double *to) {
  if (how == by_subtraction) for (int64_t j = 0; j < columns; j++) to[j] -= numbers[j];
  else if (how == by_multiplication) for (int64_t j = 0; j < columns; j++) to[j] *= numbers[j];
  else for (int64_t j = 0; j < columns; j++) to[j] /= numbers[j];
}

/* The numbers of `count` rows of codes, of which the first is row `first` of the spreads. */
static void decode_rows(const struct codes *codes, int64_t first, int64_t count, const uint8_t *from, double *to) {
  int64_t columns = codes->columns, each = codes->each, last[MOST_SPREADS];
  const double *table = codes->table;
  for (int n = 0; n < MOST_SPREADS; n++) last[n] = -1;
  for (int64_t i = 0; i < count; i++, from += codes->row_bytes, to += columns) {
    if (each == 1) for (int64_t j = 0; j < columns; j++) to[j] = table[from[j]];
    else if (each == 2) for (int64_t j = 0; j < columns / 2; j++) memcpy(to + 2 * j, table + 2 * from[j], 2 * sizeof *to);
    else for (int64_t j = 0; j < columns / each; j++) memcpy(to + each * j, table + each * from[j], each * sizeof *to);
    for (int64_t n = 0; n < codes->count; n++) {
      double *numbers = codes->room + n * columns;
      spread_row(codes->spreads + n, first + i, columns, numbers, last + n);
      apply(codes->spreads[n].how, columns, numbers, to);
    }
  }
}

/* The same for rows in memory. */
struct decoding {
  const struct codes *codes;
  const void *from;
  double *out;
  int64_t rows;
};
const int lorafold_decoding_bytes = sizeof(struct decoding);

void lorafold_decode(struct decoding *job) {
  environment_t before = entered();
  decode_rows(job->codes, 0, job->rows, job->from, job->out);
  left(before);
}
