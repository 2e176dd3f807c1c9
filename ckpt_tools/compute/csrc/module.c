/* Weighted sums of plain tensors, from file to file, in float64, without the interpreter's lock.

   A part is a run of elements that stands contiguous in every input and in the output. It is read from each input
   in turn in blocks that stay in a core's cache, added up in float64, rounded once, checked, and written; so an input
   byte crosses memory once, and nothing but some blocks is held.

   Multiplication and addition round separately (no contraction to a fused multiply-add: see setup.py), and rounding
   to 16 bits goes by the same steps as in summing.py, so that the bytes are those of every other way. */

#define PY_SSIZE_T_CLEAN
#define _GNU_SOURCE
#include <Python.h>

#include <errno.h>
#include <fcntl.h>
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#if defined(__x86_64__) && defined(__GNUC__) && !defined(PORTABLE)
#include <cpuid.h>
#include <immintrin.h>
#define X86 1
#define AVX2 __attribute__((target("avx2,f16c")))
typedef double Four __attribute__((vector_size(32)));
typedef uint64_t FourBits __attribute__((vector_size(32)));
static int avx2; /* the processor has it, and F16C */
#endif
#define INLINE static inline __attribute__((always_inline))

enum { FLOAT32, BFLOAT16, FLOAT16, RAW };  /* as in native.py; RAW is never looked at */
enum { DONE, NOT_READ, ENDS_EARLY, NOT_WRITTEN };  /* as in native.py */

#define READ (64 << 10)       /* bytes of an input that are read at once; four inputs and their sums stay in a cache */
#define SPAN (256 << 10)      /* bytes that are read at once, of small parts */
#define GAP 4096              /* bytes between two parts that cost less to read than another call does */
#define WINDOW (512 << 10)    /* bytes of large parts that are written at once, up to a multiple of it in the file: the
                                 page cache has large folios for them */

/* ---- widening: exact for every dtype; element I of X ---- */

