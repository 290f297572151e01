/* Products with dense weights of 8 and 16 bits, of which several columns lie together. Needs pack.h.

   BFLOAT16: a row's weights in two columns fill the bits of one float, and the weight in the upper
   half becomes one by clearing the lower.

   INT8, with AVX-512: four columns, for processors with VNNI. These multiply four bytes at a time and
   add up whole numbers. For that x is written in whole numbers, too, of three digits of 8 bits,
   whose unit is less than 2^-20 of its largest entry; sums of them are exact. Without VNNI, and for an
   x that digits do not suit, weights are turned into floats. */

static void multiply_pairs(const Matrix *m, const float *x, float *y)
{
    const int64_t pairs = padded_columns(m) / 2;
    const char *w = (const char *)VALUES(m);
    for (int64_t row = 0; row < m->rows; row += PANEL) {
        vf sums[4][2] = {{{0}}};
        for (int64_t p = 0; p < pairs; p += 2)
#pragma GCC unroll 2
            for (int i = 0; i < 2; i++) {
#pragma GCC unroll 2
                for (int j = 0; j < 2; j++, w += 4 * VW) {
                    const vi both = (vi)load((const float *)w);
                    if (j % (16 / VW) == 0) __builtin_prefetch(w + AHEAD);
                    sums[2 * i][j] += splat(x[2 * (p + i)]) * (vf)(both << 16);
                    sums[2 * i + 1][j] += splat(x[2 * (p + i) + 1]) * (vf)(both & -65536);
                }
            }
#pragma GCC unroll 2
        for (int j = 0; j < 2; j++) {
            const int64_t at = row + j * VW;
            store(y + at, load(y + at) + ((sums[0][j] + sums[1][j]) + (sums[2][j] + sums[3][j])));
        }
    }
}

enum { DIGITS = 3, MOST_IN_DIGITS = 4096 /* columns for whose digits the stack has room */ };

typedef struct {
    float unit;
    int32_t sums[DIGITS];                 /* of each place, the lowest first */
    int8_t digits[DIGITS][MOST_IN_DIGITS]; /* within -128 and 127 */
} InDigits;

#if VW == 16

/* Tells whether weights of 8 bits are multiplied by digits. */
int64_t NAME(knows_digits)(void) { return __builtin_cpu_supports("avx512vnni") != 0; }

/* Writes x in digits, or tells that it does not suit: it is too long, or all zero, or has entries
   that are no finite numbers. */
static int write_digits(const float *x, int64_t columns, InDigits *d)
{
    const int64_t padded = (columns + VW - 1) / VW * VW; /* where x is zero */
    if (!NAME(knows_digits)() || padded > MOST_IN_DIGITS) return 0;
    __m512i most = _mm512_setzero_si512(); /* as whole numbers, NaN is more than any float */
    for (int64_t k = 0; k < padded; k += VW)
        most = _mm512_max_epi32(most, (__m512i)_mm512_abs_ps((__m512)load(x + k)));
    const int32_t bits = _mm512_reduce_max_epi32(most);
    float largest;
    int exponent;
    memcpy(&largest, &bits, sizeof largest);
    if (!(largest > 1e-30f && largest < 1e30f)) return 0;
    frexpf(largest, &exponent);
    d->unit = ldexpf(1.0f, exponent - 22);
    const __m512 units = _mm512_set1_ps(ldexpf(1.0f, 22 - exponent));
    __m512i sums[DIGITS] = {_mm512_setzero_si512()};
    for (int64_t k = 0; k < padded; k += VW) {
        __m512i rest = _mm512_cvtps_epi32(_mm512_mul_ps((__m512)load(x + k), units));
#pragma GCC unroll 3
        for (int i = 0; i < DIGITS; i++) {
            const __m512i digit = _mm512_srai_epi32(_mm512_slli_epi32(rest, 24), 24);
            rest = _mm512_srai_epi32(_mm512_sub_epi32(rest, digit), 8);
            sums[i] = _mm512_add_epi32(sums[i], digit);
            _mm_storeu_si128((__m128i *)(d->digits[i] + k), _mm512_cvtepi32_epi8(digit));
        }
    }
    for (int i = 0; i < DIGITS; i++) d->sums[i] = _mm512_reduce_add_epi32(sums[i]);
    return 1;
}

