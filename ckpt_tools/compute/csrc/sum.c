/* Arithmetic on arrays: widen to float64, add, round once. Each step of a plain sum is that of torch_arithmetic.py,
   so that the bytes are the same. Multiplication and addition round separately: setup.py turns fused multiply-add off. */

#include <math.h>
#include <string.h>

#include "native.h"
#include "widen.h"

#ifdef X86
#include <cpuid.h>
typedef uint64_t FourBits __attribute__((vector_size(32)));
typedef int64_t FourSigned __attribute__((vector_size(32)));
int avx2, avx512;
#endif

const Dtype DTYPES[] = {
    {"float64", FLOAT64, 8, 1, INFINITY},
    {"float32", FLOAT32, 4, 1, 0x1.ffffffp127},
    {"bfloat16", BFLOAT16, 2, 1, 0x1.ffp127},
    {"float16", FLOAT16, 2, 1, 0x1.ffep15},
    {"float8_e4m3fn", FLOAT8_E4M3FN, 1, 1, 0x1.dp8},
    {"float8_e5m2", FLOAT8_E5M2, 1, 1, 0x1.ep15},
    {"float8_e4m3fnuz", FLOAT8_E4M3FNUZ, 1, 1, 0x1.fp7},
    {"float8_e5m2fnuz", FLOAT8_E5M2FNUZ, 1, 1, 0x1.ep15},
    {"complex128", FLOAT64, 8, 2, INFINITY},
    {"complex64", FLOAT32, 4, 2, 0x1.ffffffp127},
    {"complex32", FLOAT16, 2, 2, 0x1.ffep15},
    {NULL, RAW, 1, 1, 0},
};

/* Bits of a narrow format behind the leading one of the significand, and the exponent of its smallest normal number. */
enum { FLOAT16_FRACTION = 10, FLOAT16_LOWEST = -14 };
static const struct Narrow8 {
    Code code;
    int fraction, lowest;
    int fnuz; /* no infinity, no -0: its code is the only NaN */
} NARROW8[] = {
    {FLOAT8_E4M3FN, 3, -6, 0},
    {FLOAT8_E5M2, 2, -14, 0},
    {FLOAT8_E4M3FNUZ, 3, -7, 1},
    {FLOAT8_E5M2FNUZ, 2, -15, 1},
};

#define EACH8(DO) DO(0, float8_e4m3fn) DO(1, float8_e5m2) DO(2, float8_e4m3fnuz) DO(3, float8_e5m2fnuz)

static double value8[4][256]; /* of each code of these */

void sum_init(void) {
#ifdef X86
    unsigned a, b, c, d; /* older compilers cannot ask for F16C by its name */
    avx2 = __builtin_cpu_supports("avx2") && __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C);
#ifndef WITHOUT_AVX512
    avx512 = avx2 && __builtin_cpu_supports("avx512f");
#endif
#endif
    for (int k = 0; k < 4; k++)
        for (int code = 0; code < 256; code++) {
            const struct Narrow8 *format = &NARROW8[k];
            int one = 1 << format->fraction, significand = code & (one - 1), exponent = (code & 127) >> format->fraction;
            double value = exponent ? ldexp(significand + one, exponent - 1 + format->lowest - format->fraction)
                                    : ldexp(significand, format->lowest - format->fraction);
            if (format->fnuz) value = code == 128 ? NAN : value;
            else if (format->code == FLOAT8_E4M3FN) value = (code & 127) == 127 ? NAN : value;
            else if (exponent == 31) value = significand ? NAN : INFINITY;
            value8[k][code] = code & 128 ? -value : value;
        }
}

/* ---- widening of the dtypes of 8 bits ---- */

#define FROM8(k, NAME) \
    INLINE double from_##NAME(const void *x, size_t i) { return value8[k][((const uint8_t *)x)[i]]; }
EACH8(FROM8)

/* ---- adding ---- */

/* Add elements I to N of the terms to the sums. If they are the FIRST terms, the sums hold nothing yet; if they are
   PLAIN, all coefficients are 1. Takes STEP elements at a time, and returns the index of the first one that is left. The
   compiler makes a loop for each case: 1 to 4 terms, 4 more if they are not the first, 8 more if plain. */
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
#define EACH(DO) \
    DO(FLOAT64, float64) DO(FLOAT32, float32) DO(BFLOAT16, bfloat16) DO(FLOAT16, float16) \
    DO(FLOAT8_E4M3FN, float8_e4m3fn) DO(FLOAT8_E5M2, float8_e5m2) DO(FLOAT8_E4M3FNUZ, float8_e4m3fnuz) \
    DO(FLOAT8_E5M2FNUZ, float8_e5m2fnuz)