INLINE double from_bits(uint32_t bits) {
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

INLINE double from_float32(const void *x, size_t i) { return ((const float *)x)[i]; }

INLINE double from_bfloat16(const void *x, size_t i) { return from_bits((uint32_t)((const uint16_t *)x)[i] << 16); }

INLINE double from_float16(const void *x, size_t i) {
    /* Exponent and mantissa moved to where float32 has them; 2^112 makes up for the other bias, subnormals too. */
    uint16_t bits = ((const uint16_t *)x)[i];
    uint32_t moved = (uint32_t)(bits & 0x7fff) << 13, sign = (uint32_t)(bits & 0x8000) << 16;
    float scaled;
    memcpy(&scaled, &moved, 4);
    scaled *= 0x1p112f;
    memcpy(&moved, &scaled, 4);
    moved |= (bits & 0x7c00) == 0x7c00 ? 0x7f800000u : 0; /* infinity and NaN stay what they are */
    return from_bits(moved | sign);
}

#ifdef X86
AVX2 INLINE Four four_float32(const void *x, size_t i) {
    return (Four)_mm256_cvtps_pd(_mm_loadu_ps((const float *)x + i));
}

AVX2 INLINE Four four_bfloat16(const void *x, size_t i) {
    __m128i words = _mm_loadl_epi64((const __m128i *)((const uint16_t *)x + i));
    return (Four)_mm256_cvtps_pd(_mm_castsi128_ps(_mm_unpacklo_epi16(_mm_setzero_si128(), words)));
}

AVX2 INLINE Four four_float16(const void *x, size_t i) {
    return (Four)_mm256_cvtps_pd(_mm_cvtph_ps(_mm_loadl_epi64((const __m128i *)((const uint16_t *)x + i))));
}
#endif

/* ---- adding: up to four terms of a dtype in one go, so that the sum goes through the cache a quarter as often ---- */

typedef struct {
    const void *x[4];
    double c[4];
    int count;
} Terms;

/* Add elements I to N of the terms to the sums. If they are the FIRST terms, nothing stands there yet; if they are
   PLAIN, all coefficients are 1. STEP elements at a time: what is left over at the end is not added. Returns where it
   stopped. The compiler makes a loop for each case: 1 to 4 terms, 4 more if they are not the first, 8 more if plain. */
#define TERM(k, WIDEN) (plain ? WIDEN(x##k, i) : WIDEN(x##k, i) * c##k)
#define CASE(NAME, k) case k: return NAME##_of(sum, terms, i, n, (k - 1) % 4 + 1, (k - 1) % 8 < 4, k > 8);
#define ADD(NAME, TARGET, VALUE, WIDEN, STEP)                                                                          \
    TARGET INLINE size_t NAME##_of(double *restrict sum, const Terms *terms, size_t i, size_t n, int count, int first, \
                                   int plain) {                                                                        \
        const void *x0 = terms->x[0], *x1 = terms->x[1], *x2 = terms->x[2], *x3 = terms->x[3];                         \
        const double c0 = terms->c[0], c1 = terms->c[1], c2 = terms->c[2], c3 = terms->c[3];                           \
        for (; i + STEP <= n; i += STEP) {                                                                             \
            VALUE before, total = TERM(0, WIDEN);                                                                      \
            if (!first) {                                                                                              \
                memcpy(&before, sum + i, sizeof before);                                                               \
                total = before + total;                                                                                \
            }                                                                                                          \
            if (count > 1) total += TERM(1, WIDEN);                                                                    \
            if (count > 2) total += TERM(2, WIDEN);                                                                    \
            if (count > 3) total += TERM(3, WIDEN);                                                                    \
            memcpy(sum + i, &total, sizeof total);                                                                     \
        }                                                                                                              \
        return i;                                                                                                      \
    }                                                                                                                  \
    TARGET static size_t NAME(double *sum, const Terms *terms, size_t i, size_t n, int first) {                        \
        int plain = 1;                                                                                                 \
        for (int k = 0; k < terms->count; k++) plain &= terms->c[k] == 1.0;                                            \
        switch (terms->count + (first ? 0 : 4) + (plain ? 8 : 0)) {                                                    \
            CASE(NAME, 1) CASE(NAME, 2) CASE(NAME, 3) CASE(NAME, 4) CASE(NAME, 5) CASE(NAME, 6) CASE(NAME, 7)          \
            CASE(NAME, 8) CASE(NAME, 9) CASE(NAME, 10) CASE(NAME, 11) CASE(NAME, 12) CASE(NAME, 13) CASE(NAME, 14)     \
            CASE(NAME, 15) CASE(NAME, 16)                                                                              \
        }                                                                                                              \
        return i;                                                                                                      \
    }
ADD(add_float32, , double, from_float32, 1)
ADD(add_bfloat16, , double, from_bfloat16, 1)
ADD(add_float16, , double, from_float16, 1)
#ifdef X86
ADD(add_float32_by_four, AVX2, Four, four_float32, 4)
ADD(add_bfloat16_by_four, AVX2, Four, four_bfloat16, 4)
ADD(add_float16_by_four, AVX2, Four, four_float16, 4)
#endif

static void add(int64_t dtype, double *sum, const Terms *terms, size_t n, int first) {
    size_t i = 0;
#ifdef X86
    if (avx2 && dtype == FLOAT32) i = add_float32_by_four(sum, terms, 0, n, first);
    else if (avx2 && dtype == BFLOAT16) i = add_bfloat16_by_four(sum, terms, 0, n, first);
    else if (avx2) i = add_float16_by_four(sum, terms, 0, n, first);
#endif
    if (dtype == FLOAT32) add_float32(sum, terms, i, n, first);
    else if (dtype == BFLOAT16) add_bfloat16(sum, terms, i, n, first);
    else add_float16(sum, terms, i, n, first);
}

/* ---- rounding, once ---- */

