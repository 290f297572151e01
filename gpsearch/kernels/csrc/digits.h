/* Products with dense weights of 8 bits by whole numbers, with AVX-512: four columns lie together, since
   processors with VNNI multiply four bytes at a time and add up whole numbers, and those with AMX whole
   tiles of them. For that x is written as whole numbers of a unit, too, in three digits of 8 bits, or
   in four where entries are large: the unit is to be at most 2^-20, and not only small beside the
   largest entry. Without VNNI, and for an x that digits do not suit, floats are multiplied (narrow.h).

   Needs pack.h, tiles.h and, where VW is 16, immintrin.h, math.h and WITH_VNNI. */

enum { MOST_DIGITS = 4, MOST_IN_DIGITS = 4096 /* columns for whose digits the stack has room */ };
#define LARGE 4.0f            /* for three digits */
#define TOO_LARGE 1024.0f     /* for four */

typedef struct {
    int count;  /* of an entry's digits; 0: x does not suit */
    float unit;
    int32_t sums[MOST_DIGITS];
    int8_t *lowest; /* digits of all entries, with zeros to a multiple of BYTES_ALONG; */
    int64_t step;   /* from these to the next higher ones */
} InDigits;

#if VW == 16

/* Tells whether weights of 8 bits in so many columns are multiplied by digits. */
int64_t NAME(knows_digits)(int64_t columns)
{
    return columns <= MOST_IN_DIGITS && __builtin_cpu_supports("avx512vnni") != 0;
}

INLINE int64_t whole_tiles(int64_t columns)
{
    return (columns + BYTES_ALONG - 1) / BYTES_ALONG * BYTES_ALONG;
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
            _mm_storeu_si128((__m128i *)(d->lowest + i * d->step + k), _mm512_cvtepi32_epi8(digit));
        }
    }
    for (int i = 0; i < count; i++) {
        d->sums[i] = _mm512_reduce_add_epi32(sums[i]);
        memset(d->lowest + i * d->step + padded, 0, (size_t)(whole_tiles(padded) - padded));
    }
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

/* y[16] += the sums of each digit, [digit, step], times their worth. */
INLINE void add_digits(
    const int count, const vi *sums, int64_t step, const InDigits *d, const float *scales, float *y)
{
    vf sum = {0};
#pragma GCC unroll 4
    for (int i = count - 1; i >= 0; i--)
        sum = splat(256.0f) * sum + __builtin_convertvector(sums[i * step], vf);
    store(y, load(y) + load(scales) * (splat(d->unit) * sum));
}

/* Of the rows of one panel, by VNNI. The instruction wants one factor without a sign: the weight and
   128, which makes a sum too large by 128 times the sum of the digits. */
WITH_VNNI INLINE void multiply_panel(
    const int count, const Matrix *m, int64_t row, const InDigits *d, float *y)
{
    const int64_t quads = padded_columns(m) / 4;
    const char *at = (const char *)VALUES(m) + row * quads * 4;
    const __m512i more = _mm512_set1_epi8(-128);
    __m512i sums[2][MOST_DIGITS][2] = {{{_mm512_setzero_si512()}}};
    for (int64_t q = 0; q < quads; q += 2)
#pragma GCC unroll 2
        for (int p = 0; p < 2; p++, at += 4 * PANEL) {
            const __m512i one = _mm512_xor_si512(_mm512_loadu_si512(at), more);
            const __m512i other = _mm512_xor_si512(_mm512_loadu_si512(at + 64), more);
            __builtin_prefetch(at + AHEAD);
            __builtin_prefetch(at + AHEAD + 64);
#pragma GCC unroll 4
            for (int i = 0; i < count; i++) {
                int32_t four;
                memcpy(&four, d->lowest + i * d->step + 4 * (q + p), sizeof four);
                const __m512i digits = _mm512_set1_epi32(four);
                sums[p][i][0] = _mm512_dpbusd_epi32(sums[p][i][0], one, digits);
                sums[p][i][1] = _mm512_dpbusd_epi32(sums[p][i][1], other, digits);
            }
        }
#pragma GCC unroll 2
    for (int j = 0; j < 2; j++) {
        vi exact[MOST_DIGITS];
#pragma GCC unroll 4
        for (int i = 0; i < count; i++)
            exact[i] = (vi)sums[0][i][j] + (vi)sums[1][i][j] - 128 * d->sums[i];
        add_digits(count, exact, 1, d, SCALES(m) + row + j * VW, y + row + j * VW);
    }
}

