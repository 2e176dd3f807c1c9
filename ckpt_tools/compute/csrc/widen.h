/* Widening to float64: exact; an element of an array, or four or eight of them in a vector. */

#ifndef WIDEN_H
#define WIDEN_H

#include <string.h>

#include "native.h"

#define INLINE static inline __attribute__((always_inline))

#ifdef X86
#include <immintrin.h>
#define AVX2 __attribute__((target("avx2,f16c")))
#define AVX512 __attribute__((target("avx512f,avx2,f16c")))
typedef double Four __attribute__((vector_size(32)));
typedef double Eight __attribute__((vector_size(64)));
/* Set by sum_init: the processor has AVX2 and F16C; and AVX-512, which the system lets it use. The steps are the same in
   vectors of any width, so the results are. */
extern int avx2, avx512;
#endif

/* ---- element I of X ---- */

INLINE double from_bits(uint32_t bits) {
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

INLINE double from_float64(const void *x, size_t i) { return ((const double *)x)[i]; }

INLINE double from_float32(const void *x, size_t i) { return ((const float *)x)[i]; }

INLINE double from_bfloat16(const void *x, size_t i) { return from_bits((uint32_t)((const uint16_t *)x)[i] << 16); }

INLINE double from_float16(const void *x, size_t i) {
    /* Exponent and fraction go to their place in float32; 2^112 corrects the bias, of subnormal numbers, too. */
    uint16_t bits = ((const uint16_t *)x)[i];
    uint32_t moved = (uint32_t)(bits & 0x7fff) << 13, sign = (uint32_t)(bits & 0x8000) << 16;
    float scaled;
    memcpy(&scaled, &moved, 4);
    scaled *= 0x1p112f;
    memcpy(&moved, &scaled, 4);
    moved |= (bits & 0x7c00) == 0x7c00 ? 0x7f800000u : 0; /* infinity and NaN stay so */
    return from_bits(moved | sign);
}

#ifdef X86
/* ---- elements from I on ---- */

AVX2 INLINE Four four_float64(const void *x, size_t i) { return (Four)_mm256_loadu_pd((const double *)x + i); }

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

AVX512 INLINE Eight eight_float64(const void *x, size_t i) { return (Eight)_mm512_loadu_pd((const double *)x + i); }

AVX512 INLINE Eight eight_float32(const void *x, size_t i) {
    return (Eight)_mm512_cvtps_pd(_mm256_loadu_ps((const float *)x + i));
}

AVX512 INLINE Eight eight_bfloat16(const void *x, size_t i) {
    __m256i words = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)((const uint16_t *)x + i)));
    return (Eight)_mm512_cvtps_pd(_mm256_castsi256_ps(_mm256_slli_epi32(words, 16)));
}

AVX512 INLINE Eight eight_float16(const void *x, size_t i) {
    return (Eight)_mm512_cvtps_pd(_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)((const uint16_t *)x + i))));
}
#endif

#endif
