/* What the parts of the C extension share. Python reads every number that it needs from the module (module.c), so that
   each is defined here alone. Nothing but module.c needs the headers of Python. */

#ifndef CKPT_NATIVE_H
#define CKPT_NATIVE_H

#include <stddef.h>
#include <stdint.h>

#if defined(__x86_64__) && defined(__GNUC__) && !defined(PORTABLE)
#define X86 1
#endif

#define READ (64 << 10)   /* bytes of one input in a block: those of four inputs and their sums stay in a core's cache */
#define SPAN (256 << 10)  /* bytes read in one call, of small slices */
#define GAP 4096          /* bytes between two small slices: reading them costs less than another call */
#define WINDOW (512 << 10) /* bytes of a large slice written in one call, up to a multiple of it in the file: the page
                              cache has large folios for them */
#define ROWS 32           /* of coefficients, at most */
#define STRIP 512         /* numbers of a block that are summed for all rows: four terms as float64 and the sums of a row
                             stay in the first cache */
#define SMALL (3 << 19)   /* bytes of scratch that small slices take at most, whatever the rows */
#define TILE (4 << 20)    /* bytes of the results of a tile, of all rows: rows of two pages, if there are as many columns */
#define GRAM_CHUNK 256    /* numbers of a row whose products are computed at once: eight rows stay in the first cache */
#define AXES 16           /* of a tile, at most */

/* ---- dtypes ---- */

typedef enum {
    RAW, /* bytes that are only copied */
    FLOAT64,
    FLOAT32,
    BFLOAT16,
    FLOAT16,
    FLOAT8_E4M3FN,
    FLOAT8_E5M2,
    FLOAT8_E4M3FNUZ,
    FLOAT8_E5M2FNUZ,
} Code;

typedef struct {
    const char *name; /* in torch; NULL: bytes that are only copied */
    Code code;        /* of the real numbers in an element */
    size_t size;      /* bytes of a real number */
    size_t reals;     /* real numbers in an element: 2 for complex dtypes */
    double limit;     /* the smallest magnitude that rounds beyond the largest number: half a step above it */
} Dtype;

extern const Dtype DTYPES[]; /* the last one has no name */

/* ---- sum.c: arithmetic on arrays in memory ---- */

typedef struct {
    const void *x[4];
    double c[4];
    int count;
} Terms; /* of one dtype, added in one pass, so that the sums go through the cache a quarter as often */

/* Fill tables and look at the processor; once, before anything else. */
void sum_init(void);

/* Add terms to the sums; if they are the FIRST ones, the sums hold nothing yet. */
void add(Code code, double *sum, const Terms *terms, size_t n, int first);

typedef struct {
    double *sum;
    double c[4];
} FourTerms; /* of a row */

/* Return 1 if the processor has vectors for `add_to_rows`. */
int adds_to_rows(Code code);

/* Add four terms of one dtype, at X, to the sums of several rows; if they are the FIRST ones, the sums hold nothing yet.
   Reads and writes up to 7 numbers behind the N that count. */
void add_to_rows(Code code, const FourTerms *rows, size_t count, const void *const *x, size_t n, int first);

/* Convert an array to float64, without rounding. */
void widen(Code code, double *to, const void *x, size_t n);

/* The same, less an array of float64. */
void widen_less(Code code, double *to, const void *x, const double *less, size_t n);

/* Multiply the sums by C and round them once, to nearest, ties to even. Returns 1 if a result is NaN or infinite in the
   dtype; its code in OUT is meaningless in the dtypes of 8 bits. */
int narrow(const Dtype *dtype, void *out, const double *sum, size_t n, double c);

/* Return 1 if a number is infinity or NaN. */
int nonfinite(Code code, const void *x, size_t n);

/* ---- exact.c: sums that are rounded as if nothing had been lost before ---- */

typedef enum { PLAIN, SUM, AVERAGE, MEAN } Kind; /* as in summation.py */

typedef struct {
    double *high, *low, *lost; /* a sum is high + low, but for `lost` at most */
    double *first;             /* of kind AVERAGE: the first value if all so far are equal, or else NaN */
} Exact;

#define EXACT 4 /* numbers for each sum */

/* Look at the processor; once, before anything else. */
void exact_init(void);

/* Add terms of float64 to the sums. If the sum BEGINS here, it has lost BEFORE at most. */
void add_exact(Kind kind, Exact sum, const Terms *terms, size_t n, int begins, double before);

/* Finish the sums, at `high`: multiply them by LAST, or divide means by it. Rounds to float64 once; or, if ODD, such that
   a later rounding to fewer bits is as if it were the only one. What is not decided is NaN. */
void finish_exact(Kind kind, Exact sum, size_t n, double last, int odd);

/* ---- crc.c: CRC-32 as zip has it ---- */

void crc_init(void);

/* Continue a checksum (0 at the start) over more bytes. */
uint32_t checksum(uint32_t crc, const void *data, size_t n);

/* Return the part of a checksum of A + B that is due to A, from that of A and the number of bytes in B. */
uint32_t crc_shift(uint32_t crc, uint64_t nbytes);

/* ---- io.c: files ---- */

typedef enum { DONE, NOT_READ, ENDS_EARLY, NOT_WRITTEN } Status;