static inline float sticky(double value) {
    /* 12 bits of the mantissa are kept, the last one set if anything was lost, so that the later roundings are right
       (Boldo and Melquiond 2008). */
    const uint64_t lost = ((uint64_t)1 << 40) - 1;
    uint64_t bits;
    memcpy(&bits, &value, 8);
    bits = (((bits & lost) + lost) | bits) & ~lost;
    memcpy(&value, &bits, 8);
    return (float)value;
}

static inline uint32_t to_float32(double value) {
    float narrow = (float)value;
    uint32_t bits;
    memcpy(&bits, &narrow, 4);
    return bits;
}

static inline uint16_t to_bfloat16(double value) {
    float narrow = sticky(value);
    uint32_t bits;
    memcpy(&bits, &narrow, 4);
    return (uint16_t)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

static inline uint16_t to_float16(double value) {
    /* Adding a power of two of the right size makes the float32 adder round at the last bit that a half has. */
    float narrow = sticky(value), base;
    uint32_t bits, power;
    memcpy(&bits, &narrow, 4);
    base = fabsf(narrow) * 0x1p112f * 0x1p-110f;
    power = (bits << 1) & 0xff000000u;
    power = ((power < 0x71000000u ? 0x71000000u : power) >> 1) + 0x07800000u;
    memcpy(&narrow, &power, 4);
    base += narrow;
    memcpy(&power, &base, 4);
    return (uint16_t)(((bits >> 16) & 0x8000) | (((power >> 13) & 0x7c00) + (power & 0x0fff)));
}

/* Multiply elements I to N of the sums by C and round them; tell whether one is infinite then, or NaN. */
#define NARROW(NAME, TYPE)                                                                                             \
    static int narrow_##NAME(void *out, const double *restrict sum, size_t i, size_t n, double c, double limit) {      \
        TYPE *restrict to = out;                                                                                       \
        int64_t bad = 0;                                                                                               \
        for (; i < n; i++) {                                                                                           \
            double value = sum[i] * c;                                                                                 \
            bad |= !(fabs(value) < limit); /* true for a NaN, too */                                                   \
            to[i] = to_##NAME(value);                                                                                  \
        }                                                                                                              \
        return bad != 0;                                                                                               \
    }
NARROW(float32, uint32_t)
NARROW(bfloat16, uint16_t)
NARROW(float16, uint16_t)

#ifdef X86
AVX2 INLINE Four sticky_four(Four value) {
    const FourBits lost = (FourBits){0} + (((uint64_t)1 << 40) - 1);
    FourBits bits = (FourBits)value;
    return (Four)((((bits & lost) + lost) | bits) & ~lost);
}

AVX2 INLINE void put_float32(void *out, size_t i, Four value) {
    _mm_storeu_ps((float *)out + i, _mm256_cvtpd_ps((__m256d)value));
}

AVX2 INLINE void put_bfloat16(void *out, size_t i, Four value) {
    __m128i bits = _mm_castps_si128(_mm256_cvtpd_ps((__m256d)sticky_four(value)));
    __m128i last = _mm_and_si128(_mm_srli_epi32(bits, 16), _mm_set1_epi32(1));
    bits = _mm_srli_epi32(_mm_add_epi32(_mm_add_epi32(bits, _mm_set1_epi32(0x7fff)), last), 16);
    _mm_storel_epi64((__m128i *)((uint16_t *)out + i), _mm_packus_epi32(bits, bits));
}

AVX2 INLINE void put_float16(void *out, size_t i, Four value) {
    __m128 narrow = _mm256_cvtpd_ps((__m256d)sticky_four(value));
    _mm_storel_epi64((__m128i *)((uint16_t *)out + i), _mm_cvtps_ph(narrow, _MM_FROUND_TO_NEAREST_INT));
}