WITH_VNNI static void multiply_by_vnni(const Matrix *m, int64_t row, const InDigits *d, float *y)
{
    if (d->count == 3) multiply_panel(3, m, row, d, y);
    else multiply_panel(4, m, row, d, y);
}

#if defined(WITH_TILES)

/* Four tiles of sums, one of digits (of which the fourth may be anything), three of weights. */
static const Tiles FOR_ONE = {1, 0, {0}, {64, 64, 64, 64, 64, 64, 64, 64}, {4, 4, 4, 4, 4, 16, 16, 16}};

WITH_TILES static void begin_tiles(void) { _tile_loadconfig(&FOR_ONE); }

WITH_TILES static void end_tiles(void) { _tile_release(); }

/* y += W x, by tiles whose rows are the digits of x; between `begin_tiles` and `end_tiles`. */
WITH_TILES static void multiply_one_by_tiles(const Matrix *m, const InDigits *d, float *y)
{
    const int64_t columns = padded_columns(m), panel = columns * PANEL, step = PANEL * 4;
    const int8_t *w = (const int8_t *)VALUES(m);
    vi sums[MOST_DIGITS][4];
    LOADED_BY_TILES;
    for (int64_t row = 0; row < m->rows; row += 2 * PANEL, w += 2 * panel) {
        /* Two panels, or the last one twice: of four sums, each is ready again when its turn comes. */
        const int64_t two = row + PANEL < m->rows, other = two ? panel : 0;
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
        for (int64_t k = 0; k < columns; k += BYTES_ALONG) {
            const int8_t *const at = w + k * PANEL;
            _tile_loadd(4, d->lowest + k, d->step);
            _tile_loadd(5, at, step);
            _tile_dpbssd(0, 4, 5);
            _tile_loadd(6, at + 64, step);
            _tile_dpbssd(1, 4, 6);
            _tile_loadd(7, at + other, step);
            _tile_dpbssd(2, 4, 7);
            _tile_loadd(5, at + other + 64, step);
            _tile_dpbssd(3, 4, 5);
        }
        _tile_stored(0, &sums[0][0], sizeof sums[0]);
        _tile_stored(1, &sums[0][1], sizeof sums[0]);
        _tile_stored(2, &sums[0][2], sizeof sums[0]);
        _tile_stored(3, &sums[0][3], sizeof sums[0]);
        for (int64_t j = 0; j < 2 + 2 * two; j++) {
            const int64_t at = row + j * VW;
            if (d->count == 3) add_digits(3, &sums[0][j], 4, d, SCALES(m) + at, y + at);
            else add_digits(4, &sums[0][j], 4, d, SCALES(m) + at, y + at);
        }
    }
}

