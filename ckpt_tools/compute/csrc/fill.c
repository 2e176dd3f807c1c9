/* Weighted sums from files to files. A slice is read from each input in turn in blocks that stay in a core's cache,
   added up in float64, rounded once, checked, and written. Each input byte crosses memory once, whatever the number of
   rows, and no more than some blocks are held.

   For several rows, a block is summed strip by strip: the terms of a strip are widened once, four at a time, and added
   to the sums of each row, all of which stay in the first cache. A row goes the same steps as if it were the only one.
   Exact sums (exact.c) go strip by strip in any case, for each is four numbers. */

#include <errno.h>
#include <string.h>

#include "native.h"

static Result failed(Status status, size_t slice, size_t term) {
    Result result = {status, slice, term, status == DONE ? 0 : errno};
    return result;
}

/* The scratch of a thread, and its parts. */
typedef struct {
    size_t read;   /* bytes of one input in a block */
    size_t batch;  /* terms that are read before they are added */
    size_t window; /* bytes of a row that are written in one call */
    char *x, *spare, *results, *written;
    double *sum, *wide;
    size_t end; /* of all */
} Memory;

/* Add to a pointer that is NULL if only sizes are asked for, where C has no such sum. */
static char *behind(char *scratch, size_t nbytes) {
    return (char *)((uintptr_t)scratch + nbytes);
}

/* Lay out scratch: blocks of a batch of terms, the sums of a block, four terms of a strip; then, for slices, a window of
   each row; for tiles, a block in another order, the results of a block, and those of the tile. */
static Memory lay_out(size_t rows, int tiles, char *scratch) {
    Memory m = {.read = rows <= 8 ? READ : READ / 2, .batch = rows == 1 ? 4 : 8};
    m.window = WINDOW / rows < READ ? READ : WINDOW / rows & ~(size_t)(READ - 1);
    m.x = scratch, m.end = m.batch * m.read;
    m.sum = (double *)behind(scratch, m.end), m.end += rows * 4 * m.read;
    m.wide = (double *)behind(scratch, m.end), m.end += 4 * STRIP * sizeof(double);
    m.spare = behind(scratch, m.end), m.end += tiles ? m.read : 0;
    m.results = behind(scratch, m.end), m.end += rows * (tiles ? 4 * m.read : m.window + 64);
    m.written = behind(scratch, m.end), m.end += tiles ? TILE : 0;
    return m;
}

size_t scratch_needed(size_t rows, int tiles) {
    size_t needed = lay_out(rows, tiles, NULL).end + 64;
    return tiles || needed > SMALL ? needed : SMALL;
}

/* Return the numbers that are kept for each sum. */
static size_t kept(const Formula *f) { return f->exact ? EXACT : 1; }

/* Elements of a block: the reals of a term take READ bytes at most, their sums 4 * READ in each row. */
static size_t block_of(const Formula *f) {
    size_t read = lay_out(f->rows, 0, NULL).read;
    if (f->copied) return read / f->item;
    size_t least = 2 * kept(f);
    return read / (f->widest < least ? least : f->widest) / f->out->reals;
}

/* A box of a tile, as large as a block. */
typedef struct {
    Tile box;
    int64_t begin[AXES], sizes[AXES]; /* in the tile */
    int64_t packed[AXES]; /* strides of the block in memory: the order of the first term, in which it is summed */
    char *spare;          /* for a term that has another order */
} Block;

static int64_t inner_product(size_t n, const int64_t *a, const int64_t *b) {
    int64_t sum = 0;
    for (size_t i = 0; i < n; i++) sum += a[i] * b[i];
    return sum;
}

/* Read elements [done, done + n) of a term of a slice, or a block of a tile. */
static Status read_term(const Block *block, size_t term, Place in, size_t item, size_t done, size_t n, char *to) {
    if (!block) return read_all(in.fd, to, n * item, in.offset + (int64_t)(done * item));
    size_t axes = block->box.axes;
    const int64_t *strides = block->box.strides + (1 + term) * axes;
    int64_t packed[AXES];
    pack_strides(&block->box, strides, packed);
    in.offset += inner_product(axes, block->begin, strides) * (int64_t)item;
    if (memcmp(packed, block->packed, axes * sizeof *packed) == 0)
        return read_tile(&block->box, strides, in, item, to);
    Status status = read_tile(&block->box, strides, in, item, block->spare);
    if (status == DONE) permute(&block->box, item, packed, block->packed, block->spare, to);
    return status;
}