#define NARROW_BY_FOUR(NAME)                                                                                           \
    AVX2 static int narrow_##NAME##_by_four(void *restrict out, const double *restrict sum, size_t n, double c,        \
                                            double limit) {                                                            \
        const FourBits magnitude = (FourBits){0} + (~(uint64_t)0 >> 1);                                                \
        const Four most = (Four){0} + limit;                                                                           \
        FourBits bad = {0};                                                                                            \
        for (size_t i = 0; i + 4 <= n; i += 4) {                                                                       \
            Four value;                                                                                                \
            memcpy(&value, sum + i, sizeof value);                                                                     \
            value *= c;                                                                                                \
            bad |= (FourBits)~((Four)((FourBits)value & magnitude) < most);                                            \
            put_##NAME(out, i, value);                                                                                 \
        }                                                                                                              \
        return (bad[0] | bad[1] | bad[2] | bad[3]) != 0;                                                               \
    }
NARROW_BY_FOUR(float32)
NARROW_BY_FOUR(bfloat16)
NARROW_BY_FOUR(float16)
#endif

static int narrow(int64_t dtype, void *out, const double *sum, size_t n, double c, double limit) {
    size_t i = 0;
    int bad = 0;
#ifdef X86
    if (avx2) {
        i = n & ~(size_t)3;
        if (dtype == FLOAT32) bad = narrow_float32_by_four(out, sum, i, c, limit);
        else if (dtype == BFLOAT16) bad = narrow_bfloat16_by_four(out, sum, i, c, limit);
        else bad = narrow_float16_by_four(out, sum, i, c, limit);
    }
#endif
    if (dtype == FLOAT32) return bad | narrow_float32(out, sum, i, n, c, limit);
    if (dtype == BFLOAT16) return bad | narrow_bfloat16(out, sum, i, n, c, limit);
    return bad | narrow_float16(out, sum, i, n, c, limit);
}

static int nonfinite_32(const uint32_t *x, size_t n) {
    uint32_t bad = 0;
    for (size_t i = 0; i < n; i++) bad |= (x[i] & 0x7f800000u) == 0x7f800000u;
    return bad != 0;
}

static int nonfinite_16(const uint16_t *x, size_t n, uint16_t exponent) {
    uint16_t bad = 0;
    for (size_t i = 0; i < n; i++) bad |= (x[i] & exponent) == exponent;
    return bad != 0;
}

/* ---- checksum: CRC-32 of zip ---- */

static uint32_t crc_table[8][256];

static void make_table(void) {
    for (uint32_t i = 0; i < 256; i++) {
        uint32_t c = i;
        for (int k = 0; k < 8; k++) c = c & 1 ? (c >> 1) ^ 0xedb88320u : c >> 1;
        crc_table[0][i] = c;
    }
    for (uint32_t i = 0; i < 256; i++)
        for (int k = 1; k < 8; k++) {
            uint32_t c = crc_table[k - 1][i];
            crc_table[k][i] = (c >> 8) ^ crc_table[0][c & 0xff];
        }
}

static uint32_t crc_by_table(uint32_t crc, const unsigned char *p, size_t n) {
    for (; n >= 8; n -= 8, p += 8) {
        uint32_t a = crc ^ ((uint32_t)p[0] | (uint32_t)p[1] << 8 | (uint32_t)p[2] << 16 | (uint32_t)p[3] << 24);
        crc = crc_table[7][a & 0xff] ^ crc_table[6][(a >> 8) & 0xff] ^ crc_table[5][(a >> 16) & 0xff] ^
              crc_table[4][a >> 24] ^ crc_table[3][p[4]] ^ crc_table[2][p[5]] ^ crc_table[1][p[6]] ^ crc_table[0][p[7]];
    }
    for (; n; n--) crc = (crc >> 8) ^ crc_table[0][(crc ^ *p++) & 0xff];
    return crc;
}

