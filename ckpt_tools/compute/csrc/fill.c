/* Weighted sums from files to files. A slice is read from each input in turn in blocks that stay in a core's cache,
   added up in float64, rounded once, checked, and written. Each input byte crosses memory once, and no more than some
   blocks are held. */

#include <errno.h>
#include <string.h>

#include "native.h"

static Result failed(Status status, size_t slice, size_t term) {
    Result result = {status, slice, term, status == DONE ? 0 : errno};
    return result;
}

/* Elements of a block: the reals of a term take READ bytes at most, their sums 4 * READ. */
static size_t block_of(const Formula *f) {
    if (f->copied) return READ / f->item;
    return READ / (f->widest < 2 ? 2 : f->widest) / f->out->reals;
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

/* Sum elements [done, done + n) of a slice, or a block of N elements of a tile, from the files to TO. X has room for four
   terms, SUM for their sums and, if anchored, the first values. */
static Result sum_block(const Formula *f, const Block *block, const Place *in, size_t done, size_t n, char *x,
                        double *sum, void *to, int *bad) {
    size_t reals = n * f->out->reals;
    double *first = sum + reals;
    for (size_t t = 0; t < f->count;) {
        const Dtype *dtype = f->terms[t].dtype;
        size_t start = t, item = dtype->size * dtype->reals;
        Terms terms = {.count = 0};
        for (; terms.count < (f->anchored ? 1 : 4) && t < f->count && f->terms[t].dtype == dtype; t++, terms.count++) {
            char *term = x + (size_t)terms.count * READ;
            Status status = read_term(block, t, in[t], item, done, n, term);
            if (status != DONE) return failed(status, 0, t);
            terms.x[terms.count] = term;
            terms.c[terms.count] = f->terms[t].coefficient;
        }
        if (!f->anchored) add(dtype->code, sum, &terms, reals, start == 0);
        else if (start > 0) add_differences(dtype->code, sum, first, x, terms.c[0], reals);
        else {
            widen(dtype->code, first, x, reals);
            memset(sum, 0, reals * sizeof *sum);
        }
    }
    if (f->anchored) add_first(sum, first, reals);
    *bad = narrow(f->out, to, sum, reals, f->common);
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

Result fill_large(const Formula *f, size_t n, const Place *out, const Place *in, char *scratch, int wants_crc,
                  uint32_t *crc, int *bad) {
    char *x = scratch, *window = scratch + 8 * READ;
    double *sum = (double *)(scratch + 4 * READ);
    size_t block = block_of(f), filled;
    *crc = 0, *bad = 0;
    for (size_t done = 0; done < n; done += filled) {
        int64_t position = out->offset + (int64_t)(done * f->item);
        size_t room = (WINDOW - (size_t)(position % WINDOW) + f->item - 1) / f->item;
        size_t stop = n - done < room ? n - done : room;
        for (filled = 0; filled < stop;) {
            size_t next = stop - filled < block ? stop - filled : block;
            char *to = window + filled * f->item;
            Result result = f->copied ? copy_block(f, NULL, in, done + filled, next, to, bad)
                                      : sum_block(f, NULL, in, done + filled, next, x, sum, to, bad);
            if (result.status != DONE || *bad) return result;
            if (wants_crc) *crc = checksum(*crc, to, next * f->item);
            filled += next;
        }
        Status status = write_all(out->fd, window, filled * f->item, position);
        if (status != DONE) return failed(status, 0, 0);
    }
    return failed(DONE, 0, 0);
}

/* Neighbouring slices are read in one call, with the bytes between them. */
Result fill_small(const Formula *f, size_t slices, const int64_t *rows, char *scratch, int wants_crc, char *packed,
                  uint32_t *crcs, unsigned char *bad) {
    char *span = scratch;
    double *sum = (double *)(scratch + 2 * SPAN), *first = sum;
    size_t width = 1 + 2 * f->count, reals = f->out->reals, at, after;
    for (size_t p = 0; p < slices; p++) first += f->anchored ? (size_t)rows[p * width] * reals : 0;
    for (size_t t = 0; t < f->count; t++) {
        const Dtype *dtype = f->terms[t].dtype;
        size_t size = dtype->size, item = f->copied ? f->item : size * reals;
        at = 0;
        for (size_t p = 0; p < slices; p = after) {
            const Place *in = (const Place *)(rows + p * width + 1) + t;
            int64_t start = in->offset & ~(int64_t)63, end = in->offset + rows[p * width] * (int64_t)item;
            for (after = p + 1; after < slices; after++) {
                const Place *next = (const Place *)(rows + after * width + 1) + t;
                int64_t stop = next->offset + rows[after * width] * (int64_t)item;
                if (next->fd != in->fd || next->offset < end || next->offset > end + GAP || stop > start + SPAN) break;
                end = stop;
            }
            /* The span is aligned in memory as it is in the file. */
            Status status = read_all(in->fd, span + (in->offset - start), (size_t)(end - in->offset), in->offset);
            if (status != DONE) return failed(status, p, t);
            for (size_t q = p; q < after; q++) {
                const Place *place = (const Place *)(rows + q * width + 1) + t;
                size_t n = (size_t)rows[q * width];
                char *x = span + (place->offset - start);
                if (f->copied) memcpy(packed + at * item, x, n * item);
                else {
                    double c = f->terms[t].coefficient;
                    if (place->offset % (int64_t)size) x = memmove(span + SPAN, x, n * item);
                    if (!f->anchored) {
                        Terms one = {{x}, {c}, 1};
                        add(dtype->code, sum + at * reals, &one, n * reals, t == 0);
                    } else if (t == 0) {
                        widen(dtype->code, first + at * reals, x, n * reals);
                        memset(sum + at * reals, 0, n * reals * sizeof *sum);
                    } else add_differences(dtype->code, sum + at * reals, first + at * reals, x, c, n * reals);
                }
                at += n;
            }
        }
    }
    at = 0;
    for (size_t p = 0; p < slices; p++) {
        size_t n = (size_t)rows[p * width];
        char *to = packed + at * f->item;
        if (f->anchored) add_first(sum + at * reals, first + at * reals, n * reals);
        bad[p] = (unsigned char)(f->copied ? refused(f, to, n)
                                           : narrow(f->out, to, sum + at * reals, n * reals, f->common));
        if (wants_crc) crcs[p] = checksum(0, to, n * f->item);
        at += n;
    }
    return failed(DONE, 0, 0);
}

size_t largest_tile(const Formula *f, int one_order) {
    size_t most = TILE / f->item, block = block_of(f);
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

Result fill_tile(const Formula *f, const Tile *tile, const Place *out, const Place *in, char *scratch, int wants_crc,
                 uint32_t *crc, int *bad) {
    char *x = scratch, *summed = scratch + 9 * READ, *written = summed + 4 * READ;
    double *sum = (double *)(scratch + 4 * READ);
    int64_t order[AXES], target[AXES], whole[AXES];
    Block block = {.box = {tile->axes, block.sizes, tile->strides}, .spare = scratch + 8 * READ};
    pack_strides(tile, tile->strides, target);
    pack_strides(tile, tile->strides + tile->axes, order);
    choose_block(tile, order, block_of(f), whole);
    *crc = 0, *bad = 0;
    for (size_t a = 0; a < tile->axes;) { /* counts BEGIN up to the end of the tile */
        for (a = 0; a < tile->axes; a++) {
            int64_t left = tile->sizes[a] - block.begin[a];
            block.sizes[a] = left < whole[a] ? left : whole[a];
        }
        size_t n = tile_elements(&block.box);
        pack_strides(&block.box, tile->strides + tile->axes, block.packed);
        Result result = f->copied ? copy_block(f, &block, in, 0, n, summed, bad)
                                  : sum_block(f, &block, in, 0, n, x, sum, summed, bad);
        if (result.status != DONE || *bad) return result;
        permute(&block.box, f->item, block.packed, target, summed,
                written + inner_product(tile->axes, block.begin, target) * (int64_t)f->item);
        for (a = 0; a < tile->axes; a++) {
            block.begin[a] += whole[a];
            if (block.begin[a] < tile->sizes[a]) break;
            block.begin[a] = 0;
        }
    }
    return failed(write_tile(tile, tile->strides, *out, f->item, written, wants_crc, crc), 0, 0);
}
