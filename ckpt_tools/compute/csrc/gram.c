/* Inner products of rows of numbers: of the differences of each row from the last one, and of the last one itself. */

#include <string.h>

#include "native.h"

#ifdef X86
#include <immintrin.h>
#define FMA __attribute__((target("avx2,fma")))
#endif

/* Add the products of row A with rows B to B + COUNT to SUMS. */
static void products(const double *a, const double *b, size_t count, double *sums) {
    for (size_t j = 0; j < count; j++, b += GRAM_CHUNK) {
        double part[4] = {0};
        for (size_t i = 0; i < GRAM_CHUNK; i += 4)
            for (int k = 0; k < 4; k++) part[k] += a[i + k] * b[i + k];
        sums[j] += (part[0] + part[1]) + (part[2] + part[3]);
    }
}

static void subtract(double *row, const double *last) {
    for (size_t i = 0; i < GRAM_CHUNK; i++) row[i] -= last[i];
}

#ifdef X86
FMA static void subtract_by_four(double *row, const double *last) {
    for (size_t i = 0; i < GRAM_CHUNK; i += 4)
        _mm256_storeu_pd(row + i, _mm256_sub_pd(_mm256_loadu_pd(row + i), _mm256_loadu_pd(last + i)));
}

FMA static double total(__m256d v) {
    double part[4];
    memcpy(part, &v, sizeof part);
    return (part[0] + part[1]) + (part[2] + part[3]);
}

/* The products of four rows with two: eight sums and six factors stay in registers. */
FMA static void products_4x2(const double *a, const double *b, double *sums, size_t width) {
    const double *a1 = a + GRAM_CHUNK, *a2 = a + 2 * GRAM_CHUNK, *a3 = a + 3 * GRAM_CHUNK, *b1 = b + GRAM_CHUNK;
    __m256d s[8];
    for (int k = 0; k < 8; k++) s[k] = _mm256_setzero_pd();
    for (size_t i = 0; i < GRAM_CHUNK; i += 4) {
        __m256d y0 = _mm256_loadu_pd(b + i), y1 = _mm256_loadu_pd(b1 + i), x;
        x = _mm256_loadu_pd(a + i), s[0] = _mm256_fmadd_pd(x, y0, s[0]), s[1] = _mm256_fmadd_pd(x, y1, s[1]);
        x = _mm256_loadu_pd(a1 + i), s[2] = _mm256_fmadd_pd(x, y0, s[2]), s[3] = _mm256_fmadd_pd(x, y1, s[3]);
        x = _mm256_loadu_pd(a2 + i), s[4] = _mm256_fmadd_pd(x, y0, s[4]), s[5] = _mm256_fmadd_pd(x, y1, s[5]);
        x = _mm256_loadu_pd(a3 + i), s[6] = _mm256_fmadd_pd(x, y0, s[6]), s[7] = _mm256_fmadd_pd(x, y1, s[7]);
    }
    for (int k = 0; k < 4; k++) sums[k * width] += total(s[2 * k]), sums[k * width + 1] += total(s[2 * k + 1]);
}
#endif

void gram(const Dtype *const *dtypes, const char *const *rows, size_t count, size_t n, double *sums, double *scratch) {
    size_t padded = (count + 3) & ~(size_t)3; /* with rows of zeros */
#ifdef X86
    int fast = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#endif
    double *last = scratch + (count - 1) * GRAM_CHUNK;
    memset(scratch + count * GRAM_CHUNK, 0, (padded - count) * GRAM_CHUNK * sizeof *scratch);
    for (size_t at = 0; at < n; at += GRAM_CHUNK) {
        size_t some = n - at < GRAM_CHUNK ? n - at : GRAM_CHUNK;
        if (some < GRAM_CHUNK) memset(scratch, 0, count * GRAM_CHUNK * sizeof *scratch);
        for (size_t r = count; r-- > 0;) {
            double *to = scratch + r * GRAM_CHUNK;
            widen(dtypes[r]->code, to, rows[r] + at * dtypes[r]->size, some);
            if (r + 1 == count) continue;
#ifdef X86
            if (fast) subtract_by_four(to, last);
            else
#endif
                subtract(to, last);
        }
#ifdef X86
        for (size_t a = 0; fast && a < padded; a += 4)
            for (size_t b = a; b < padded; b += 2)
                products_4x2(scratch + a * GRAM_CHUNK, scratch + b * GRAM_CHUNK, sums + a * padded + b, padded);
        if (fast) continue;
#endif
        for (size_t a = 0; a < count; a++)
            products(scratch + a * GRAM_CHUNK, scratch + a * GRAM_CHUNK, count - a, sums + a * padded + a);
    }
}