#ifdef X86
/* Folding by carry-less multiplication (Gopal et al., Intel, 2009); 64 bytes at a time, n >= 64 and a multiple of 16. */
__attribute__((target("pclmul,sse4.1"))) static uint32_t crc_by_folding(uint32_t crc, const unsigned char *p, size_t n) {
    const __m128i by64 = _mm_set_epi64x(0x01c6e41596, 0x0154442bd4);
    const __m128i by16 = _mm_set_epi64x(0x00ccaa009e, 0x01751997d0);
    const __m128i low = _mm_setr_epi32(~0, 0, ~0, 0);
    __m128i x[4];
#define FOLD(a, k, b) \
    _mm_xor_si128(_mm_xor_si128(_mm_clmulepi64_si128(a, k, 0x00), _mm_clmulepi64_si128(a, k, 0x11)), b)
#define LOAD(at) _mm_loadu_si128((const __m128i *)(p + (at)))
    for (int i = 0; i < 4; i++) x[i] = LOAD(16 * i);
    x[0] = _mm_xor_si128(x[0], _mm_cvtsi32_si128((int)crc));
    for (p += 64, n -= 64; n >= 64; p += 64, n -= 64)
        for (int i = 0; i < 4; i++) x[i] = FOLD(x[i], by64, LOAD(16 * i));
    __m128i one = FOLD(x[0], by16, x[1]);
    one = FOLD(one, by16, x[2]);
    one = FOLD(one, by16, x[3]);
    for (; n >= 16; p += 16, n -= 16) one = FOLD(one, by16, LOAD(0));
    /* 128 to 64 bits, then Barrett's reduction to 32. */
    one = _mm_xor_si128(_mm_srli_si128(one, 8), _mm_clmulepi64_si128(one, by16, 0x10));
    const __m128i k5 = _mm_set_epi64x(0, 0x0163cd6124), poly = _mm_set_epi64x(0x01f7011641, 0x01db710641);
    one = _mm_xor_si128(_mm_srli_si128(one, 4), _mm_clmulepi64_si128(_mm_and_si128(one, low), k5, 0x00));
    __m128i q = _mm_clmulepi64_si128(_mm_and_si128(one, low), poly, 0x10);
    q = _mm_clmulepi64_si128(_mm_and_si128(q, low), poly, 0x00);
    return (uint32_t)_mm_extract_epi32(_mm_xor_si128(one, q), 1);
}
#endif

static uint32_t checksum(uint32_t crc, const void *data, size_t n) {
    const unsigned char *p = data;
    crc = ~crc;
#ifdef X86
    if (n >= 64 && __builtin_cpu_supports("pclmul") && __builtin_cpu_supports("sse4.1")) {
        size_t folded = n & ~(size_t)15;
        crc = crc_by_folding(crc, p, folded);
        p += folded;
        n -= folded;
    }
#endif
    return ~crc_by_table(crc, p, n);
}

/* ---- files ---- */

static int read_all(int64_t fd, void *to, size_t n, int64_t offset) {
    char *p = to;
    while (n) {
        ssize_t got = pread((int)fd, p, n, offset);
        if (got < 0 && errno == EINTR) continue;
        if (got < 0) return NOT_READ;
        if (got == 0) return ENDS_EARLY;
        p += got, offset += got, n -= (size_t)got;
    }
    return DONE;
}

static int write_all(int64_t fd, const void *from, size_t n, int64_t offset) {
    const char *p = from;
    while (n) {
        ssize_t done = pwrite((int)fd, p, n, offset);
        if (done < 0 && errno == EINTR) continue;
        if (done < 0) return NOT_WRITTEN;
        p += done, offset += done, n -= (size_t)done;
    }
    return DONE;
}

/* ---- a batch of parts ---- */

typedef struct {
    int64_t dtype;
    double coefficient;
} Term;

typedef struct {
    int64_t fd, offset;
} Place;