#define ADD_ONE_BY_ONE(CODE, NAME) ADD(add_##NAME, , double, from_##NAME, 1)
EACH(ADD_ONE_BY_ONE)
#ifdef X86
ADD(add_float64_by_eight, AVX512, Eight, eight_float64, 8)
ADD(add_float64_by_four, AVX2, Four, four_float64, 4)
ADD(add_float32_by_four, AVX2, Four, four_float32, 4)
ADD(add_bfloat16_by_four, AVX2, Four, four_bfloat16, 4)
ADD(add_float16_by_four, AVX2, Four, four_float16, 4)
#endif

void add(Code code, double *sum, const Terms *terms, size_t n, int first) {
    size_t i = 0;
#ifdef X86
    if (avx512 && code == FLOAT64) i = add_float64_by_eight(sum, terms, 0, n, first);
    if (avx2 && code == FLOAT64) i = add_float64_by_four(sum, terms, i, n, first);
    else if (avx2 && code == FLOAT32) i = add_float32_by_four(sum, terms, 0, n, first);
    else if (avx2 && code == BFLOAT16) i = add_bfloat16_by_four(sum, terms, 0, n, first);
    else if (avx2 && code == FLOAT16) i = add_float16_by_four(sum, terms, 0, n, first);
#endif
#define ADD_REST(CODE, NAME) \
    case CODE: add_##NAME(sum, terms, i, n, first); break;
    switch (code) {
        EACH(ADD_REST)
        case RAW: break;
    }
}

/* Add four terms to the sums of each row, as `add` does: a value is widened once and stays in a register for all rows. */
#define ADD_TO_ROWS(NAME, TARGET, VALUE, WIDEN)                                                                        \
    TARGET INLINE void NAME##_of(const FourTerms *rows, size_t count, const void *const *x, size_t n, int first) {     \
        for (size_t i = 0; i < n; i += sizeof(VALUE) / sizeof(double)) {                                               \
            const VALUE x0 = WIDEN(x[0], i), x1 = WIDEN(x[1], i), x2 = WIDEN(x[2], i), x3 = WIDEN(x[3], i);            \
            for (size_t r = 0; r < count; r++) {                                                                       \
                const double *c = rows[r].c;                                                                           \
                VALUE before, total = x0 * c[0];                                                                       \
                if (!first) {                                                                                          \
                    memcpy(&before, rows[r].sum + i, sizeof before);                                                   \
                    total = before + total;                                                                            \
                }                                                                                                      \
                total += x1 * c[1];                                                                                    \
                total += x2 * c[2];                                                                                    \
                total += x3 * c[3];                                                                                    \
                memcpy(rows[r].sum + i, &total, sizeof total);                                                         \
            }                                                                                                          \
        }                                                                                                              \
    }                                                                                                                  \
    TARGET static void NAME(const FourTerms *rows, size_t count, const void *const *x, size_t n, int first) {          \
        first ? NAME##_of(rows, count, x, n, 1) : NAME##_of(rows, count, x, n, 0);                                     \
    }
