/* Numbers in float64 that nothing is added to, rounded once: jobs as tile.h has them, of which only the dtypes count. Where a number is not
 * finite, before or after, the inner products are not: what becomes of it is for others to say.
 */
#define doubles JOIN(doublex, DOUBLES)

INLINE void cast_rows(struct job *job, int dtype, int64_t width) {
  environment_t before = entered();
  doubles sum = {0};
  for (int64_t i = 0; i < job->rows; i++) {
    const double *from = (const double *)job->weight + i * job->weight_stride;
    char *to = (char *)job->out + i * job->out_stride * width;
    for (int64_t j = 0; j < job->columns; j += DOUBLES) {
      int64_t count = job->columns - j < DOUBLES ? job->columns - j : DOUBLES;
      doubles x = {0};
      char edge[DOUBLES * sizeof(double)];
      memcpy(&x, from + j, count < DOUBLES ? count * sizeof *from : sizeof x);
      doubles merged = stored(x, count < DOUBLES ? edge : to + j * width, dtype);
      if (count < DOUBLES) memcpy(to + j * width, edge, count * width);
      sum += merged * 0 + x * 0;
    }
  }
  job->dot = job->square = 0;
  for (int lane = 0; lane < DOUBLES; lane++) job->dot += sum[lane];
  job->column = job->columns;
  job->undecided_count = 0;
  left(before);
}

void lorafold_f64_bf16_cast(struct job *job) { cast_rows(job, of_bf16, 2); }
void lorafold_f64_f16_cast(struct job *job) { cast_rows(job, of_f16, 2); }
void lorafold_f64_f32_cast(struct job *job) { cast_rows(job, of_f32, 4); }
void lorafold_f64_f64_cast(struct job *job) { cast_rows(job, of_f64, 8); }

#undef doubles