typedef struct {
    const Term *terms;
    size_t count;        /* of terms */
    int64_t out;         /* dtype */
    double common;       /* the sum is multiplied by this */
    double limit;        /* magnitude from which on the rounded sum is infinite */
    int copied;          /* the one input is the output, byte for byte */
    int checked;         /* of what is copied: look for NaN and infinity */
    int wants_crc;
    const int64_t *rows; /* a row for each part: elements, output, inputs */
    size_t parts;
    uint32_t *crcs;      /* result, one for each part */
    unsigned char *bad;  /* result: parts with NaN or infinity, which were not written to the end */
    size_t part, term;   /* where it failed */
} Batch;

static const size_t SIZE[] = {4, 2, 2, 1};

static int nonfinite(const Batch *b, const void *x, size_t n) {
    if (!b->checked) return 0;
    return b->out == FLOAT32 ? nonfinite_32(x, n) : nonfinite_16(x, n, b->out == FLOAT16 ? 0x7c00 : 0x7f80);
}

static int sum_block(Batch *b, const Place *at, size_t done, size_t n, char *x, double *sum, void *to, int *bad) {
    for (size_t t = 0; t < b->count;) {
        int64_t dtype = b->terms[t].dtype;
        size_t size = SIZE[dtype], first = t;
        Terms terms = {.count = 0};
        for (; terms.count < 4 && t < b->count && b->terms[t].dtype == dtype; t++, terms.count++) {
            char *term = x + (size_t)terms.count * READ;
            int status = read_all(at[t].fd, term, n * size, at[t].offset + (int64_t)(done * size));
            if (status != DONE) {
                b->term = t;
                return status;
            }
            terms.x[terms.count] = term;
            terms.c[terms.count] = b->terms[t].coefficient;
        }
        add(dtype, sum, &terms, n, first == 0);
    }
    *bad = narrow(b->out, to, sum, n, b->common, b->limit);
    return DONE;
}

static int copy_block(Batch *b, const Place *at, size_t done, size_t n, void *to, int *bad) {
    size_t size = SIZE[b->out];
    int status = read_all(at->fd, to, n * size, at->offset + (int64_t)(done * size));
    *bad = status == DONE && nonfinite(b, to, n);
    return status;
}

/* Large parts: from file to file, summed a block at a time, and written a window at a time. */
static int run_large(Batch *b, char *x, double *sum, char *window) {
    size_t size = SIZE[b->out], widest = 1;
    for (size_t t = 0; t < b->count; t++) widest = SIZE[b->terms[t].dtype] > widest ? SIZE[b->terms[t].dtype] : widest;
    size_t block = READ / widest;
    for (b->part = 0; b->part < b->parts; b->part++) {
        const int64_t *row = b->rows + b->part * (3 + 2 * b->count);
        const Place *out = (const Place *)(row + 1), *in = (const Place *)(row + 3);
        size_t total = (size_t)row[0], n;
        uint32_t crc = 0;
        int bad = 0;
        for (size_t done = 0; done < total && !bad; done += n) {
            int64_t position = out->offset + (int64_t)(done * size);
            size_t room = (WINDOW - (size_t)(position % WINDOW) + size - 1) / size;
            size_t stop = total - done < room ? total - done : room;
            for (n = 0; n < stop && !bad;) {
                size_t next = stop - n < block ? stop - n : block;
                char *to = window + n * size;
                int status = b->copied ? copy_block(b, in, done + n, next, to, &bad)
                                       : sum_block(b, in, done + n, next, x, sum, to, &bad);
                if (status != DONE) return status;
                if (b->wants_crc) crc = checksum(crc, to, next * size);
                n += next;
            }
            if (bad) b->bad[b->part] = 1;
            else if (write_all(out->fd, window, n * size, position) != DONE) return NOT_WRITTEN;
        }
        b->crcs[b->part] = crc;
    }
    return DONE;
}

/* Small parts: neighbours are read in one call, with what stands between them, and the results are packed into memory.
   A row is the elements, and the inputs. */
