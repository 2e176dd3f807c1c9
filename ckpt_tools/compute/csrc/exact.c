/* Exact sums: the value of sum c_i x_i, correctly rounded. A sum is kept as high + low, and what rounding loses of low is
   bounded by `lost`; see summation.py for the value and its source. Products are scaled so that none has a bit below
   float64. An element that is not decided by this (or not finite) becomes NaN, and torch_sums.py computes it.

   The loops are plain ones, which the compiler turns into vectors of the width that a target has. A fused multiply-add
   gives what a product loses. */

#include <math.h>
#include <string.h>

#include "native.h"
#include "widen.h"

#ifdef X86
#define FMA2 __attribute__((target("avx2,fma")))
#define FMA512 __attribute__((target("avx512f,avx512dq,avx512vl,avx2,fma,prefer-vector-width=512")))
static int fused2, fused512;
#endif

void exact_init(void) {
#ifdef X86
    fused2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#ifndef WITHOUT_AVX512
    fused512 = fused2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
               __builtin_cpu_supports("avx512vl");
#endif
#endif
}

/* Add B to A, and return what rounding loses of it (Knuth). */
INLINE double two_sum(double *a, double b) {
    double sum = *a + b, part = sum - *a, lost = (*a - (sum - part)) + (b - part);
    *a = sum;
    return lost;
}

INLINE void add_low(double *low, double *lost, double b) {
    double r = two_sum(low, b);
    *lost += fabs(r);
}

/* Add up to four terms of float64 to the sums. */
INLINE void add_terms(double *restrict high, double *restrict low, double *restrict lost, double *restrict first,
                      const Terms *terms, size_t n, int begins, Kind kind, int count, double before) {
    const double *restrict x0 = terms->x[0], *restrict x1 = terms->x[1], *restrict x2 = terms->x[2],
                 *restrict x3 = terms->x[3];
    const double c0 = terms->c[0], c1 = terms->c[1], c2 = terms->c[2], c3 = terms->c[3];
#define TERM(k)                                                                        \
    if (count > k) {                                                                   \
        double x = x##k[i];                                                            \
        if (kind == AVERAGE) same = begins && k == 0 ? x : x == same ? same : NAN;     \
        double p = kind == MEAN ? x : x * c##k, e = kind == MEAN ? 0 : fma(x, c##k, -p); \
        if (begins && k == 0) h = p, l = e;                                            \
        else {                                                                         \
            double r = two_sum(&h, p);                                                 \
            add_low(&l, &b, r);                                                        \
            if (kind != MEAN) add_low(&l, &b, e);                                      \
        }                                                                              \
    }
#pragma GCC ivdep
    for (size_t i = 0; i < n; i++) {
        double h = 0, l = 0, b = before, same = 0;
        if (!begins) h = high[i], l = low[i], b = lost[i];
        if (!begins && kind == AVERAGE) same = first[i];
        TERM(0) TERM(1) TERM(2) TERM(3)
        high[i] = h, low[i] = l, lost[i] = b;
        if (kind == AVERAGE) first[i] = same;
    }
#undef TERM
}

#define CASES(KIND)                                                                                        \
    switch (terms->count + (begins ? 4 : 0)) {                                                             \
        case 1: add_terms(s.high, s.low, s.lost, s.first, terms, n, 0, KIND, 1, before); break;            \
        case 2: add_terms(s.high, s.low, s.lost, s.first, terms, n, 0, KIND, 2, before); break;            \
        case 3: add_terms(s.high, s.low, s.lost, s.first, terms, n, 0, KIND, 3, before); break;            \
        case 4: add_terms(s.high, s.low, s.lost, s.first, terms, n, 0, KIND, 4, before); break;            \
        case 5: add_terms(s.high, s.low, s.lost, s.first, terms, n, 1, KIND, 1, before); break;            \
        case 6: add_terms(s.high, s.low, s.lost, s.first, terms, n, 1, KIND, 2, before); break;            \
        case 7: add_terms(s.high, s.low, s.lost, s.first, terms, n, 1, KIND, 3, before); break;            \
        case 8: add_terms(s.high, s.low, s.lost, s.first, terms, n, 1, KIND, 4, before); break;            \
    }