/* Return row R of sums: those of a row follow STRIDE behind those of the row before; all `high`, then all `low`, ... */
static Exact row_of(const Formula *f, size_t r, double *sum, size_t stride) {
    double *own = sum + r * stride;
    size_t step = f->rows * stride;
    return (Exact){own, own + step, own + 2 * step, own + 3 * step};
}

/* Add the terms to the sums of a row. VALUES: of the terms, of this dtype. */
static void add_to_row(const Formula *f, size_t r, size_t term, size_t count, Code code, const void *const *values,
                       size_t n, double *sum, size_t stride) {
    const double *c = f->coefficients + r * f->count + term;
    const char *used = f->used + r * f->count + term;
    const Row *row = &f->row[r];
    Terms terms = {.count = 0};
    for (size_t k = 0; k < count; k++)
        if (used[k]) terms.x[terms.count] = values[k], terms.c[terms.count++] = c[k];
    if (!terms.count) return;
    if (row->kind == PLAIN) add(code, sum + r * stride, &terms, n, row->first >= term);
    else add_exact(row->kind, row_of(f, r, sum, stride), &terms, n, row->first >= term, row->lost);
}

/* Turn the sums of a row into what `narrow` rounds; return the factor that is left. */
static double finish_row(const Formula *f, size_t r, size_t n, double *sum, size_t stride) {
    const Row *row = &f->row[r];
    if (row->kind == PLAIN) return row->last;
    finish_exact(row->kind, row_of(f, r, sum, stride), n, row->last, f->out->code != FLOAT64);
    return 1.0;
}

/* Add COUNT terms of one dtype, four at most, to the sums of N numbers; see `row_of`. */
static void add_four(const Formula *f, size_t term, size_t count, const void *const *x, size_t n, double *sum,
                     size_t stride, double *wide) {
    Code code = f->dtypes[term]->code;
    if (f->rows == 1 && !f->exact) {
        add_to_row(f, 0, term, count, code, x, n, sum, stride);
        return;
    }
    FourTerms whole[2][ROWS]; /* rows that use all four: those that have begun, and those that begin here */
    size_t wholes[2] = {0}, others[ROWS], other = 0;
    int vectors = count == 4 && adds_to_rows(code);
    for (size_t r = 0; r < f->rows; r++) {
        if (vectors && f->row[r].kind == PLAIN && !memchr(f->used + r * f->count + term, 0, 4)) {
            int begins = f->row[r].first == term;
            FourTerms *own = &whole[begins][wholes[begins]++];
            own->sum = sum + r * stride;
            memcpy(own->c, f->coefficients + r * f->count + term, sizeof own->c);
        } else others[other++] = r;
    }
    for (int begins = 0; begins < 2; begins++)
        if (wholes[begins]) add_to_rows(code, whole[begins], wholes[begins], x, n, begins);
    const void *values[4] = {0};
    for (size_t k = 0; other && k < count; k++) {
        values[k] = x[k];
        if (code == FLOAT64 || !f->needed[term + k]) continue;
        widen(code, wide + k * STRIP, x[k], n);
        values[k] = wide + k * STRIP;
    }
    for (size_t i = 0; i < other; i++) add_to_row(f, others[i], term, count, FLOAT64, values, n, sum, stride);
}

/* Return how many of N numbers are summed at once. */
static size_t strip_of(const Formula *f, size_t n) { return f->rows == 1 && !f->exact ? n : STRIP; }

/* Sum elements [done, done + n) of a slice, or a block of N elements of a tile, from the files to the memory's results at
   TO; those of a row follow STEP bytes behind those of the row before. */
