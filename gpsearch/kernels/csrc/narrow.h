/* Products with dense weights of 8 and 16 bits, of which several columns lie together. Needs pack.h,
   and where VW is 16 immintrin.h, math.h and WITH_VNNI.

   BFLOAT16: a row's weights in two columns fill the bits of one float, and the weight in the upper
   half becomes one by clearing the lower.

   INT8, with AVX-512: four columns, for processors with VNNI. These multiply four bytes at a time and
   add up whole numbers. For that x is written as whole numbers of a unit, too, in three digits of 8
   bits, or in four where entries are large: the unit is to be at most 2^-20, and not only small beside
   the largest entry. Without VNNI, and for an x that digits do not suit, weights are turned into
   floats. */

static void multiply_pairs(const Matrix *m, const float *x, float *y)
{
    const int64_t pairs = padded_columns(m) / 2;
    const int low = __BYTE_ORDER__ == __ORDER_BIG_ENDIAN__; /* the column in the lower half */
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
                    sums[2 * i][j] += splat(x[2 * (p + i) + low]) * (vf)(both << 16);
                    sums[2 * i + 1][j] += splat(x[2 * (p + i) + !low]) * (vf)(both & -65536);
                }
            }
#pragma GCC unroll 2
        for (int j = 0; j < 2; j++) {
            const int64_t at = row + j * VW;
            store(y + at, load(y + at) + ((sums[0][j] + sums[1][j]) + (sums[2][j] + sums[3][j])));
        }
    }
}

enum { MOST_DIGITS = 4, MOST_IN_DIGITS = 4096 /* columns for whose digits the stack has room */ };
#define LARGE 4.0f            /* for three digits */
#define TOO_LARGE 1024.0f     /* for four */

typedef struct {
    int count; /* of an entry's digits, the lowest first; 0: x does not suit */
    float unit;
    int32_t sums[MOST_DIGITS];
    int8_t digits[MOST_DIGITS][MOST_IN_DIGITS];
} InDigits;

#if VW == 16

/* Tells whether weights of 8 bits in so many columns are multiplied by digits. */
int64_t NAME(knows_digits)(int64_t columns)
{
    return columns <= MOST_IN_DIGITS && __builtin_cpu_supports("avx512vnni") != 0;
}

INLINE void write_each_digit(const int count, const float *x, int64_t padded, float units, InDigits *d)
{
    __m512i sums[MOST_DIGITS] = {_mm512_setzero_si512()};
    for (int64_t k = 0; k < padded; k += VW) {
        __m512i rest = _mm512_cvtps_epi32((__m512)(load(x + k) * splat(units)));
#pragma GCC unroll 4
        for (int i = 0; i < count; i++) {
            const __m512i digit = _mm512_srai_epi32(_mm512_slli_epi32(rest, 24), 24);
            rest = _mm512_srai_epi32(_mm512_sub_epi32(rest, digit), 8);
            sums[i] = _mm512_add_epi32(sums[i], digit);
            _mm_storeu_si128((__m128i *)(d->digits[i] + k), _mm512_cvtepi32_epi8(digit));
        }
    }
    for (int i = 0; i < count; i++) d->sums[i] = _mm512_reduce_add_epi32(sums[i]);
}

/* Writes x in digits within -128 and 127, if it suits: it may be too long, or too large or no number
   somewhere, or nearly denormal everywhere. */
static void write_digits(const float *x, int64_t columns, InDigits *d)
{
    const int64_t padded = (columns + VW - 1) / VW * VW; /* where x is zero */
    d->count = 0;
    if (!NAME(knows_digits)(columns)) return;
    __m512i most = _mm512_setzero_si512(); /* as whole numbers, NaN is more than any float */
    for (int64_t k = 0; k < padded; k += VW)
        most = _mm512_max_epi32(most, (__m512i)_mm512_abs_ps((__m512)load(x + k)));
    const int32_t bits = _mm512_reduce_max_epi32(most);
    float largest;
    int exponent;
    memcpy(&largest, &bits, sizeof largest);
    if (largest != 0.0f && !(largest > 1e-30f && largest <= TOO_LARGE)) return;
    d->count = largest > LARGE ? 4 : 3;
    /* The largest number of so many digits falls short of a power of two by 0.4 %. */
    const int room = 8 * d->count - 1 - (frexpf(largest, &exponent) > 0.99f);
    d->unit = ldexpf(1.0f, exponent - room);
    const float units = ldexpf(1.0f, room - exponent);
    if (d->count == 3) write_each_digit(3, x, padded, units, d);
    else write_each_digit(4, x, padded, units, d);
}

/* The instruction wants one factor without a sign: the weight and 128, which makes a sum too large by
   128 times the sum of the digits. */
WITH_VNNI INLINE void multiply_each_digit(const int count, const Matrix *m, const InDigits *d, float *y)
{
    const int64_t quads = padded_columns(m) / 4;
    const char *w = (const char *)VALUES(m);
    const __m512i more = _mm512_set1_epi8(-128);
    for (int64_t row = 0; row < m->rows; row += PANEL, w += quads * 4 * PANEL) {
        __m512i sums[2][MOST_DIGITS][2] = {{{_mm512_setzero_si512()}}};
        for (int64_t q = 0; q < quads; q += 2)
#pragma GCC unroll 2
            for (int p = 0; p < 2; p++) {
                const char *at = w + (q + p) * 4 * PANEL;
                const __m512i one = _mm512_xor_si512(_mm512_loadu_si512(at), more);
                const __m512i other = _mm512_xor_si512(_mm512_loadu_si512(at + 64), more);
                __builtin_prefetch(at + AHEAD);
                __builtin_prefetch(at + AHEAD + 64);
#pragma GCC unroll 4
                for (int i = 0; i < count; i++) {
                    int32_t four;
                    memcpy(&four, d->digits[i] + 4 * (q + p), sizeof four);
                    const __m512i digits = _mm512_set1_epi32(four);
                    sums[p][i][0] = _mm512_dpbusd_epi32(sums[p][i][0], one, digits);
                    sums[p][i][1] = _mm512_dpbusd_epi32(sums[p][i][1], other, digits);
                }
            }
#pragma GCC unroll 2
        for (int j = 0; j < 2; j++) {
            vf sum = {0};
#pragma GCC unroll 4
            for (int i = count - 1; i >= 0; i--) {
                const vi exact = (vi)sums[0][i][j] + (vi)sums[1][i][j] - 128 * d->sums[i];
                sum = splat(256.0f) * sum + __builtin_convertvector(exact, vf);
            }
            const int64_t at = row + j * VW;
            store(y + at, load(y + at) + load(SCALES(m) + at) * (splat(d->unit) * sum));
        }
    }
}

WITH_VNNI static void multiply_digits(const Matrix *m, const InDigits *d, float *y)
{
    if (d->count == 3) multiply_each_digit(3, m, d, y);
    else multiply_each_digit(4, m, d, y);
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

int64_t NAME(knows_digits)(int64_t columns) { return (void)columns, 0; }

INLINE void write_digits(const float *x, int64_t columns, InDigits *d)
{
    (void)x, (void)columns, d->count = 0;
}

INLINE void multiply_digits(const Matrix *m, const InDigits *d, float *y) { (void)m, (void)d, (void)y; }

INLINE void multiply_fours(const Matrix *m, const float *x, float *y) { (void)m, (void)x, (void)y; }

#endif
