/* OFT and BOFT: the rows of a weight rotated, in groups, and rounded once; kernel/rotations.py defines the sums. A panel of columns of a
 * group goes through all stages in float64, and is stored.
 */
#define ROTATED (32 * 1024) /* numbers of a panel, about */

/* Some rows of one weight: whole groups, of which those from `low` to `high` are stored. */
struct rotation {
  struct rows all;
  const double *packed;     /* (stages, blocks, tiles of ROWS, size, ROWS) what rows of blocks are multiplied with, missing rows zero */
  const double *rescale;    /* (rows) what rows are multiplied by in the end, or null */
  int64_t stages, blocks, size;
  int64_t butterfly;        /* whether stage n takes rows that lie 2^n size / 2 apart; else rows one after another */
  int64_t group;            /* rows that depend on each other */
  int64_t low, high;        /* rows of the whole matrix */
  double *room;             /* for a panel of a group, twice */
  double *dots, *squares;   /* out, or null: (rows) of the whole matrix, the inner products of each row */
};
const int lorafold_rotation_bytes = sizeof(struct rotation);

/* One block of a stage: `size` rows of `from` multiplied with a matrix, and put where they were in `to`. */
static void rotate_block(const struct rotation *job, int64_t stage, int64_t first, const double *matrix, const double *from, double *to,
                         int64_t width) {
  const int64_t shift = job->butterfly != 0, stride = (job->size << stage) / 2, within = first % (2 * stride);
  const int64_t start = shift ? first - within / 2 : first;
#define PLACE(k) (start + ((k) >> shift) + ((k) & shift) * stride) * width
  for (int64_t tile = 0; tile < job->size; tile += ROWS, matrix += ROWS * job->size)
    for (int64_t j = 0; j < width; j += BLOCK) {
      doubles sums[ROWS][VECTORS];
      const double *m = matrix;
      UNROLL for (int row = 0; row < ROWS; row++) UNROLL for (int v = 0; v < VECTORS; v++) sums[row][v] = (doubles){0};
      for (int64_t k = 0; k < job->size; k++, m += ROWS) {
        doubles w[VECTORS];
        UNROLL for (int v = 0; v < VECTORS; v++) w[v] = at(from + PLACE(k) + j + v * DOUBLES);
        UNROLL for (int row = 0; row < ROWS; row++) UNROLL for (int v = 0; v < VECTORS; v++) sums[row][v] += separate(w[v] * m[row]);
      }
      for (int row = 0; row < ROWS && tile + row < job->size; row++) memcpy(to + PLACE(tile + row) + j, sums[row], sizeof sums[row]);
    }
#undef PLACE
}

/* Store `count` columns from `start` on of row `i` of the job, which were `base`. */
INLINE void store_rotated(struct rotation *job, int64_t i, int64_t start, int64_t count, const double *value, int dtype, int width) {
  struct rows *all = &job->all;
  double wide[ROTATED / 8], factor = job->rescale ? job->rescale[all->row + i] : 1;
  char *out = (char *)all->out + (i * all->out_stride + start) * width;
  doubles dot = {0}, square = {0};
  widen_numbers(all->weight, i * all->weight_stride + start, wide, count, all->weight_dtype);
  for (int64_t j = count; j % DOUBLES; j++) wide[j] = 0;
  for (int64_t j = 0; j < count; j += DOUBLES) {
    doubles x = separate(at(value + j) * factor) + 0.0, w = at(wide + j), merged, moved = x - w; /* a zero is +0 */
    char edge[DOUBLES * sizeof(double)];
    int whole = j + DOUBLES <= count;
    void *place = whole ? out + j * width : edge;
    if (width == 2 && all->stochastic) merged = stored_half(noised(x, drawn_here(all, i, start + j), dtype), place, dtype);
    else merged = stored(x, place, dtype);
    if (!whole) memcpy(out + j * width, edge, (count - j) * width);
    dot += (merged - w) * moved;
    square += moved * moved;
  }
  double dots = 0, squares = 0;
  for (int lane = 0; lane < DOUBLES; lane++) {
    dots += dot[lane];
    squares += square[lane];
  }
  all->dot += dots;
  all->square += squares;
  if (job->dots) {
    job->dots[all->row + i] += dots;
    job->squares[all->row + i] += squares;
  }
}

/* Columns of a panel: whole blocks. */
INLINE int64_t panel_of(const struct rotation *job) {
  int64_t width = ROTATED / job->group / BLOCK * BLOCK;
  return width < BLOCK ? BLOCK : width > ROTATED / 8 ? ROTATED / 8 : width;
}

static void rotate_panel(struct rotation *job, int64_t i, int64_t start, int64_t count) {
  struct rows *all = &job->all;
  int64_t width = whole_blocks(count), tiles = (job->size + ROWS - 1) / ROWS * ROWS * job->size;
  double *from = job->room, *to = from + job->group * width;
  for (int64_t row = 0; row < job->group; row++) {
    widen_numbers(all->weight, (i + row) * all->weight_stride + start, from + row * width, count, all->weight_dtype);
    for (int64_t j = count; j < width; j++) from[row * width + j] = 0;
  }
  for (int64_t stage = 0; stage < job->stages; stage++) {
    for (int64_t first = 0; first < job->group; first += job->size) {
      int64_t block = stage * job->blocks + (all->row + i + first) / job->size;
      rotate_block(job, stage, first, job->packed + block * tiles, from, to, width);
    }
    double *swapped = from;
    from = to;
    to = swapped;
  }
  for (int64_t row = 0; row < job->group; row++) {
    if (all->row + i + row < job->low || all->row + i + row >= job->high) continue;
#define OF(kind, bytes) case kind: store_rotated(job, i + row, start, count, from + row * width, kind, bytes); break;
    switch (all->out_dtype) { OF(of_f64, 8) OF(of_f32, 4) OF(of_f16, 2) OF(of_bf16, 2) }
#undef OF
  }
}

void lorafold_rotate(struct rows *all) {
  struct rotation *job = (struct rotation *)all; /* of which they are the first */
  environment_t before = entered();
  int64_t panel = panel_of(job);
  all->dot = all->square = all->undecided = 0;
  for (int64_t i = 0; i < all->rows; i += job->group)
    for (int64_t start = 0; start < all->columns; start += panel)
      rotate_panel(job, i, start, all->columns - start < panel ? all->columns - start : panel);
  left(before);
}

int64_t lorafold_rotation_room(int64_t group, int64_t columns) { /* numbers of a job's room */
  struct rotation job = {.group = group};
  int64_t panel = panel_of(&job), whole = whole_blocks(columns);
  return 2 * group * (panel < whole ? panel : whole);
}