#ifdef X86
#define EACH_IN_VECTORS(DO) DO(FLOAT64, float64) DO(FLOAT32, float32) DO(BFLOAT16, bfloat16) DO(FLOAT16, float16)
#define ADD_TO_ROWS_BOTH(CODE, NAME)                                   \
    ADD_TO_ROWS(add_##NAME##_to_rows_by_four, AVX2, Four, four_##NAME) \
    ADD_TO_ROWS(add_##NAME##_to_rows_by_eight, AVX512, Eight, eight_##NAME)
EACH_IN_VECTORS(ADD_TO_ROWS_BOTH)
#endif

int adds_to_rows(Code code) {
#ifdef X86
    return avx2 && (code == FLOAT64 || code == FLOAT32 || code == BFLOAT16 || code == FLOAT16);
#else
    (void)code;
    return 0;
#endif
}

void add_to_rows(Code code, const FourTerms *rows, size_t count, const void *const *x, size_t n, int first) {
#ifdef X86
#define TO_ROWS(CODE, NAME)                                                     \
    case CODE:                                                                  \
        if (avx512) add_##NAME##_to_rows_by_eight(rows, count, x, n, first);    \
        else add_##NAME##_to_rows_by_four(rows, count, x, n, first);            \
        break;
    switch (code) {
        EACH_IN_VECTORS(TO_ROWS)
        default: break;
    }
#else
    (void)code, (void)rows, (void)count, (void)x, (void)n, (void)first;
#endif
}

void widen(Code code, double *to, const void *x, size_t n) {
    Terms one = {{x}, {1.0}, 1};
    add(code, to, &one, n, 1);
}

/* Widen elements I to N and subtract LESS; as ADD in all else. */
#define SUBTRACT(NAME, TARGET, VALUE, WIDEN, STEP)                                                                     \
    TARGET static size_t NAME(double *restrict to, const void *x, const double *restrict less, size_t i, size_t n) {   \
        for (; i + STEP <= n; i += STEP) {                                                                             \
            VALUE minus, difference;                                                                                   \
            memcpy(&minus, less + i, sizeof minus);                                                                    \
            difference = WIDEN(x, i) - minus;                                                                          \
            memcpy(to + i, &difference, sizeof difference);                                                            \
        }                                                                                                              \
        return i;                                                                                                      \
    }
#define SUBTRACT_ONE_BY_ONE(CODE, NAME) SUBTRACT(subtract_##NAME, , double, from_##NAME, 1)
EACH(SUBTRACT_ONE_BY_ONE)
#ifdef X86
SUBTRACT(subtract_float64_by_four, AVX2, Four, four_float64, 4)
SUBTRACT(subtract_float32_by_four, AVX2, Four, four_float32, 4)
SUBTRACT(subtract_bfloat16_by_four, AVX2, Four, four_bfloat16, 4)
SUBTRACT(subtract_float16_by_four, AVX2, Four, four_float16, 4)
#endif

void widen_less(Code code, double *to, const void *x, const double *less, size_t n) {
    size_t i = 0;
#ifdef X86
    if (avx2 && code == FLOAT64) i = subtract_float64_by_four(to, x, less, 0, n);
    else if (avx2 && code == FLOAT32) i = subtract_float32_by_four(to, x, less, 0, n);
    else if (avx2 && code == BFLOAT16) i = subtract_bfloat16_by_four(to, x, less, 0, n);
    else if (avx2 && code == FLOAT16) i = subtract_float16_by_four(to, x, less, 0, n);
#endif
#define SUBTRACT_REST(CODE, NAME) \
    case CODE: subtract_##NAME(to, x, less, i, n); break;
    switch (code) {
        EACH(SUBTRACT_REST)
        case RAW: break;
    }
}

/* ---- rounding, once ---- */

INLINE float sticky(double value) {
    /* 12 bits of the mantissa are kept, the last one set if anything was lost, so that the later roundings are right
       (Boldo and Melquiond 2008). */
    const uint64_t lost = ((uint64_t)1 << 40) - 1;
    uint64_t bits;
    memcpy(&bits, &value, 8);
    bits = (((bits & lost) + lost) | bits) & ~lost;
    memcpy(&value, &bits, 8);
    return (float)value;
}

INLINE double to_float64(double value) { return value; }

INLINE uint32_t to_float32(double value) {
    float narrow = (float)value;
    uint32_t bits;
    memcpy(&bits, &narrow, 4);
    return bits;
}

INLINE uint16_t to_bfloat16(double value) {
    float narrow = sticky(value);
    uint32_t bits;
    memcpy(&bits, &narrow, 4);
    return (uint16_t)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

/* Round the magnitude of a finite double to a format with so many bits of fraction, whose smallest normal number is
   2^LOWEST. Returns the code, as if its exponent had no upper end. A normal number keeps its exponent and the upper bits
   of its fraction, and is rounded by the lower ones; a carry goes on into the exponent, as it ought to. A subnormal
   number counts units of the last place: its significand, shifted to the right, and rounded by what was shifted out. */
INLINE uint32_t round_to(double value, int fraction, int lowest) {
    const uint64_t one = (uint64_t)1 << 52;
    const int cut = 52 - fraction;
    uint64_t bits, unit;
    memcpy(&bits, &value, 8);
    bits &= ~(uint64_t)0 >> 1;
    int below = lowest + 1023 - (int)(bits >> 52);
    if (below <= 0) {
        unit = (uint64_t)1 << cut;
        bits = (bits + unit / 2 - 1 + (bits >> cut & 1)) >> cut;
        return (uint32_t)bits - ((uint32_t)(lowest + 1022) << fraction);
    }
    if (below > fraction + 2) below = fraction + 2; /* less than half a unit either way */
    uint64_t significand = (bits & (one - 1)) | one; /* float64's own subnormals are too small to matter */
    unit = (uint64_t)1 << (cut + below);
    return (uint32_t)((significand + unit / 2 - 1 + (significand >> (cut + below) & 1)) >> (cut + below));
}

INLINE uint32_t sign_of(double value, int bit) { return signbit(value) ? 1u << bit : 0; }

INLINE uint16_t to_float16(double value) {
    uint32_t code = round_to(value, FLOAT16_FRACTION, FLOAT16_LOWEST);
    code = code < 0x7c00 ? code : 0x7c00;
    code = value == value ? code : 0x7e00;
    return (uint16_t)(code | sign_of(value, 15));
}

INLINE uint8_t to_float8(double value, int k) {
    uint32_t code = round_to(value, NARROW8[k].fraction, NARROW8[k].lowest);
    if (NARROW8[k].fnuz) return (uint8_t)(code | (code ? sign_of(value, 7) : 0));
    return (uint8_t)(code | sign_of(value, 7));
}

/* Multiply elements I to N of the sums by C and round them. Returns 1 if a result is NaN or infinite. */
#define NARROW(NAME, TYPE)                                                                                             \
    static int narrow_##NAME(void *restrict out, const double *restrict sum, size_t i, size_t n, double c, double limit) { \
        TYPE *restrict to = out;                                                                                       \
        int64_t bad = 0;                                                                                               \
        for (; i < n; i++) {                                                                                           \
            double value = sum[i] * c;                                                                                 \
            bad |= !(fabs(value) < limit); /* true for a NaN, too */                                                   \
            to[i] = to_##NAME(value);                                                                                  \
        }                                                                                                              \
        return bad != 0;                                                                                               \
    }
NARROW(float64, double)
NARROW(float32, uint32_t)
NARROW(bfloat16, uint16_t)
NARROW(float16, uint16_t)
#define TO8(k, NAME) INLINE uint8_t to_##NAME(double value) { return to_float8(value, k); }
EACH8(TO8)
#define NARROW8_ONE_BY_ONE(k, NAME) NARROW(NAME, uint8_t)
EACH8(NARROW8_ONE_BY_ONE)

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

/* What round_to does, by the steps for a subnormal number for all: shifted less, a normal number has its leading one in
   the result, where it adds one to the exponent. */
AVX2 INLINE FourBits round_four(Four value, int fraction, int lowest) {
    const FourBits zero = {0}, one = zero + ((uint64_t)1 << 52), least = zero + (uint64_t)(1023 + lowest);
    const FourBits most = zero + (uint64_t)(fraction + 2);
    FourBits bits = (FourBits)value & ~(zero + ((uint64_t)1 << 63)), exponent = bits >> 52;
    FourBits significand = (bits & (one - 1)) | one, smaller = (FourBits)((FourSigned)exponent < (FourSigned)least);
    FourBits below = (least - exponent) & smaller, far = (FourBits)((FourSigned)below > (FourSigned)most);
    FourBits shift = (below & ~far) + (most & far) + (uint64_t)(52 - fraction), single = zero + 1;
    FourBits odd = significand >> shift & single;
    FourBits rounded = (significand + (single << (shift - 1)) - 1 + odd) >> shift;
    return rounded + (((exponent - least) & ~smaller) << fraction);
}

AVX2 INLINE void put_float8(void *out, size_t i, Four value, int k) {
    FourBits code = round_four(value, NARROW8[k].fraction, NARROW8[k].lowest), sign = (FourBits)value >> 63 << 7;
    if (NARROW8[k].fnuz) sign &= (FourBits)(code != 0);
    code |= sign;
    uint8_t *to = (uint8_t *)out + i;
    to[0] = (uint8_t)code[0], to[1] = (uint8_t)code[1], to[2] = (uint8_t)code[2], to[3] = (uint8_t)code[3];
}

#define PUT8(k, NAME) AVX2 INLINE void put_##NAME(void *out, size_t i, Four value) { put_float8(out, i, value, k); }
EACH8(PUT8)

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
NARROW_BY_FOUR(float8_e4m3fn)
NARROW_BY_FOUR(float8_e5m2)
NARROW_BY_FOUR(float8_e4m3fnuz)
NARROW_BY_FOUR(float8_e5m2fnuz)

AVX512 INLINE void put_eight_float32(void *out, size_t i, __m512d value) {
    _mm256_storeu_ps((float *)out + i, _mm512_cvtpd_ps(value));
}

AVX512 INLINE void put_eight_bfloat16(void *out, size_t i, __m512d value) {
    const __m512i lost = _mm512_set1_epi64(((int64_t)1 << 40) - 1);
    __m512i wide = _mm512_castpd_si512(value);
    wide = _mm512_andnot_si512(lost, _mm512_or_si512(_mm512_add_epi64(_mm512_and_si512(wide, lost), lost), wide));
    __m256i bits = _mm256_castps_si256(_mm512_cvtpd_ps(_mm512_castsi512_pd(wide)));
    __m256i last = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    bits = _mm256_srli_epi32(_mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), last), 16);
    bits = _mm256_permute4x64_epi64(_mm256_packus_epi32(bits, bits), 8);
    _mm_storeu_si128((__m128i *)((uint16_t *)out + i), _mm256_castsi256_si128(bits));
}