static int run_small(Batch *b, char *span, double *sum, char *packed) {
    size_t width = 1 + 2 * b->count, size = SIZE[b->out], after;
    for (size_t t = 0; t < b->count; t++) {
        int64_t dtype = b->terms[t].dtype;
        size_t item = SIZE[dtype], at = 0;
        for (size_t p = 0; p < b->parts; p = after) {
            const Place *in = (const Place *)(b->rows + p * width + 1) + t;
            int64_t start = in->offset & ~(int64_t)63, end = in->offset + b->rows[p * width] * (int64_t)item;
            for (after = p + 1; after < b->parts; after++) {
                const Place *next = (const Place *)(b->rows + after * width + 1) + t;
                int64_t stop = next->offset + b->rows[after * width] * (int64_t)item;
                if (next->fd != in->fd || next->offset < end || next->offset > end + GAP || stop > start + SPAN) break;
                end = stop;
            }
            /* What stands before the first one shifts the span to the alignment that it has in the file. */
            int status = read_all(in->fd, span + (in->offset - start), (size_t)(end - in->offset), in->offset);
            if (status != DONE) {
                b->part = p, b->term = t;
                return status;
            }
            for (size_t q = p; q < after; q++) {
                const Place *place = (const Place *)(b->rows + q * width + 1) + t;
                size_t n = (size_t)b->rows[q * width];
                char *x = span + (place->offset - start);
                if (b->copied) memcpy(packed + at * size, x, n * size);
                else {
                    if (place->offset % (int64_t)item) x = memmove(span + SPAN, x, n * item);
                    Terms one = {{x}, {b->terms[t].coefficient}, 1};
                    add(dtype, sum + at, &one, n, t == 0);
                }
                at += n;
            }
        }
    }
    for (size_t p = 0, at = 0; p < b->parts; p++) {
        size_t n = (size_t)b->rows[p * width];
        char *to = packed + at * size;
        int bad = b->copied ? nonfinite(b, to, n) : narrow(b->out, to, sum + at, n, b->common, b->limit);
        b->bad[p] = (unsigned char)bad;
        if (b->wants_crc) b->crcs[p] = checksum(0, to, n * size);
        at += n;
    }
    return DONE;
}

PyDoc_STRVAR(sum_large_doc,
"sum_large(terms, out, common, limit, copied, checked, wants_crc, rows, crcs, bad, scratch)\n\n"
"Fill parts of output files with weighted sums; see native.py, its one caller.\n"
"Returns (status, part, term, errno).");

PyDoc_STRVAR(sum_small_doc,
"sum_small(terms, out, common, limit, copied, checked, wants_crc, rows, crcs, bad, scratch, packed)\n\n"
"Put weighted sums of small parts one behind the other into memory; see native.py, its one caller.\n"
"Returns (status, part, term, errno).");

