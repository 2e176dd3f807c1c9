/* Mean and M2, the sum of squared differences from the mean, of each channel, in one read of the values.

   A block of values is widened to float64, and its differences d from a shift are summed, and their squares. Its M2 is
   sum d^2 - (sum d)^2 / n, and blocks are merged by the formula of Chan, Golub and LeVeque (1979). The shift is the mean
   of the blocks before (for the first one of a chunk, that of the first block of all, the origin). So what cancels is
   harmless: a block whose mean is apart from a shift adds at least n/2 apart^2 to the M2 of all values, because no fewer
   stand at the shift; in all, sum d^2 is at most 3 M2, and 2 M2 more for each chunk. Means are kept as
   differences from the origin, so large ones lose nothing either.

   How values are cut into chunks, blocks and lanes depends on the shape alone, and every sum has one order; so the result
   is the same for any number of threads and any width of vectors. */

#include <pthread.h>
#include <stdlib.h>

#include "widen.h"

#define LANES 16          /* sums of adjacent values of one channel */
#define LONGEST (4 << 10) /* adjacent values of a block, at most */
#define ROWS_OF_BLOCK 64  /* of all channels: enough to make merging cheap */
#define CHUNKS 32         /* at most; a chunk is the work of one thread */
#define AHEAD (8 << 10)   /* bytes that are asked for before they are used; a processor by itself looks less far */
#define SHARE (128 << 10) /* values that are worth a thread: to start it takes 20 us */

/* ---- sums of the columns of a table ---- */

typedef struct {
    Code code;
    const void *x;
    size_t at, step, rows; /* the first row, the distance to the next one, and their number */
    const double *shift;   /* of each column */
} Table;

/* Add to SUM and SQUARES, for each column from FIRST to N, the differences of all rows from the shift, and their squares.
   Takes as many columns at a time as a vector has, and returns the first one that is left. */
#define COLUMNS(NAME, TARGET, VALUE, WIDEN, TYPE)                                                                      \
    TARGET INLINE void NAME##_rows(const void *restrict x, size_t at, size_t step, const double *restrict shift,       \
                                   double *restrict sum, double *restrict squares, size_t first, size_t n, int four) { \
        for (size_t i = first; i + sizeof(VALUE) / sizeof(double) <= n; i += sizeof(VALUE) / sizeof(double)) {         \
            VALUE less, total, square, d0, d1, d2, d3;                                                                 \
            memcpy(&less, shift + i, sizeof less);                                                                     \
            memcpy(&total, sum + i, sizeof total);                                                                     \
            memcpy(&square, squares + i, sizeof square);                                                               \
            d0 = WIDEN(x, at + i) - less;                                                                              \
            if (four) {                                                                                                \
                for (int k = 0; k < 4; k++)                                                                            \
                    __builtin_prefetch((const TYPE *)x + at + (size_t)k * step + i + AHEAD / sizeof(TYPE));            \
                d1 = WIDEN(x, at + step + i) - less;                                                                   \
                d2 = WIDEN(x, at + 2 * step + i) - less;                                                               \
                d3 = WIDEN(x, at + 3 * step + i) - less;                                                               \
                total += (d0 + d1) + (d2 + d3);                                                                        \
                square += (d0 * d0 + d1 * d1) + (d2 * d2 + d3 * d3);                                                   \
            } else total += d0, square += d0 * d0;                                                                     \
            memcpy(sum + i, &total, sizeof total);                                                                     \
            memcpy(squares + i, &square, sizeof square);                                                               \
        }                                                                                                              \
    }                                                                                                                  \
    TARGET static size_t NAME(const Table *t, double *sum, double *squares, size_t first, size_t n) {                  \
        size_t r = 0;                                                                                                  \
        for (; r + 4 <= t->rows; r += 4)                                                                               \
            NAME##_rows(t->x, t->at + r * t->step, t->step, t->shift, sum, squares, first, n, 1);                      \
        for (; r < t->rows; r++)                                                                                       \
            NAME##_rows(t->x, t->at + r * t->step, t->step, t->shift, sum, squares, first, n, 0);                      \
        return n - (n - first) % (sizeof(VALUE) / sizeof(double));                                                     \
    }
#define EACH_DTYPE(DO) \
    DO(FLOAT64, float64, double) DO(FLOAT32, float32, float) DO(BFLOAT16, bfloat16, uint16_t) DO(FLOAT16, float16, uint16_t)