/* The instruction wants one factor without a sign: 128 more than the weight, so that each sum is 128
   times the digits' too large. */
__attribute__((target("avx512vnni"))) static void multiply_digits(
    const Matrix *m, const InDigits *d, float *y)
{
    const int64_t quads = padded_columns(m) / 4;
    const char *w = (const char *)VALUES(m);
    const __m512i more = _mm512_set1_epi8(-128);
    for (int64_t row = 0; row < m->rows; row += PANEL, w += quads * 4 * PANEL) {
        __m512i sums[2][DIGITS][2] = {{{_mm512_setzero_si512()}}};
        for (int64_t q = 0; q < quads; q += 2)
#pragma GCC unroll 2
            for (int p = 0; p < 2; p++) {
                const char *at = w + (q + p) * 4 * PANEL;
                const __m512i low = _mm512_xor_si512(_mm512_loadu_si512(at), more);
                const __m512i high = _mm512_xor_si512(_mm512_loadu_si512(at + 64), more);
                __builtin_prefetch(at + AHEAD);
                __builtin_prefetch(at + AHEAD + 64);
#pragma GCC unroll 3
                for (int i = 0; i < DIGITS; i++) {
                    int32_t four;
                    memcpy(&four, d->digits[i] + 4 * (q + p), sizeof four);
                    const __m512i one = _mm512_set1_epi32(four);
                    sums[p][i][0] = _mm512_dpbusd_epi32(sums[p][i][0], low, one);
                    sums[p][i][1] = _mm512_dpbusd_epi32(sums[p][i][1], high, one);
                }
            }
#pragma GCC unroll 2
        for (int j = 0; j < 2; j++) {
            vf sum = {0};
#pragma GCC unroll 3
            for (int i = DIGITS - 1; i >= 0; i--) {
                const vi exact = (vi)sums[0][i][j] + (vi)sums[1][i][j] - 128 * d->sums[i];
                sum = splat(256.0f) * sum + __builtin_convertvector(exact, vf);
            }
            const int64_t at = row + j * VW;
            store(y + at, load(y + at) + load(SCALES(m) + at) * (splat(d->unit) * sum));
        }
    }
}

static void multiply_fours(const Matrix *m, const float *x, float *y)
{
    const int64_t quads = padded_columns(m) / 4;
    const char *w = (const char *)VALUES(m);
    for (int64_t row = 0; row < m->rows; row += PANEL, w += quads * 4 * PANEL) {
        vf sums[4][2] = {{{0}}};
        for (int64_t q = 0; q < quads; q++)
#pragma GCC unroll 2
            for (int j = 0; j < 2; j++) {
                const vi four = (vi)_mm512_loadu_si512(w + (q * 2 + j) * 64);
#pragma GCC unroll 4
                for (int i = 0; i < 4; i++)
                    sums[i][j] += splat(x[4 * q + i]) *
                                  __builtin_convertvector(four << (24 - 8 * i) >> 24, vf);
            }
#pragma GCC unroll 2
        for (int j = 0; j < 2; j++) {
            const int64_t at = row + j * VW;
            const vf sum = (sums[0][j] + sums[1][j]) + (sums[2][j] + sums[3][j]);
            store(y + at, load(y + at) + load(SCALES(m) + at) * sum);
        }
    }
}

#else /* columns lie one by one */

int64_t NAME(knows_digits)(void) { return 0; }

INLINE int write_digits(const float *x, int64_t columns, InDigits *d)
{
    (void)x, (void)columns, (void)d;
    return 0;
}

INLINE void multiply_digits(const Matrix *m, const InDigits *d, float *y) { (void)m, (void)d, (void)y; }

INLINE void multiply_fours(const Matrix *m, const float *x, float *y) { (void)m, (void)x, (void)y; }

#endif
