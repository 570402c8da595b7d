/* A merge from file to file: some rows are read, merged, and written or compared with what was written, and then the next, so that what
 * goes through stays in the processor's cache. In tensors of some megabytes it would leave it three times.
 */
struct passage {
  void (*function)(struct job *);  /* of the job, */
  const struct job *job;           /* which is of all rows, but that its weight and its out are room for `each` rows */
  int64_t from, from_at, from_row; /* the file that is read: its descriptor, the byte where the first row begins, the bytes of a row */
  int64_t to, to_at, to_row;       /* the file that is written, or compared */
  char *found;                     /* null, or room for all rows as they stand in `to`: nothing is written then */
  int64_t wide;                    /* bytes of a packed number */
  int64_t each;                    /* rows at once, a multiple of ROWS */
  int64_t done;                    /* out: rows that went through */
  double dot, square;              /* out: the sums of those of their jobs */
};
const int lorafold_passage_bytes = sizeof(struct passage);

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

/* Go on until all rows are done, or the next are not for this way: they cannot be read or written, are not the same, are not finite, or
 * some sum of theirs stays open. What it was is for those to find out who do them in another way. */
void lorafold_passage(struct passage *passage) {
  const struct job *whole = passage->job;
  passage->dot = passage->square = 0;
  for (int64_t i = passage->done = 0; i < whole->rows; i = passage->done) {
    struct job job = *whole;
    job.rows = whole->rows - i < passage->each ? whole->rows - i : passage->each;
    job.packed_B = (const char *)whole->packed_B + i * whole->r * passage->wide;
    if (whole->row_errors) { /* `exact` */
      job.row_errors = (const char *)whole->row_errors + i * passage->wide;
      job.scaled_B = whole->scaled_B + i * whole->r;
      job.B_row = whole->B_row + i;
    }
    int64_t count = job.rows * passage->to_row, at = passage->to_at + i * passage->to_row;
    if (!all_read(passage->from, (char *)job.weight, job.rows * passage->from_row, passage->from_at + i * passage->from_row)) return;
    passage->function(&job);
    if (job.column < job.columns || job.opened || !isfinite(job.dot + job.square)) return;
    if (passage->found) {
      char *found = passage->found + i * passage->to_row;
      if (!all_read(passage->to, found, count, at) || memcmp(found, job.out, count)) return;
    } else if (!all_written(passage->to, job.out, count, at)) {
      return;
    }
    passage->dot += job.dot;
    passage->square += job.square;
    passage->done = i + job.rows;
  }
}
#endif