/* y[t] += W x[t], by tiles whose rows are the same digit of 32 x, which lie `next` apart. */
WITH_TILES static void multiply_band_by_tiles(
    const Matrix *m, int64_t steps, const InDigits *d, int64_t next, float *y, int64_t y_step)
{
    const int64_t columns = padded_columns(m), step = PANEL * 4;
    const int8_t *w = (const int8_t *)VALUES(m);
    int count = 3;
    vi sums[MOST_DIGITS][BAND][2];
    for (int64_t t = 0; t < steps; t++) count = d[t].count > count ? d[t].count : count;
    _tile_loadconfig(&ALL_WHOLE);
    LOADED_BY_TILES;
    for (int64_t row = 0; row < m->rows; row += PANEL, w += columns * PANEL) {
        for (int i = 0; i < count; i++) {
            const int8_t *const digits = d->lowest + i * d->step;
            _tile_zero(0);
            _tile_zero(1);
            _tile_zero(2);
            _tile_zero(3);
            for (int64_t k = 0; k < columns; k += BYTES_ALONG) {
                _tile_loadd(4, digits + k, next);
                _tile_loadd(5, digits + k + SIDE * next, next);
                _tile_loadd(6, w + k * PANEL, step);
                _tile_loadd(7, w + k * PANEL + 64, step);
                _tile_dpbssd(0, 4, 6);
                _tile_dpbssd(1, 4, 7);
                _tile_dpbssd(2, 5, 6);
                _tile_dpbssd(3, 5, 7);
            }
            _tile_stored(0, &sums[i][0][0], sizeof sums[i][0]);
            _tile_stored(1, &sums[i][0][1], sizeof sums[i][0]);
            _tile_stored(2, &sums[i][SIDE][0], sizeof sums[i][0]);
            _tile_stored(3, &sums[i][SIDE][1], sizeof sums[i][0]);
        }
        for (int64_t t = 0; t < steps; t++)
            for (int64_t j = 0; j < 2; j++) {
                const int64_t at = row + j * VW;
                float *const to = y + t * y_step + at;
                const vi *const of_t = &sums[0][t][j];
                if (d[t].count == 3) add_digits(3, of_t, 2 * BAND, &d[t], SCALES(m) + at, to);
                else add_digits(4, of_t, 2 * BAND, &d[t], SCALES(m) + at, to);
            }
    }
    _tile_release();
}

#else

static void begin_tiles(void) {}

static void end_tiles(void) {}

static void multiply_one_by_tiles(const Matrix *m, const InDigits *d, float *y)
{
    (void)m, (void)d, (void)y;
}

static void multiply_band_by_tiles(
    const Matrix *m, int64_t steps, const InDigits *d, int64_t next, float *y, int64_t y_step)
{
    (void)m, (void)steps, (void)d, (void)next, (void)y, (void)y_step;
}

#endif

/* y += W x, by tiles between `begin_tiles` and `end_tiles`. */
static void multiply_digits(const Matrix *m, const InDigits *d, int tiles, float *y)
{
    if (tiles) {
        multiply_one_by_tiles(m, d, y);
        return;
    }
    for (int64_t row = 0; row < m->rows; row += PANEL) multiply_by_vnni(m, row, d, y);
}

/* y[t] += W x[t] of up to 32 x, whose digits lie `next` apart, and those of 32 within `step`: each
   panel of W stays in the first cache for all of them. */
static void multiply_all_digits(
    const Matrix *m, int64_t steps, const InDigits *d, int64_t next, int tiles, float *y, int64_t y_step)
{
    if (tiles) {
        multiply_band_by_tiles(m, steps, d, next, y, y_step);
        return;
    }
    for (int64_t row = 0; row < m->rows; row += PANEL)
        for (int64_t t = 0; t < steps; t++) multiply_by_vnni(m, row, &d[t], y + t * y_step);
}

#else

int64_t NAME(knows_digits)(int64_t columns) { return (void)columns, 0; }

INLINE int64_t whole_tiles(int64_t columns) { return columns; }

INLINE void write_digits(const float *x, int64_t columns, InDigits *d)
{
    (void)x, (void)columns, d->count = 0;
}

INLINE void begin_tiles(void) {}

INLINE void end_tiles(void) {}

INLINE void multiply_digits(const Matrix *m, const InDigits *d, int tiles, float *y)
{
    (void)m, (void)d, (void)tiles, (void)y;
}

INLINE void multiply_all_digits(
    const Matrix *m, int64_t steps, const InDigits *d, int64_t next, int tiles, float *y, int64_t y_step)
{
    (void)m, (void)steps, (void)d, (void)next, (void)tiles, (void)y, (void)y_step;
}

#endif