#ifdef X86
#define IN_VECTORS(NAME, TYPE)                                  \
    COLUMNS(NAME##_by_eight, AVX512, Eight, eight_##NAME, TYPE) \
    COLUMNS(NAME##_by_four, AVX2, Four, four_##NAME, TYPE)
#define TRY_VECTORS(NAME)                                         \
    if (avx512) i = NAME##_by_eight(table, sum, squares, i, n); \
    if (avx2) i = NAME##_by_four(table, sum, squares, i, n);
#else
#define IN_VECTORS(NAME, TYPE)
#define TRY_VECTORS(NAME)
#endif
#define ALL_COLUMNS(CODE, NAME, TYPE)                                                        \
    IN_VECTORS(NAME, TYPE)                                                                   \
    COLUMNS(NAME##_one_by_one, , double, from_##NAME, TYPE)                                  \
    static void NAME##_columns(const Table *table, double *sum, double *squares, size_t n) { \
        size_t i = 0;                                                                        \
        TRY_VECTORS(NAME)                                                                    \
        if (i < n) NAME##_one_by_one(table, sum, squares, i, n);                             \
    }
EACH_DTYPE(ALL_COLUMNS)

static void add_columns(const Table *table, double *sum, double *squares, size_t n) {
#define COLUMNS_CASE(CODE, NAME, TYPE) \
    case CODE: NAME##_columns(table, sum, squares, n); break;
    switch (table->code) {
        EACH_DTYPE(COLUMNS_CASE)
        default: break;
    }
}

static double value_at(Code code, const void *x, size_t i) {
#define VALUE_CASE(CODE, NAME, TYPE) \
    case CODE: return from_##NAME(x, i);
    switch (code) {
        EACH_DTYPE(VALUE_CASE)
        default: return 0;
    }
}

/* Sum up N adjacent values, in lanes, which are added in one order. */
static void add_adjacent(Code code, const void *x, size_t at, size_t n, double shift, double *sum, double *squares) {
    double sums[LANES] = {0}, squared[LANES] = {0}, shifts[LANES];
    for (size_t i = 0; i < LANES; i++) shifts[i] = shift;
    Table whole = {code, x, at, LANES, n / LANES, shifts}, rest = {code, x, at + n / LANES * LANES, LANES, 1, shifts};
    add_columns(&whole, sums, squared, LANES);
    add_columns(&rest, sums, squared, n % LANES);
    for (size_t half = LANES / 2; half; half /= 2)
        for (size_t i = 0; i < half; i++) sums[i] += sums[i + half], squared[i] += squared[i + half];
    *sum = sums[0], *squares = squared[0];
}

/* ---- merging ---- */

/* Merge the means and M2s of N channels, of ADDED values each, into those of COUNT values. */
static void merge(double *restrict mean, double *restrict m2, size_t count, const double *restrict added_mean,
                  const double *restrict added_m2, size_t added, size_t n) {
    double share = (double)added / (double)(count + added), weight = (double)count * share;
    for (size_t i = 0; i < n; i++) {
        double apart = added_mean[i] - mean[i];
        mean[i] += apart * share;
        m2[i] += added_m2[i] + apart * apart * weight;
    }
}

/* The same for a block, from its sums about a shift; mean and shift are as far apart from the origin. */
static void merge_block(double *restrict mean, double *restrict m2, size_t count, const double *restrict origin,
                        const double *restrict shift, const double *restrict sum, const double *restrict squares,
                        size_t added, size_t n) {
    double share = (double)added / (double)(count + added), weight = (double)count * share, each = 1 / (double)added;
    for (size_t i = 0; i < n; i++) {
        double offset = sum[i] * each, apart = (shift[i] - origin[i] - mean[i]) + offset;
        double within = squares[i] - sum[i] * offset;
        mean[i] += apart * share;
        m2[i] += (within < 0 ? 0 : within) + apart * apart * weight; /* below 0 by rounding; NaN stays */
    }
}

/* ---- chunks ---- */

typedef struct {
    Code code;
    const void *x; /* [outer, channels, inner] */
    size_t outer, channels, inner;
    double *origin;
    size_t chunks, rows; /* rows of a chunk, if INNER is 1 */
    double *mean, *m2;   /* of each channel, less the origin; if INNER is 1, of each chunk and channel */
    size_t next;         /* the first chunk that no thread has taken */
} Job;

/* Some rows of all channels: a block of them is summed column by column. SCRATCH holds three rows. */
static void chunk_of_rows(const Job *job, size_t chunk, double *scratch) {
    const size_t n = job->channels, first = chunk * job->rows;
    const size_t count = job->outer - first < job->rows ? job->outer - first : job->rows;
    double *mean = job->mean + chunk * n, *m2 = job->m2 + chunk * n;
    double *shift = scratch, *sum = scratch + n, *squares = scratch + 2 * n;
    for (size_t done = 0, some; done < count; done += some) {
        some = count - done < ROWS_OF_BLOCK ? count - done : ROWS_OF_BLOCK;
        memset(sum, 0, 2 * n * sizeof *sum);
        for (size_t i = 0; i < n; i++) shift[i] = job->origin[i] + mean[i];
        Table block = {job->code, job->x, (first + done) * n, n, some, shift};
        add_columns(&block, sum, squares, n);
        merge_block(mean, m2, done, job->origin, shift, sum, squares, some, n);
    }
}

/* Some channels of all images: a block is adjacent values of one image and channel. */
static void chunk_of_channels(const Job *job, size_t chunk) {
    const size_t begin = job->channels * chunk / job->chunks, end = job->channels * (chunk + 1) / job->chunks;
    double sum, squares;
    for (size_t image = 0; image < job->outer; image++)
        for (size_t c = begin; c < end; c++)
            for (size_t done = 0, some; done < job->inner; done += some) {
                size_t at = (image * job->channels + c) * job->inner + done;
                double shift = job->origin[c] + job->mean[c];
                some = job->inner - done < LONGEST ? job->inner - done : LONGEST;
                add_adjacent(job->code, job->x, at, some, shift, &sum, &squares);
                merge_block(job->mean + c, job->m2 + c, image * job->inner + done, job->origin + c, &shift, &sum,
                            &squares, some, 1);
            }
}

/* Set the origin to the mean of the first block of all. SCRATCH holds three rows. */
static void find_origin(const Job *job, double *scratch) {
    const size_t n = job->channels;
    double *sum = scratch + n, *squares = scratch + 2 * n;
    for (size_t c = 0; c < n; c++) scratch[c] = value_at(job->code, job->x, c * job->inner);
    size_t some = job->outer < ROWS_OF_BLOCK ? job->outer : ROWS_OF_BLOCK;
    memset(sum, 0, 2 * n * sizeof *sum);
    if (job->inner == 1) {
        Table block = {job->code, job->x, 0, n, some, scratch};
        add_columns(&block, sum, squares, n);
    } else {
        some = job->inner < LONGEST ? job->inner : LONGEST;
        for (size_t c = 0; c < n; c++)
            add_adjacent(job->code, job->x, c * job->inner, some, scratch[c], sum + c, squares + c);
    }
    for (size_t c = 0; c < n; c++) job->origin[c] = scratch[c] + sum[c] / (double)some;
}

typedef struct {
    Job *job;
    double *scratch;
} Thread;

static void *work(void *argument) {
    Thread *thread = argument;
    Job *job = thread->job;
    for (;;) {
        size_t chunk = __atomic_fetch_add(&job->next, 1, __ATOMIC_RELAXED);
        if (chunk >= job->chunks) return NULL;
        if (job->inner == 1) chunk_of_rows(job, chunk, thread->scratch);
        else chunk_of_channels(job, chunk);
    }
}

/* ---- all of it ---- */

int moments(Code code, const void *x, size_t outer, size_t channels, size_t inner, size_t threads, double *result) {
    Job job = {.code = code, .x = x, .outer = outer, .channels = channels, .inner = inner, .chunks = channels, .next = 0};
    double *mean = result, *m2 = result + channels;
    if (job.chunks > CHUNKS) job.chunks = CHUNKS;
    if (inner == 1) { /* whole blocks to each chunk */
        size_t blocks = (outer + ROWS_OF_BLOCK - 1) / ROWS_OF_BLOCK;
        job.rows = (blocks + CHUNKS - 1) / CHUNKS * ROWS_OF_BLOCK;
        job.chunks = (outer + job.rows - 1) / job.rows;
    }
    size_t shares = outer * channels * inner / SHARE + 1;
    if (threads > shares) threads = shares;
    if (threads > job.chunks) threads = job.chunks;
    if (threads < 1) threads = 1;
    /* The origin; mean and M2 of each chunk, unless they go to the result; three rows for each thread. */
    size_t kept = inner == 1 ? 2 * job.chunks : 0;
    double *memory = calloc((1 + kept + 3 * threads) * channels, sizeof *memory), *scratch;
    if (!memory) return 0;
    scratch = memory + (1 + kept) * channels;
    memset(result, 0, 2 * channels * sizeof *result);
    job.origin = memory;
    job.mean = inner == 1 ? memory + channels : mean;
    job.m2 = inner == 1 ? job.mean + job.chunks * channels : m2;
    find_origin(&job, scratch);

    pthread_t started[CHUNKS];
    Thread each[CHUNKS];
    size_t running = 1; /* this one works, too */
    for (size_t t = 0; t < threads; t++) each[t] = (Thread){&job, scratch + 3 * t * channels};
    while (running < threads && !pthread_create(&started[running], NULL, work, &each[running])) running++;
    work(&each[0]);
    while (running-- > 1) pthread_join(started[running], NULL);

    for (size_t k = 0, done = 0; inner == 1 && k < job.chunks; k++) {
        size_t rows = outer - done < job.rows ? outer - done : job.rows;
        merge(mean, m2, done, job.mean + k * channels, job.m2 + k * channels, rows, channels);
        done += rows;
    }
    for (size_t c = 0; c < channels; c++) mean[c] += job.origin[c];
    free(memory);
    return 1;
}
