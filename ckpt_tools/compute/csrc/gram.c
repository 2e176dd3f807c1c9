/* Inner products of rows of numbers: of the differences of each row from the last one, and of the last one itself. */

#include <errno.h>
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

#ifdef X86
FMA static double total(__m256d v) {
    double part[4];
    memcpy(part, &v, sizeof part);
    return (part[0] + part[1]) + (part[2] + part[3]);
}

/* The products of four rows with one another: ten sums and four factors stay in registers. */
FMA static void products_of_4(const double *a, double *sums, size_t width) {
    const double *a1 = a + GRAM_CHUNK, *a2 = a + 2 * GRAM_CHUNK, *a3 = a + 3 * GRAM_CHUNK;
    __m256d s[10];
    for (int k = 0; k < 10; k++) s[k] = _mm256_setzero_pd();
    for (size_t i = 0; i < GRAM_CHUNK; i += 4) {
        __m256d x0 = _mm256_loadu_pd(a + i), x1 = _mm256_loadu_pd(a1 + i);
        __m256d x2 = _mm256_loadu_pd(a2 + i), x3 = _mm256_loadu_pd(a3 + i);
        s[0] = _mm256_fmadd_pd(x0, x0, s[0]), s[1] = _mm256_fmadd_pd(x0, x1, s[1]);
        s[2] = _mm256_fmadd_pd(x0, x2, s[2]), s[3] = _mm256_fmadd_pd(x0, x3, s[3]);
        s[4] = _mm256_fmadd_pd(x1, x1, s[4]), s[5] = _mm256_fmadd_pd(x1, x2, s[5]);
        s[6] = _mm256_fmadd_pd(x1, x3, s[6]), s[7] = _mm256_fmadd_pd(x2, x2, s[7]);
        s[8] = _mm256_fmadd_pd(x2, x3, s[8]), s[9] = _mm256_fmadd_pd(x3, x3, s[9]);
    }
    for (size_t j = 0, k = 0; j < 4; j++)
        for (size_t i = j; i < 4; i++, k++) sums[j * width + i] += total(s[k]);
}

/* The products of four rows with two others: eight sums and three factors stay in registers. */
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

/* Add the products of N numbers of each row, in chunks whose widened rows stay in the first cache. WIDE has GRAM_CHUNK
   numbers for each row of SUMS. */
static void add_products(const Dtype *const *dtypes, const char *rows, size_t stride, size_t count, size_t n,
                         double *sums, double *wide) {
    size_t padded = (count + 3) & ~(size_t)3; /* with rows of zeros */
#ifdef X86
    int fast = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#endif
    double *last = wide + (count - 1) * GRAM_CHUNK;
    memset(wide + count * GRAM_CHUNK, 0, (padded - count) * GRAM_CHUNK * sizeof *wide);
    for (size_t at = 0; at < n; at += GRAM_CHUNK) {
        size_t some = n - at < GRAM_CHUNK ? n - at : GRAM_CHUNK;
        if (some < GRAM_CHUNK) memset(wide, 0, count * GRAM_CHUNK * sizeof *wide);
        widen(dtypes[count - 1]->code, last, rows + (count - 1) * stride + at * dtypes[count - 1]->size, some);
        for (size_t r = 0; r + 1 < count; r++) {
            const char *row = rows + r * stride + at * dtypes[r]->size;
            widen_less(dtypes[r]->code, wide + r * GRAM_CHUNK, row, last, some);
        }
#ifdef X86
        for (size_t a = 0; fast && a < padded; a += 4) {
            products_of_4(wide + a * GRAM_CHUNK, sums + a * padded + a, padded);
            for (size_t b = a + 4; b < count; b += 2)
                products_4x2(wide + a * GRAM_CHUNK, wide + b * GRAM_CHUNK, sums + a * padded + b, padded);
        }
        if (fast) continue;
#endif
        for (size_t a = 0; a < count; a++)
            products(wide + a * GRAM_CHUNK, wide + a * GRAM_CHUNK, count - a, sums + a * padded + a);
    }
}

/* Bytes of each row in a block: chunks of the widest dtype. */
static size_t row_of(size_t count) {
    const size_t chunk = GRAM_CHUNK * sizeof(double);
    size_t share = 8 * READ / count / chunk * chunk;
    return share ? share : chunk;
}

size_t gram_scratch(size_t count) {
    return count * row_of(count) + ((count + 3) & ~(size_t)3) * GRAM_CHUNK * sizeof(double) + 64;
}

Result gram(const Dtype *const *dtypes, const Place *in, size_t count, size_t n, double *sums, char *scratch) {
    size_t row = row_of(count), widest = 1, some;
    double *wide = (double *)(scratch + count * row);
    for (size_t r = 0; r < count; r++) widest = dtypes[r]->size > widest ? dtypes[r]->size : widest;
    for (size_t done = 0; done < n; done += some) {
        some = n - done < row / widest ? n - done : row / widest;
        for (size_t r = 0; r < count; r++) {
            size_t size = dtypes[r]->size;
            Status status = read_all(in[r].fd, scratch + r * row, some * size, in[r].offset + (int64_t)(done * size));
            if (status != DONE) return (Result){status, 0, r, errno};
        }
        add_products(dtypes, scratch, row, count, some, sums, wide);
    }
    return (Result){DONE, 0, 0, 0};
}