#define ADD_EXACT(NAME, TARGET)                                                                                   \
    TARGET static void NAME(Kind kind, Exact s, const Terms *terms, size_t n, int begins, double before) {         \
        if (kind == MEAN) {                                                                                       \
            CASES(MEAN)                                                                                           \
        } else if (kind == AVERAGE) {                                                                             \
            CASES(AVERAGE)                                                                                        \
        } else {                                                                                                  \
            CASES(SUM)                                                                                            \
        }                                                                                                         \
    }

/* Turn the sums into values of float64 at `high`: correctly rounded if that is the dtype of the result. Otherwise rounded
   to odd, which makes a later rounding to fewer bits right (Boldo and Melquiond 2008). */
INLINE void finish(double *restrict high, const double *restrict low, const double *restrict lost,
                   const double *restrict first, size_t n, Kind kind, double last, int odd) {
    const double normal = kind == MEAN ? 0x1p-960 : 0x1p-700; /* what scaling back, or dividing, leaves a normal number */
#pragma GCC ivdep
    for (size_t i = 0; i < n; i++) {
        double h = high[i], b = lost[i], l = low[i], value;
        double r = two_sum(&h, l);
        h = l == 0 ? high[i] : h; /* keeps the sign of a zero */
        l = r;
        if (kind == MEAN) {
            double q = h / last, rest = fma(-q, last, h); /* the rest of a division has no more bits than its parts */
            b += fabs(two_sum(&rest, l));
            l = rest / last;
            b += fabs(fma(-l, last, rest));
            rest = q;
            r = two_sum(&rest, l);
            h = l == 0 ? q : rest;
            l = r;
        }
        /* More than what has been lost, and enough to move `low` off a tie. */
        double size = fabs(h), width = b == 0 ? 0 : 2 * b + fabs(l) * 0x1p-51;
        if (odd) {
            /* An even `high` moves by a unit towards `low`. */
            uint64_t bits, other;
            memcpy(&bits, &h, 8), memcpy(&other, &l, 8);
            uint64_t step = 1 - ((bits ^ other) >> 63 << 1);
            step = l == 0 ? 0 : step;
            bits += step & ((bits & 1) - 1);
            memcpy(&value, &bits, 8);
            value = fabs(l) > width ? value : b == 0 ? value : NAN;
            value = size < INFINITY ? value : NAN;
        } else {
            value = h + (l + width) == h ? h : NAN;
            value = h + (l - width) == h ? value : NAN;
            value = size < normal ? size + b == 0 ? value : NAN : value;
        }
        if (kind != MEAN) value *= last;
        if (kind == AVERAGE) value = first[i] == first[i] ? first[i] : value;
        high[i] = value;
    }
}

#define FINISH_EXACT(NAME, TARGET)                                                                    \
    TARGET static void NAME(Kind kind, Exact s, size_t n, double last, int odd) {                     \
        if (kind == MEAN && odd) finish(s.high, s.low, s.lost, s.first, n, MEAN, last, 1);            \
        else if (kind == MEAN) finish(s.high, s.low, s.lost, s.first, n, MEAN, last, 0);              \
        else if (kind == AVERAGE && odd) finish(s.high, s.low, s.lost, s.first, n, AVERAGE, last, 1); \
        else if (kind == AVERAGE) finish(s.high, s.low, s.lost, s.first, n, AVERAGE, last, 0);        \
        else if (odd) finish(s.high, s.low, s.lost, s.first, n, SUM, last, 1);                        \
        else finish(s.high, s.low, s.lost, s.first, n, SUM, last, 0);                                 \
    }

ADD_EXACT(add_portable, )
FINISH_EXACT(finish_portable, )
#ifdef X86
ADD_EXACT(add_fused2, FMA2)
FINISH_EXACT(finish_fused2, FMA2)
ADD_EXACT(add_fused512, FMA512)
FINISH_EXACT(finish_fused512, FMA512)
#define BEST(NAME) (fused512 ? NAME##_fused512 : fused2 ? NAME##_fused2 : NAME##_portable)
#else
#define BEST(NAME) NAME##_portable
#endif

void add_exact(Kind kind, Exact sum, const Terms *terms, size_t n, int begins, double before) {
    BEST(add)(kind, sum, terms, n, begins, before);
}

void finish_exact(Kind kind, Exact sum, size_t n, double last, int odd) { BEST(finish)(kind, sum, n, last, odd); }