#define NARROW_BY_EIGHT(NAME)                                                                                          \
    AVX512 static int narrow_##NAME##_by_eight(void *restrict out, const double *restrict sum, size_t n, double c,     \
                                               double limit) {                                                         \
        const __m512d factor = _mm512_set1_pd(c), most = _mm512_set1_pd(limit);                                        \
        unsigned bad = 0;                                                                                              \
        for (size_t i = 0; i + 8 <= n; i += 8) {                                                                       \
            __m512d value = _mm512_mul_pd(_mm512_loadu_pd(sum + i), factor);                                           \
            bad |= _mm512_cmp_pd_mask(_mm512_abs_pd(value), most, _CMP_NLT_UQ); /* true for a NaN, too */              \
            put_eight_##NAME(out, i, value);                                                                           \
        }                                                                                                              \
        return bad != 0;                                                                                               \
    }
NARROW_BY_EIGHT(float32)
NARROW_BY_EIGHT(bfloat16)
#endif


int narrow(const Dtype *dtype, void *out, const double *sum, size_t n, double c) {
    const double limit = dtype->limit;
    size_t i = 0;
    int bad = 0;
#ifdef X86
#define NARROW_FOURS(CODE, NAME) \
    case CODE: bad = narrow_##NAME##_by_four(out, sum, i, c, limit); break;
    if (avx512 && (dtype->code == FLOAT32 || dtype->code == BFLOAT16)) {
        i = n & ~(size_t)7;
        bad = dtype->code == FLOAT32 ? narrow_float32_by_eight(out, sum, i, c, limit)
                                     : narrow_bfloat16_by_eight(out, sum, i, c, limit);
    } else if (avx2 && dtype->code != FLOAT64) {
        i = n & ~(size_t)3;
        switch (dtype->code) {
            NARROW_FOURS(FLOAT32, float32) NARROW_FOURS(BFLOAT16, bfloat16) NARROW_FOURS(FLOAT16, float16)
            NARROW_FOURS(FLOAT8_E4M3FN, float8_e4m3fn) NARROW_FOURS(FLOAT8_E5M2, float8_e5m2)
            NARROW_FOURS(FLOAT8_E4M3FNUZ, float8_e4m3fnuz) NARROW_FOURS(FLOAT8_E5M2FNUZ, float8_e5m2fnuz)
            default: break;
        }
    }
#endif
#define NARROW_REST(CODE, NAME) \
    case CODE: return bad | narrow_##NAME(out, sum, i, n, c, limit);
    switch (dtype->code) {
        EACH(NARROW_REST)
        case RAW: break;
    }
    return 1;
}