static Result sum_block(const Formula *f, const Memory *m, const Block *block, const Place *in, size_t done, size_t n,
                        char *to, size_t step, int *bad) {
    size_t reals = n * f->out->reals, most = strip_of(f, reals);
    *bad = 0;
    for (size_t t = 0, start = 0; t < f->count; start = t) {
        for (; t < f->count && t - start < m->batch; t++) {
            if (!f->needed[t]) continue;
            size_t item = f->dtypes[t]->size * f->dtypes[t]->reals;
            Status status = read_term(block, t, in[t], item, done, n, m->x + (t - start) * m->read);
            if (status != DONE) return failed(status, 0, t);
        }
        for (size_t at = 0; at < reals; at += most) {
            size_t length = reals - at < most ? reals - at : most;
            /* Terms that are all here need the sums of this strip alone. */
            double *sum = m->sum + (f->count <= m->batch ? 0 : at * f->rows * kept(f));
            for (size_t k = start, count; k < t; k += count) {
                const void *x[4];
                for (count = 0; count < 4 && k + count < t && f->dtypes[k + count] == f->dtypes[k]; count++)
                    x[count] = m->x + (k + count - start) * m->read + at * f->dtypes[k]->size;
                add_four(f, k, count, x, length, sum, most, m->wide);
            }
            for (size_t r = 0; t == f->count && r < f->rows; r++) {
                double c = finish_row(f, r, length, sum, most);
                *bad |= narrow(f->out, to + r * step + at * f->out->size, sum + r * most, length, c);
            }
        }
    }
    return failed(DONE, 0, 0);
}

static int refused(const Formula *f, const void *x, size_t n) {
    return f->checked && nonfinite(f->out->code, x, n * f->out->reals);
}

static Result copy_block(const Formula *f, const Block *block, const Place *in, size_t done, size_t n, void *to,
                         int *bad) {
    Status status = read_term(block, 0, *in, f->item, done, n, to);
    *bad = status == DONE && refused(f, to, n);
    return failed(status, 0, 0);
}

Result fill_large(const Formula *f, size_t n, const Place *in, const Target *out, size_t targets, char *scratch,
                  int wants_crc, uint32_t *crcs, int *bad) {
    Memory m = lay_out(f->rows, 0, scratch);
    size_t block = block_of(f), step = m.window + 64, filled;
    memset(crcs, 0, f->rows * sizeof *crcs), *bad = 0;
    for (size_t done = 0; done < n; done += filled) {
        int64_t begin = (int64_t)(done * f->item), position = out->place.offset + begin;
        size_t room = (m.window - (size_t)position % m.window + f->item - 1) / f->item;
        size_t stop = n - done < room ? n - done : room;
        for (filled = 0; filled < stop;) {
            size_t next = stop - filled < block ? stop - filled : block;
            char *to = m.results + filled * f->item;
            Result result = f->copied ? copy_block(f, NULL, in, done + filled, next, to, bad)
                                      : sum_block(f, &m, NULL, in, done + filled, next, to, step, bad);
            if (result.status != DONE || *bad) return result;
            for (size_t r = 0; wants_crc && r < f->rows; r++)
                crcs[r] = checksum(crcs[r], to + r * step, next * f->item);
            filled += next;
        }
        for (size_t i = 0; i < targets; i++) {
            const char *from = m.results + (size_t)out[i].row * step;
            Status status = write_all(out[i].place.fd, from, filled * f->item, out[i].place.offset + begin);
            if (status != DONE) return failed(status, 0, i);
        }
    }
    return failed(DONE, 0, 0);
}

/* Neighbouring slices of a file are read in one call, with the bytes between them, which are not there in memory. */
Result fill_small(const Formula *f, size_t slices, const int64_t *list, char *scratch, int wants_crc, char *packed,
                  uint32_t *crcs, unsigned char *bad) {
    char *span = scratch;
    double *sum = (double *)(scratch + 2 * SPAN);
    size_t width = 1 + 2 * f->count, reals = f->out->reals, total = 0, at, after;
    for (size_t p = 0; p < slices; p++) total += (size_t)list[p * width];
    for (size_t t = 0; t < f->count; t++) {
        if (!f->copied && !f->needed[t]) continue;
        size_t size = f->dtypes[t]->size, item = f->copied ? f->item : size * reals;
        at = 0;
        for (size_t p = 0; p < slices; p = after) {
            const Place *in = (const Place *)(list + p * width + 1) + t;
            int64_t start = in->offset & ~(int64_t)63, end = in->offset + list[p * width] * (int64_t)item;
            for (after = p + 1; after < slices; after++) {
                const Place *next = (const Place *)(list + after * width + 1) + t;
                int64_t stop = next->offset + list[after * width] * (int64_t)item;
                if (next->fd != in->fd || in->fd < 0 || next->offset < end || next->offset > end + GAP ||
                    stop > start + SPAN)
                    break;
                end = stop;
            }
            /* The span is aligned in memory as it is in the file. */
            Status status = read_all(in->fd, span + (in->offset - start), (size_t)(end - in->offset), in->offset);
            if (status != DONE) return failed(status, p, t);
            for (size_t q = p; q < after; q++) {
                const Place *place = (const Place *)(list + q * width + 1) + t;
                size_t n = (size_t)list[q * width];
                const char *x = span + (place->offset - start);
                if (f->copied) memcpy(packed + at * item, x, n * item);
                else {
                    if (place->offset % (int64_t)size) x = memmove(span + SPAN, x, n * item);
                    for (size_t done = 0, most = strip_of(f, n * reals); done < n * reals; done += most) {
                        const void *own = x + done * size;
                        size_t length = n * reals - done < most ? n * reals - done : most;
                        add_four(f, t, 1, &own, length, sum + at * reals + done, total * reals,
                                 (double *)(span + SPAN + SPAN / 2));
                    }
                }
                at += n;
            }
        }
    }
    memset(bad, 0, slices);
    for (size_t r = 0; r < f->rows; r++) {
        double *own = sum + r * total * reals, c = f->copied ? 1.0 : finish_row(f, r, total * reals, sum, total * reals);
        at = 0;
        for (size_t p = 0; p < slices; p++) {
            size_t n = (size_t)list[p * width];
            char *to = packed + (r * total + at) * f->item;
            double *sums = own + at * reals;
            bad[p] |= (unsigned char)(f->copied ? refused(f, to, n) : narrow(f->out, to, sums, n * reals, c));
            if (wants_crc) crcs[r * slices + p] = checksum(0, to, n * f->item);
            at += n;
        }
    }
    return failed(DONE, 0, 0);
}

