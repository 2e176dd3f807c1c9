/* Tiles: boxes of a tensor whose elements stand in one order in an input and in another one in the output. */

#include <string.h>

#include "native.h"

/* Return true if axis A lies outside of axis B in storage. */
static int outside(const int64_t *strides, size_t a, size_t b) {
    return strides[a] > strides[b] || (strides[a] == strides[b] && a < b);
}

size_t tile_elements(const Tile *tile) {
    size_t n = 1;
    for (size_t a = 0; a < tile->axes; a++) n *= (size_t)tile->sizes[a];
    return n;
}

void pack_strides(const Tile *tile, const int64_t *strides, int64_t *packed) {
    for (size_t a = 0; a < tile->axes; a++) {
        packed[a] = tile->sizes[a] > 1;
        for (size_t b = 0; b < tile->axes; b++)
            if (b != a && outside(strides, a, b)) packed[a] *= tile->sizes[b];
    }
}

/* A tile in the order of a storage: rows of so many adjacent elements, one behind the other. */
typedef struct {
    size_t axes;
    int64_t sizes[AXES], strides[AXES]; /* of what lies outside the rows */
    size_t row;
} Walk;

static Walk walk_of(const Tile *tile, const int64_t *strides) {
    Walk walk = {.axes = 0, .row = 1};
    for (size_t a = 0; a < tile->axes; a++) {
        if (tile->sizes[a] == 1) continue;
        size_t at = walk.axes++;
        for (; at > 0 && walk.strides[at - 1] < strides[a]; at--)
            walk.sizes[at] = walk.sizes[at - 1], walk.strides[at] = walk.strides[at - 1];
        walk.sizes[at] = tile->sizes[a], walk.strides[at] = strides[a];
    }
    while (walk.axes && walk.strides[walk.axes - 1] == (int64_t)walk.row) walk.row *= (size_t)walk.sizes[--walk.axes];
    return walk;
}

/* Return where a row begins, in elements. */
static int64_t row_begin(const Walk *walk, size_t row) {
    int64_t begin = 0;
    for (size_t a = walk->axes; a-- > 0; row /= (size_t)walk->sizes[a])
        begin += (int64_t)(row % (size_t)walk->sizes[a]) * walk->strides[a];
    return begin;
}

Status read_tile(const Tile *tile, const int64_t *strides, Place in, size_t item, char *to) {
    Walk walk = walk_of(tile, strides);
    size_t rows = tile_elements(tile) / walk.row, nbytes = walk.row * item;
    for (size_t row = 0; row < rows; row++, to += nbytes) {
        Status status = read_all(in.fd, to, nbytes, in.offset + row_begin(&walk, row) * (int64_t)item);
        if (status != DONE) return status;
    }
    return DONE;
}

Status write_tile(const Tile *tile, const int64_t *strides, Place out, size_t item, const char *from, int wants_crc,
                  uint32_t *crc) {
    Walk walk = walk_of(tile, strides);
    size_t rows = tile_elements(tile) / walk.row, nbytes = walk.row * item;
    int64_t before = 0;
    *crc = 0;
    for (size_t row = 0; row < rows; row++, from += nbytes) {
        int64_t at = row_begin(&walk, row) * (int64_t)item;
        Status status = write_all(out.fd, from, nbytes, out.offset + at);
        if (status != DONE) return status;
        if (wants_crc) *crc = crc_shift(*crc, (uint64_t)(at - before)) ^ checksum(0, from, nbytes);
        before = at;
    }
    return DONE;
}

/* ---- from one order to the other ---- */

typedef struct {
    int64_t size, from, to; /* elements, and the steps between them in both orders */
} Axis;

/* Blocks of so many rows and columns stay in the innermost cache. */
#define BLOCK 16
#define TRANSPOSE(TYPE)                                                                                      \
    static void transpose_##TYPE(void *restrict to, const void *restrict from, Axis row, Axis column) {      \
        for (int64_t r = 0; r < row.size; r += BLOCK)                                                        \
            for (int64_t c = 0; c < column.size; c += BLOCK) {                                               \
                int64_t rows = row.size - r < BLOCK ? row.size - r : BLOCK;                                  \
                int64_t columns = column.size - c < BLOCK ? column.size - c : BLOCK;                         \
                TYPE *restrict target = (TYPE *)to + r * row.to + c * column.to;                                       \
                const TYPE *restrict source = (const TYPE *)from + c * column.from + r * row.from;                      \
                for (int64_t i = 0; i < rows; i++)                                                           \
                    for (int64_t j = 0; j < columns; j++)                                                    \
                        target[i * row.to + j * column.to] = source[j * column.from + i * row.from];         \
            }                                                                                                \
    }
typedef struct {
    uint64_t low, high;
} uint128_t;
TRANSPOSE(uint8_t)
TRANSPOSE(uint16_t)
TRANSPOSE(uint32_t)
TRANSPOSE(uint64_t)
TRANSPOSE(uint128_t)

static void transpose(size_t item, void *to, const void *from, Axis row, Axis column) {
    if (item == 1) transpose_uint8_t(to, from, row, column);
    else if (item == 2) transpose_uint16_t(to, from, row, column);
    else if (item == 4) transpose_uint32_t(to, from, row, column);
    else if (item == 8) transpose_uint64_t(to, from, row, column);
    else transpose_uint128_t(to, from, row, column);
}

static void copy_along(size_t item, const Axis *axes, size_t outer, Axis row, Axis column, char *to, const char *from) {
    if (outer) {
        for (int64_t i = 0; i < axes->size; i++)
            copy_along(item, axes + 1, outer - 1, row, column, to + i * axes->to * (int64_t)item,
                       from + i * axes->from * (int64_t)item);
    } else if (column.from == 1 && column.to == 1) memcpy(to, from, (size_t)column.size * item);
    else transpose(item, to, from, row, column);
}

void permute(const Tile *tile, size_t item, const int64_t *from_strides, const int64_t *to_strides, const char *from,
             char *to) {
    Axis axes[AXES + 1], row = {1, 1, 1}, column = {1, 1, 1};
    size_t count = 0, kept = 0;
    for (size_t a = 0; a < tile->axes; a++) {
        Axis axis = {tile->sizes[a], from_strides[a], to_strides[a]};
        if (axis.size == 1) continue;
        size_t at = count++;
        for (; at > 0 && axes[at - 1].to < axis.to; at--) axes[at] = axes[at - 1];
        axes[at] = axis;
    }
    for (size_t a = 0; a < count; a++) { /* neighbours in both orders are one axis */
        Axis *last = kept ? &axes[kept - 1] : NULL;
        if (last && last->from == axes[a].from * axes[a].size && last->to == axes[a].to * axes[a].size)
            *last = (Axis){last->size * axes[a].size, axes[a].from, axes[a].to};
        else axes[kept++] = axes[a];
    }
    if (kept) column = axes[--kept];
    for (size_t a = 0; a < kept && column.from != 1; a++)
        if (axes[a].from == 1) {
            row = axes[a];
            memmove(axes + a, axes + a + 1, (--kept - a) * sizeof *axes);
            break;
        }
    copy_along(item, axes, kept, row, column, to, from);
}