/* ---- looking for infinity and NaN: all ones in the exponent ---- */

#define NONFINITE(NAME, TYPE)                                                         \
    static int nonfinite_##NAME(const void *x, size_t n, TYPE exponent) {             \
        const TYPE *bits = x;                                                         \
        TYPE bad = 0;                                                                 \
        for (size_t i = 0; i < n; i++) bad |= (TYPE)((bits[i] & exponent) == exponent); \
        return bad != 0;                                                              \
    }
NONFINITE(64, uint64_t)
NONFINITE(32, uint32_t)
NONFINITE(16, uint16_t)

static int nonfinite_8(const uint8_t *x, size_t n, int k) {
    for (size_t i = 0; i < n; i++)
        if (!isfinite(value8[k][x[i]])) return 1;
    return 0;
}

int nonfinite(Code code, const void *x, size_t n) {
    switch (code) {
        case FLOAT64: return nonfinite_64(x, n, (uint64_t)0x7ff << 52);
        case FLOAT32: return nonfinite_32(x, n, 0x7f800000u);
        case BFLOAT16: return nonfinite_16(x, n, 0x7f80);
        case FLOAT16: return nonfinite_16(x, n, 0x7c00);
        case FLOAT8_E4M3FN: return nonfinite_8(x, n, 0);
        case FLOAT8_E5M2: return nonfinite_8(x, n, 1);
        case FLOAT8_E4M3FNUZ: return nonfinite_8(x, n, 2);
        case FLOAT8_E5M2FNUZ: return nonfinite_8(x, n, 3);
        case RAW: break;
    }
    return 0;
}
