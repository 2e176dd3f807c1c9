/* CRC-32 as zip has it: by tables, and where the processor can by carry-less multiplication. */

#include "native.h"

#ifdef X86
#include <immintrin.h>
#endif

static uint32_t crc_table[8][256];

void crc_init(void) {
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

uint32_t checksum(uint32_t crc, const void *data, size_t n) {
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


/* ---- polynomials over GF(2), modulo that of zip; the highest bit of a number is x^0 ---- */

static uint32_t multiply(uint32_t a, uint32_t b) {
    uint32_t product = 0;
    for (uint32_t bit = (uint32_t)1 << 31; bit; bit >>= 1) {
        product ^= a & bit ? b : 0;
        b = b >> 1 ^ (b & 1 ? 0xedb88320u : 0);
    }
    return product;
}

uint32_t crc_shift(uint32_t crc, uint64_t nbytes) {
    static _Thread_local uint64_t last;
    static _Thread_local uint32_t power = (uint32_t)1 << 31; /* x^(8 * last): rows are as far apart as the last ones */
    if (!crc) return 0;
    if (nbytes != last) {
        uint32_t square = (uint32_t)1 << 23; /* x^8 */
        power = (uint32_t)1 << 31;
        for (last = nbytes; nbytes; nbytes >>= 1, square = multiply(square, square))
            if (nbytes & 1) power = multiply(square, power);
    }
    return multiply(power, crc);
}
