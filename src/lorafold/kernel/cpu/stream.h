/* A merge from file to file: some rows are read, merged, and written or compared with what was written, and then the next, so that what
 * goes through stays in the processor's cache. In tensors of some megabytes it would leave it three times.
 */

/* What is made of the rows, and where it goes. */
struct end {
  void (*function)(struct job *); /* of the job, */
  const struct job *job;          /* which is of all rows, but that its weight and its out are room for `each` rows; the first is shared */
  int64_t wide;                   /* bytes of a packed number */
  int64_t to, to_at, to_row;      /* the file that is written, or compared: its descriptor, the byte of its first row, bytes of a row */
  char *found;                    /* null, or room for all rows as they stand in `to`: nothing is written then */
  double dot, square;             /* out: the sums of those of the jobs, */
  double last_dot, last_square;   /* and those of the last */
};

/* Rows that are read once for all ends. */
struct passage {
  int64_t from, from_at, from_row; /* the file that is read */
  int64_t rows, each;              /* all of them, and at once, a multiple of ROWS */
  struct end *ends;
  int64_t count;
  int64_t done;                    /* out: rows that went through */
};
const int lorafold_end_bytes = sizeof(struct end), lorafold_passage_bytes = sizeof(struct passage);

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
static int ended(const struct passage *passage, struct end *end, int64_t i) {
  const struct job *whole = end->job;
  struct job job = *whole;
  job.rows = passage->rows - i < passage->each ? passage->rows - i : passage->each;
  job.packed_B = (const char *)whole->packed_B + i * whole->r * end->wide;
  if (whole->row_errors) { /* `exact` */
    job.row_errors = (const char *)whole->row_errors + i * end->wide;
    job.scaled_B = whole->scaled_B + i * whole->r;
    job.B_row = whole->B_row + i;
  }
  end->function(&job);
  if (job.column < job.columns || job.opened || !isfinite(job.dot + job.square)) return 0;
  end->last_dot = job.dot;
  end->last_square = job.square;
  int64_t count = job.rows * end->to_row, at = end->to_at + i * end->to_row;
  if (!end->found) return all_written(end->to, job.out, count, at);
  char *found = end->found + i * end->to_row;
  return all_read(end->to, found, count, at) && !memcmp(found, job.out, count);
}

/* Go on until all rows are done, or the next are not for this way: they cannot be read or written, are not the same, are not finite, or
 * some sum of theirs stays open. What it was is for those to find out who do them in another way. */
void lorafold_passage(struct passage *passage) {
  for (int64_t i = passage->done = 0; i < passage->rows; i = passage->done) {
    int64_t count = passage->rows - i < passage->each ? passage->rows - i : passage->each;
    char *weight = (char *)passage->ends->job->weight;
    if (!all_read(passage->from, weight, count * passage->from_row, passage->from_at + i * passage->from_row)) return;
    for (int64_t end = 0; end < passage->count; end++)
      if (!ended(passage, passage->ends + end, i)) return;
    for (int64_t end = 0; end < passage->count; end++) {
      passage->ends[end].dot += passage->ends[end].last_dot;
      passage->ends[end].square += passage->ends[end].last_square;
    }
    passage->done = i + count;
  }
}
#endif
