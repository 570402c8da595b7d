/* A merge from file to file: some rows are read, merged, and written or compared with what was written, and then the next, so that what
 * goes through stays in the processor's cache. In tensors of some megabytes it would leave it three times.
 */

/* What is made of the rows, and where it goes. */
struct sink {
  void (*function)(struct job *); /* of the job, */
  const struct job *job;          /* which is of all rows, but that its weight and its out are room for `each` rows; the first is shared */
  int64_t wide;                   /* bytes of a packed number */
  int64_t to, to_at, to_row;      /* the file that is written, or compared: its descriptor, the byte of its first row, bytes of a row */
  char *found;                    /* null, or room for all rows as they stand in `to`: nothing is written then */
  double dot, square;             /* out: the sums of those of the jobs, */
  double last_dot, last_square;   /* and those of the last */
  struct recoding *recoding;      /* null, or how codes are made of what the job makes, which go to the file then */
};

/* Rows that are read once for all sinks. */
struct stream {
  int64_t from, from_at, from_row; /* the file that is read */
  int64_t rows, each;              /* all of them, and at once, a multiple of ROWS */
  struct sink *sinks;
  int64_t count;
  int64_t done;                    /* out: rows that went through */
  char *raw;                       /* null, or room for what is read, where that is not the weight itself; */
  const struct codes *codes;       /* null, or how the weight is made of it */
};
const int lorafold_sink_bytes = sizeof(struct sink), lorafold_stream_bytes = sizeof(struct stream);

#if !defined(_WIN32)
#include <unistd.h>

static int all_read(int fd, char *memory, int64_t count, int64_t at) {
  for (ssize_t step; count > 0; memory += step, count -= step, at += step)
    if ((step = pread(fd, memory, count, at)) <= 0) return 0;
  return 1;
}

static int all_written(int fd, const char *memory, int64_t count, int64_t at) {
  for (ssize_t step; count > 0; memory += step, count -= step, at += step)
    if ((step = pwrite(fd, memory, count, at)) <= 0) return 0;
  return 1;
}

/* The rows from `i` on, of which the weight was read; whether they went through. */
static int through_sink(const struct stream *stream, struct sink *sink, int64_t i) {
  const struct job *whole = sink->job;
  struct job job = *whole;
  job.rows = stream->rows - i < stream->each ? stream->rows - i : stream->each;
  job.packed_B = (const char *)whole->packed_B + i * whole->r * sink->wide;
  job.first += (uint64_t)(i * whole->columns);
  if (whole->row_errors) { /* `exact` */
    job.row_errors = (const char *)whole->row_errors + i * sink->wide;
    job.scaled_B = whole->scaled_B + i * whole->r;
    job.B_row = whole->B_row + i;
    if (whole->packed_rest) job.packed_rest = whole->packed_rest + i * whole->r;
  }
  sink->function(&job);
  if (job.column < job.columns || job.undecided_count || !isfinite(job.dot + job.square)) return 0;
  const void *made = job.out;
  if (sink->recoding) {
    if (!recoded(sink->recoding, &job, i, (const uint8_t *)stream->raw)) return 0;
    made = sink->recoding->out;
    job.dot = sink->recoding->dot;
    job.square = sink->recoding->square;
  }
  sink->last_dot = job.dot;
  sink->last_square = job.square;
  int64_t count = job.rows * sink->to_row, at = sink->to_at + i * sink->to_row;
  if (!sink->found) return all_written(sink->to, made, count, at);
  char *found = sink->found + i * sink->to_row;
  return all_read(sink->to, found, count, at) && !memcmp(found, made, count);
}

/* Go on until all rows are done, or the next are not for this way: they cannot be read or written, are not the same, are not finite, or
 * some sum of theirs stays undecided. What it was is for those to find out who do them in another way. */
void lorafold_stream(struct stream *stream) {
  for (int64_t i = stream->done = 0; i < stream->rows; i = stream->done) {
    int64_t count = stream->rows - i < stream->each ? stream->rows - i : stream->each;
    char *weight = (char *)stream->sinks->job->weight, *room = stream->raw ? stream->raw : weight;
    if (!all_read(stream->from, room, count * stream->from_row, stream->from_at + i * stream->from_row)) return;
    if (stream->codes) {
      environment_t before = entered();
      decode_rows(stream->codes, i, count, (const uint8_t *)room, (double *)weight);
      left(before);
    }
    for (int64_t n = 0; n < stream->count; n++)
      if (!through_sink(stream, stream->sinks + n, i)) return;
    for (int64_t n = 0; n < stream->count; n++) {
      stream->sinks[n].dot += stream->sinks[n].last_dot;
      stream->sinks[n].square += stream->sinks[n].last_square;
    }
    stream->done = i + count;
  }
}
#endif