size_t largest_tile(const Formula *f, int one_order) {
    size_t most = TILE / f->item / f->rows, block = block_of(f);
    return one_order || block > most ? most : block;
}

/* Choose the sizes of a tile's blocks of at most MOST elements: whole along the inner axes of the order that strides are
   given for. */
static void choose_block(const Tile *tile, const int64_t *packed, size_t most, int64_t *sizes) {
    for (size_t a = 0; a < tile->axes; a++) sizes[a] = 1;
    for (int64_t inner = 1, size; most > 1 && inner < (int64_t)tile_elements(tile); inner *= size) {
        size_t a = 0;
        while (packed[a] != inner || tile->sizes[a] == 1) a++;
        size = tile->sizes[a];
        sizes[a] = size < (int64_t)most ? size : (int64_t)most;
        most /= (size_t)size;
    }
}

Result fill_tile(const Formula *f, const Tile *tile, const Place *in, const Target *out, size_t targets, char *scratch,
                 int wants_crc, uint32_t *crcs, int *bad) {
    Memory m = lay_out(f->rows, 1, scratch);
    size_t step = 4 * m.read, whole_step = tile_elements(tile) * f->item;
    int64_t order[AXES], target[AXES], whole[AXES];
    Block block = {.box = {tile->axes, block.sizes, tile->strides}, .spare = m.spare};
    pack_strides(tile, tile->strides, target);
    pack_strides(tile, tile->strides + tile->axes, order);
    choose_block(tile, order, block_of(f), whole);
    *bad = 0;
    for (size_t a = 0; a < tile->axes;) { /* counts BEGIN up to the end of the tile */
        for (a = 0; a < tile->axes; a++) {
            int64_t left = tile->sizes[a] - block.begin[a];
            block.sizes[a] = left < whole[a] ? left : whole[a];
        }
        size_t n = tile_elements(&block.box);
        pack_strides(&block.box, tile->strides + tile->axes, block.packed);
        Result result = f->copied ? copy_block(f, &block, in, 0, n, m.results, bad)
                                  : sum_block(f, &m, &block, in, 0, n, m.results, step, bad);
        if (result.status != DONE || *bad) return result;
        size_t at = (size_t)inner_product(tile->axes, block.begin, target) * f->item;
        for (size_t r = 0; r < f->rows; r++)
            permute(&block.box, f->item, block.packed, target, m.results + r * step, m.written + r * whole_step + at);
        for (a = 0; a < tile->axes; a++) {
            block.begin[a] += whole[a];
            if (block.begin[a] < tile->sizes[a]) break;
            block.begin[a] = 0;
        }
    }
    for (size_t i = 0; i < targets; i++) {
        const char *from = m.written + (size_t)out[i].row * whole_step;
        Status status = write_tile(tile, tile->strides, out[i].place, f->item, from, wants_crc, &crcs[out[i].row]);
        if (status != DONE) return failed(status, 0, i);
    }
    return failed(DONE, 0, 0);
}