typedef struct {
    int64_t nbytes, size; /* of the file; of a block */
    struct {
        int64_t begin, end; /* bytes of the file that are there */
        int64_t address;    /* of the first one */
    } blocks[];             /* as many as the file has */
} InMemory; /* a file that is read from memory: in place of a descriptor, it is known by minus its address */

Status read_all(int64_t fd, void *to, size_t n, int64_t offset);
Status write_all(int64_t fd, const void *from, size_t n, int64_t offset);

/* Start to write bytes of a file to the disk, without waiting; 0 bytes: up to its end. */
void start_disk(int fd, int64_t offset, int64_t nbytes);

/* ---- tile.c: boxes of a tensor, from the order of one storage to that of another ---- */

typedef struct {
    int64_t fd, offset;
} Place;

typedef struct {
    size_t axes;
    const int64_t *sizes;   /* of each axis */
    const int64_t *strides; /* in elements, of each axis: in the output, then in each term */
} Tile;

size_t tile_elements(const Tile *tile);

/* Find the strides of a tile that has nothing but its elements, in the order of a storage with these strides. */
void pack_strides(const Tile *tile, const int64_t *strides, int64_t *packed);

/* Read a tile in the order of the storage. */
Status read_tile(const Tile *tile, const int64_t *strides, Place in, size_t item, char *to);

/* Write a tile in the order of the storage. CRC: what it contributes to the checksum of all bytes up to its end. */
Status write_tile(const Tile *tile, const int64_t *strides, Place out, size_t item, const char *from, int wants_crc,
                  uint32_t *crc);

/* Copy a tile from one order to another. */
void permute(const Tile *tile, size_t item, const int64_t *from_strides, const int64_t *to_strides, const char *from,
             char *to);

/* ---- fill.c: weighted sums from files to files ---- */

typedef struct {
    Kind kind;
    double last;  /* the sum is multiplied by this at the end, or divided, if it is a mean */
    double lost;  /* before the first term, if the sum is exact */
    size_t first; /* the first term that is not left out */
} Row;

typedef struct {
    const Dtype *out;
    size_t item;   /* bytes of an element of the output */
    size_t widest; /* bytes of the widest real number in a term */
    int copied;    /* the one input is the output, byte for byte */
    int checked;   /* if copied: look for NaN and infinity */
    int exact;     /* a row is */
    size_t count, rows;
    const Dtype **dtypes; /* of each term */
    double *coefficients; /* of each term, row after row */
    char *used;           /* likewise: 0 if the row leaves the term out */
    char *needed;         /* of each term: a row uses it */
    Row *row;             /* of each row */
} Formula; /* one for all tensors that are summed alike: a sum for each row, of the same terms */

typedef struct {
    int64_t row;
    Place place;
} Target; /* where the results of a row go; several rows have no order, and a row may have several targets */

/* Return the bytes of scratch that a thread provides for so many rows, for tiles or for all else. */
size_t scratch_needed(size_t rows, int tiles);

typedef struct {
    Status status;
    size_t slice, term; /* where it failed */
    int reason;         /* errno */
} Result;

/* Sum a slice of N elements from the inputs IN, one a term, to places in the outputs. CRCS: of each row. BAD: NaN or
   infinity was found, and the slice is not written to its end. */
Result fill_large(const Formula *formula, size_t n, const Place *in, const Target *out, size_t targets, char *scratch,
                  int wants_crc, uint32_t *crcs, int *bad);

/* Sum SLICES small slices, and put the results one behind the other into PACKED, row after row. LIST has, for each, its
   number of elements and then a Place for each term; CRCS has an entry for each, row after row; BAD one for each. */
Result fill_small(const Formula *formula, size_t slices, const int64_t *list, char *scratch, int wants_crc,
                  char *packed, uint32_t *crcs, unsigned char *bad);

/* Sum a tile from the inputs IN, one a term, to places in the outputs. Unless the terms have one order, the tile must
   fit into a block. CRCS: as of write_tile, of each row. */
Result fill_tile(const Formula *formula, const Tile *tile, const Place *in, const Target *out, size_t targets,
                 char *scratch, int wants_crc, uint32_t *crcs, int *bad);

/* Return the number of elements that a tile may have; FALSE for terms of several orders. */
size_t largest_tile(const Formula *formula, int one_order);

/* ---- gram.c: inner products ---- */

/* Add the inner products of COUNT rows of N real numbers, each read from its place, to the upper triangle of SUMS, a
   matrix with as many columns as COUNT, rounded up to a multiple of 4. Each row counts as its difference from the last
   one, but for that. */
Result gram(const Dtype *const *dtypes, const Place *in, size_t count, size_t n, double *sums, char *scratch);

/* Return the bytes of scratch for so many rows. */
size_t gram_scratch(size_t count);

/* ---- moments.c: mean and M2 of channels ---- */

/* Compute mean and M2 of each channel of X, [outer, channels, inner], none of them 0, of a dtype of at least 16 bits, in
   so many threads at most. RESULT: the means, then the M2s; one of a channel with NaN or infinity is not finite. Returns
   0 if there is no memory. */
int moments(Code code, const void *x, size_t outer, size_t channels, size_t inner, size_t threads, double *result);

#endif