static PyObject *work(PyObject *args, int small) {
    Py_buffer terms, table, crcs, bad, scratch, packed = {0};
    Batch b = {0};
    long long out;
    if (!PyArg_ParseTuple(args, small ? "y*Lddpppy*w*w*w*w*" : "y*Lddpppy*w*w*w*", &terms, &out, &b.common, &b.limit,
                          &b.copied, &b.checked, &b.wants_crc, &table, &crcs, &bad, &scratch, &packed))
        return NULL;
    size_t width = 0, elements = 0, longest = 0;
    b.terms = terms.buf, b.count = (size_t)terms.len / sizeof(Term), b.out = out;
    width = (small ? 1 : 3) + 2 * b.count;
    b.rows = table.buf, b.parts = (size_t)table.len / sizeof(int64_t) / width;
    b.crcs = crcs.buf, b.bad = bad.buf;
    for (size_t p = 0; p < b.parts; p++) {
        size_t n = (size_t)b.rows[p * width];
        elements += n;
        longest = n > longest ? n : longest;
    }
    /* What is read, the sums, and what is written at once: whole cache lines each. */
    size_t reads = small ? 2 * SPAN : 4 * READ, sums = (small ? (b.copied ? 0 : elements) : READ / 2) * sizeof(double);
    size_t shift = -(size_t)scratch.buf % 64, needed = shift + reads + sums + 64 + (small ? 0 : WINDOW + 64);
    int sound = out >= FLOAT32 && out <= RAW && b.count > 0 && (size_t)crcs.len >= 4 * b.parts &&
                (size_t)bad.len >= b.parts && (!b.copied || b.count == 1) && (b.copied || out != RAW) &&
                (size_t)scratch.len >= needed;
    for (size_t t = 0; t < b.count; t++) {
        sound = sound && b.terms[t].dtype >= FLOAT32 && (b.copied ? b.terms[t].dtype == out : b.terms[t].dtype < RAW);
        sound = sound && (!small || longest * SIZE[b.terms[t].dtype] <= SPAN / 2);
    }
    sound = sound && (!small || (size_t)packed.len >= elements * SIZE[out]);
    int status = DONE, reason = 0;
    if (sound) {
        char *x = (char *)scratch.buf + shift, *sum = x + reads;
        Py_BEGIN_ALLOW_THREADS
        errno = 0;
        status = small ? run_small(&b, x, (double *)sum, packed.buf) : run_large(&b, x, (double *)sum, sum + sums);
        reason = errno;
        Py_END_ALLOW_THREADS
    }
    PyObject *result = NULL;
    if (!sound) PyErr_SetString(PyExc_ValueError, "_native: arguments that do not fit each other");
    else result = Py_BuildValue("(inni)", status, (Py_ssize_t)b.part, (Py_ssize_t)b.term, reason);
    PyBuffer_Release(&terms), PyBuffer_Release(&table), PyBuffer_Release(&crcs), PyBuffer_Release(&bad);
    PyBuffer_Release(&scratch);
    if (small) PyBuffer_Release(&packed);
    return result;
}

static PyObject *sum_large(PyObject *self, PyObject *args) { return work(args, 0); }

static PyObject *sum_small(PyObject *self, PyObject *args) { return work(args, 1); }

static PyObject *crc32_of(PyObject *self, PyObject *data) {
    Py_buffer view;
    uint32_t crc;
    if (PyObject_GetBuffer(data, &view, PyBUF_SIMPLE) < 0) return NULL;
    Py_BEGIN_ALLOW_THREADS
    crc = checksum(0, view.buf, (size_t)view.len);
    Py_END_ALLOW_THREADS
    PyBuffer_Release(&view);
    return PyLong_FromUnsignedLong(crc);
}

PyDoc_STRVAR(start_disk_doc,
"start_disk(fd, offset, nbytes)\n\n"
"Let the disk begin with a part of a file, so that a sync later on has less to wait for; 0 bytes: to its end.");

static PyObject *start_disk(PyObject *self, PyObject *args) {
    int fd;
    long long offset, nbytes;
    if (!PyArg_ParseTuple(args, "iLL", &fd, &offset, &nbytes)) return NULL;
#ifdef SYNC_FILE_RANGE_WRITE
    Py_BEGIN_ALLOW_THREADS
    sync_file_range(fd, offset, nbytes, SYNC_FILE_RANGE_WRITE);  /* what fails here, fails in fsync, too */
    Py_END_ALLOW_THREADS
#endif
    Py_RETURN_NONE;
}

static PyMethodDef methods[] = {
    {"sum_large", sum_large, METH_VARARGS, sum_large_doc},
    {"sum_small", sum_small, METH_VARARGS, sum_small_doc},
    {"crc32", crc32_of, METH_O, "crc32(data)\n\nReturn what zlib.crc32 does."},
    {"start_disk", start_disk, METH_VARARGS, start_disk_doc},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "_native", NULL, -1, methods, NULL, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit__native(void) {
    make_table();
#ifdef X86
    unsigned a, b, c, d; /* older compilers cannot ask for F16C by its name */
    avx2 = __builtin_cpu_supports("avx2") && __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C);
#endif
    return PyModule_Create(&module);
}
