/* Products with packed matrices, by one vector or by many time steps at once. Needs pack.h, and
   immintrin.h where VW is 8 or 16. */

#if VW == 16
INLINE vf gather(const float *x, const uint16_t *at)
{
    return (vf)_mm512_i32gather_ps(_mm512_cvtepu16_epi32(*(const __m256i_u *)at), x, 4);
}
INLINE vf picked(vf lanes, vf low, vf high)
{
    return (vf)_mm512_permutex2var_ps((__m512)low, (__m512i)lanes, (__m512)high);
}
INLINE vf four_times(const float *x) { return (vf)_mm512_broadcast_f32x4(_mm_loadu_ps(x)); }
/* In a register, so that it is not loaded again for its second use. */
INLINE vf kept(vf x)
{
    __asm__("" : "+v"(x));
    return x;
}
INLINE vi from_bytes(const void *at) { return (vi)_mm512_cvtepi8_epi32(*(const __m128i_u *)at); }
INLINE vi from_words(const void *at) { return (vi)_mm512_cvtepi16_epi32(*(const __m256i_u *)at); }
INLINE vf from_halves(const void *at)
{
    return (vf)_mm512_slli_epi32(_mm512_cvtepu16_epi32(*(const __m256i_u *)at), 16);
}
#elif VW == 8
/* By loads: on Zen 3 the instruction for it takes twice as long, or longer. */
INLINE vf gather(const float *x, const uint16_t *at)
{
    uint64_t a, b;
    memcpy(&a, at, sizeof a), memcpy(&b, at + 4, sizeof b);
    return (vf){x[(uint16_t)a], x[(uint16_t)(a >> 16)], x[(uint16_t)(a >> 32)], x[a >> 48],
                x[(uint16_t)b], x[(uint16_t)(b >> 16)], x[(uint16_t)(b >> 32)], x[b >> 48]};
}
INLINE vf picked(vf lanes, vf low, vf high)
{
    (void)high;
    return (vf)_mm256_permutevar8x32_ps((__m256)low, (__m256i)lanes);
}
INLINE vf four_times(const float *x) { return (vf)_mm256_broadcast_ps((const __m128 *)x); }
INLINE vf kept(vf x)
{
    __asm__("" : "+x"(x));
    return x;
}
INLINE vi from_bytes(const void *at)
{
    return (vi)_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)at));
}
INLINE vi from_words(const void *at) { return (vi)_mm256_cvtepi16_epi32(*(const __m128i_u *)at); }
INLINE vf from_halves(const void *at)
{
    return (vf)_mm256_slli_epi32(_mm256_cvtepu16_epi32(*(const __m128i_u *)at), 16);
}
#else
INLINE vf gather(const float *x, const uint16_t *at)
{
    return (vf){x[at[0]], x[at[1]], x[at[2]], x[at[3]]};
}
INLINE vf picked(vf lanes, vf low, vf high)
{
    const vi at = (vi)lanes & 3;
    (void)high;
    return (vf){low[at[0]], low[at[1]], low[at[2]], low[at[3]]};
}
INLINE vf four_times(const float *x) { return load(x); }
INLINE vf kept(vf x) { return x; }
INLINE vi from_bytes(const void *at)
{
    int8_t b[4];
    memcpy(b, at, sizeof b);
    return (vi){b[0], b[1], b[2], b[3]};
}
INLINE vi from_words(const void *at)
{
    int16_t w[4];
    memcpy(w, at, sizeof w);
    return (vi){w[0], w[1], w[2], w[3]};
}
INLINE vf from_halves(const void *at)
{
    typedef uint32_t vu __attribute__((vector_size(16)));
    uint16_t h[4];
    memcpy(h, at, sizeof h);
    return (vf)((vu){h[0], h[1], h[2], h[3]} << 16);
}
#endif

INLINE float sum_of(vf x)
{
    float sum = 0.0f;
    for (int i = 0; i < VW; i++) sum += x[i];
    return sum;
}

/* VW of the values, from some place on; those of 8 bits still want their scales. */
INLINE vf value(const int type, const Matrix *m, int64_t at)
{
    const char *const values = (const char *)m + m->values;
    if (type == FLOAT32) return load((const float *)values + at);
    if (type == INT8) return __builtin_convertvector(from_bytes(values + at), vf);
    return from_halves(values + 2 * at);
}

INLINE vf scaled(const int type, const Matrix *m, int64_t lane, vf sums)
{
    return type == INT8 ? load(SCALES(m) + lane) * sums : sums;
}

INLINE void fetch(const int type, const Matrix *m, int64_t at)
{
    __builtin_prefetch((const char *)VALUES(m) + at * bytes_of(type) + AHEAD);
}

/* Sums are taken in four parts: the next product need not wait for the last one. */

INLINE void multiply_dense(const int type, const Matrix *m, const float *x, float *y)
{
    int64_t at = 0;
    for (int64_t row = 0; row < m->rows; row += PANEL) {
        vf sums[4][2] = {{{0}}};
        int64_t k = 0;
        for (; k + 4 <= m->columns; k += 4, at += 4 * PANEL)
#pragma GCC unroll 4
            for (int i = 0; i < 4; i++) {
                const vf one = splat(x[k + i]);
                if (i % (4 / bytes_of(type)) == 0) fetch(type, m, at + i * PANEL);
                sums[i][0] += one * value(type, m, at + i * PANEL);
                sums[i][1] += one * value(type, m, at + i * PANEL + VW);
            }
        for (; k < m->columns; k++, at += PANEL) {
            sums[0][0] += splat(x[k]) * value(type, m, at);
            sums[0][1] += splat(x[k]) * value(type, m, at + VW);
        }
#pragma GCC unroll 2
        for (int i = 0; i < 2; i++) {
            const vf sum = (sums[0][i] + sums[1][i]) + (sums[2][i] + sums[3][i]);
            store(y + row + i * VW, load(y + row + i * VW) + scaled(type, m, row + i * VW, sum));
        }
    }
}

static void multiply_rows(const Matrix *m, const float *x, float *y)
{
    const float *w = VALUES(m);
    const uint16_t *at = PLACES(m, uint16_t);
    EACH_GROUP(m) {
        float sums[4] = {y[row]};
        int64_t k = first;
        for (; k + 4 <= last; k += 4)
            for (int i = 0; i < 4; i++) sums[i] += w[k + i] * x[at[k + i]];
        for (; k < last; k++) sums[0] += w[k] * x[at[k]];
        y[row] = (sums[0] + sums[1]) + (sums[2] + sums[3]);
    }
}

/* y += sums of VW rows; those that the matrix lacks are zero, and come to y's padding. */
INLINE void add_rows(const int type, const Matrix *m, int64_t lane, vf sums, float *y)
{
    const int32_t *order = ORDER(m) + lane;
    sums = scaled(type, m, lane, sums);
    if (!m->order) store(y + lane, load(y + lane) + sums);
    else
        for (int i = 0; i < VW; i++) y[order[i]] += sums[i];
}

INLINE void multiply_sell(const int type, const Matrix *m, const float *x, float *y)
{
    EACH_GROUP(m) {
        vf sums[2][16 / VW] = {{{0}}};
        const uint16_t *at = PLACES(m, uint16_t);
        int64_t k = first * 16;
        for (; k + 32 <= last * 16; k += 32)
#pragma GCC unroll 8
            for (int i = 0; i < 32 / VW; i++)
                sums[i * VW / 16][i % (16 / VW)] +=
                    gather(x, at + k + i * VW) * value(type, m, k + i * VW);
        if (k < last * 16)
#pragma GCC unroll 4
            for (int i = 0; i < 16 / VW; i++)
                sums[0][i] += gather(x, at + k + i * VW) * value(type, m, k + i * VW);
        for (int i = 0; i < 16 / VW; i++)
            add_rows(type, m, row + i * VW, sums[0][i] + sums[1][i], y);
    }
}

/* What VW rows, whose values start at `at`, take from the window of x: those of 8 bits still want
   their scales. */
INLINE vf windowed(const int type, const Matrix *m, int64_t at, vf low, vf high)
{
    if (type == FLOAT32) {
        const vf w = kept(load(VALUES(m) + at));
        return picked(w, low, high) * w;
    }
    const vi both = from_words((const char *)m + m->values + 2 * at);
    return picked((vf)both, low, high) * __builtin_convertvector(both & ~(int32_t)0xff, vf);
}

/* Of groups of `tall` vectors of rows. */
INLINE void multiply_windows(const int type, const int tall, const Matrix *m, const float *x, float *y)
{
    const int at_once = steps_at_once(tall);
    const uint16_t *starts = PLACES(m, uint16_t);
    EACH_GROUP(m) {
        vf sums[4][4] = {{{0}}};
        for (int64_t k = first; k < last; k += at_once)
#pragma GCC unroll 4
            for (int i = 0; i < at_once; i++) {
                const float *const window = x + starts[k + i];
                const vf low = load(window), high = load(window + WINDOW - VW);
#pragma GCC unroll 4
                for (int j = 0; j < tall; j++)
                    sums[i][j] += windowed(type, m, ((k + i) * tall + j) * VW, low, high);
            }
#pragma GCC unroll 4
        for (int j = 0; j < tall; j++)
            if (row + j * VW < m->rows)
                add_rows(type, m, row + j * VW,
                         (sums[0][j] + sums[1][j]) + (sums[2][j] + sums[3][j]), y);
    }
}

INLINE void multiply_16x1(const int type, const Matrix *m, const float *x, float *y)
{
    const uint16_t *at = PLACES(m, uint16_t);
    EACH_GROUP(m) {
        vf sums[4][16 / VW] = {{{0}}};
        int64_t k = first;
        for (; k + 4 <= last; k += 4)
#pragma GCC unroll 4
            for (int i = 0; i < 4; i++)
#pragma GCC unroll 4
                for (int j = 0; j < 16 / VW; j++)
                    sums[i][j] += splat(x[at[k + i]]) * value(type, m, (k + i) * 16 + j * VW);
        for (; k < last; k++)
#pragma GCC unroll 4
            for (int j = 0; j < 16 / VW; j++)
                sums[0][j] += splat(x[at[k]]) * value(type, m, k * 16 + j * VW);
        for (int j = 0; j < 16 / VW; j++)
            add_rows(type, m, row + j * VW, (sums[0][j] + sums[1][j]) + (sums[2][j] + sums[3][j]), y);
    }
}

/* The same in vectors of 8 at the most: half of one where there are longer ones. */
static void multiply_8x1(const Matrix *m, const float *x, float *y)
{
    enum { WIDE = VW < 8 ? VW : 8 };
    typedef float vt __attribute__((vector_size(4 * WIDE), aligned(4), may_alias));
    const float *w = VALUES(m);
    const uint16_t *at = PLACES(m, uint16_t);
    EACH_GROUP(m) {
        vt sums[4][8 / WIDE] = {{{0}}};
        int64_t k = first;
        for (; k + 4 <= last; k += 4)
#pragma GCC unroll 4
            for (int i = 0; i < 4; i++)
#pragma GCC unroll 4
                for (int j = 0; j < 8 / WIDE; j++)
                    sums[i][j] += (x[at[k + i]] - (vt){0}) *
                                  *(const vt *)(w + (k + i) * 8 + j * WIDE);
        for (; k < last; k++)
#pragma GCC unroll 4
            for (int j = 0; j < 8 / WIDE; j++)
                sums[0][j] += (x[at[k]] - (vt){0}) * *(const vt *)(w + k * 8 + j * WIDE);
        for (int j = 0; j < 8 / WIDE; j++)
            *(vt *)(y + row + j * WIDE) += (sums[0][j] + sums[1][j]) + (sums[2][j] + sums[3][j]);
    }
}

INLINE void multiply_4x4(const int type, const Matrix *m, const float *x, float *y)
{
    const uint16_t *at = PLACES(m, uint16_t);
    EACH_GROUP(m) {
        vf sums[2][16 / VW] = {{{0}}};
        int64_t k = first;
        for (; k + 2 <= last; k += 2)
#pragma GCC unroll 8
            for (int i = 0; i < 32 / VW; i++)
                sums[i * VW / 16][i % (16 / VW)] +=
                    four_times(x + 4 * at[k + i * VW / 16]) * value(type, m, k * 16 + i * VW);
        if (k < last)
#pragma GCC unroll 4
            for (int i = 0; i < 16 / VW; i++)
                sums[0][i] += four_times(x + 4 * at[k]) * value(type, m, k * 16 + i * VW);
        for (int i = 0; i < 16 / VW; i++) {
            const vf all = sums[0][i] + sums[1][i];
            for (int j = 0; j < VW / 4; j++) {
                const int64_t at_row = row + i * VW / 4 + j;
                const float sum = (all[4 * j] + all[4 * j + 1]) + (all[4 * j + 2] + all[4 * j + 3]);
                y[at_row] += type == INT8 ? SCALES(m)[at_row] * sum : sum;
            }
        }
    }
}

/* 0, or NaN where an entry of x is no finite number: what a zero weight makes of it in the dense
   product, of every row, and so here. */
static float unrest(const float *x, int64_t columns)
{
    vf sums[4] = {{0}};
    int64_t k = 0;
    for (; k + 4 * VW <= columns; k += 4 * VW)
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++) sums[i] += splat(0.0f) * load(x + k + i * VW);
    for (; k < columns; k += VW) sums[0] += splat(0.0f) * load(x + k);
    return sum_of((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

/* y += W x over the non-zeros. */
static void multiply_packed(const Matrix *m, const float *x, float *y)
{
#define TYPED(name)                                                                                \
    switch (m->type) {                                                                             \
        case FLOAT32: name(FLOAT32, m, x, y); break;                                               \
        case BFLOAT16: name(BFLOAT16, m, x, y); break;                                             \
        default: name(INT8, m, x, y); break;                                                       \
    }                                                                                              \
    break
#define TALL(vectors)                                                                              \
    if (m->type == INT8) multiply_windows(INT8, vectors, m, x, y);                                 \
    else multiply_windows(FLOAT32, vectors, m, x, y);                                              \
    break
    switch (m->format) {
        case DENSE:
            if (m->type == BFLOAT16) multiply_pairs(m, x, y);
            else if (together(m) == 4) multiply_fours(m, x, y);
            else if (m->type == INT8) multiply_dense(INT8, m, x, y);
            else multiply_dense(FLOAT32, m, x, y);
            break;
        case ROWS: multiply_rows(m, x, y); break;
        case SELL: TYPED(multiply_sell);
        case WINDOWS: TALL(1);
        case WINDOWS2: TALL(2);
        case WINDOWS4: TALL(4);
        case B16X1: TYPED(multiply_16x1);
        case B8X1: multiply_8x1(m, x, y); break;
        default: TYPED(multiply_4x4);
    }
#undef TYPED
#undef TALL
}

/* The same for matrices of one size, format and type, as dense ones would have it (but for infinities:
   see `unrest`); x_step is 0 where all read the same, else they read one after the other. Tiles are for
   matrices that are used again before the second cache loses them. */
static void multiply_each(
    int64_t count, const Matrix *const *m, const float *x, int64_t x_step, int again, float *y,
    int64_t y_step)
{
    const int tiles = again && m[0]->tiles;
    float nan = 0.0f;
    int8_t bytes[MOST_DIGITS * MOST_IN_DIGITS];
    InDigits digits = {.count = 0, .lowest = bytes, .step = MOST_IN_DIGITS};
    if (tiles) begin_tiles();
    for (int64_t i = 0; i < count; i++, x += x_step, y += y_step) {
        const int another = i == 0 || x_step;
        if (together(m[i]) == 4 && another) write_digits(x, m[i]->columns, &digits);
        if (digits.count) {
            multiply_digits(m[i], &digits, tiles, y);
            continue;
        }
        multiply_packed(m[i], x, y);
        if (m[i]->format == DENSE) continue;
        if (another) nan = unrest(x, m[i]->columns);
        if (nan != 0.0f)
            for (int64_t row = 0; row < m[i]->rows; row++) y[row] += nan;
    }
    if (tiles) end_tiles();
}

void NAME(multiply_matrix)(const Matrix *m, const float *x, float *y)
{
    multiply_each(1, &m, x, 0, 1, y, 0);
}

/* Many vectors at once: lanes of time. */

#define LANES 32 /* time steps that are multiplied together */

/* nan[lane]: what `unrest` finds in x [columns, LANES]. */
static void unrest_along(const float *x, int64_t columns, float *nan)
{
    vf sums[LANES / VW] = {{0}};
    for (int64_t k = 0; k < columns; k++)
#pragma GCC unroll 8
        for (int v = 0; v < LANES / VW; v++) sums[v] += splat(0.0f) * load(x + k * LANES + v * VW);
#pragma GCC unroll 8
    for (int v = 0; v < LANES / VW; v++) store(nan + v * VW, sums[v]);
}

INLINE void add_lanes(const int vectors, float w, const float *x, vf *sums)
{
#pragma GCC unroll 8
    for (int v = 0; v < vectors; v++) sums[v] += splat(w) * load(x + v * VW);
}

/* y [rows, LANES] = W x, where x is [columns, LANES], for some vectors of lanes. */
INLINE void along_vectors(const int vectors, const Matrix *m, const float *x, const float *nan, float *y)
{
    enum { MOST = LANES / VW, SUMS = 8 };
    const int parts = SUMS / vectors > 4 ? 4 : SUMS / vectors;
    const float *w = VALUES(m);
    const uint16_t *at = PLACES(m, uint16_t);
    EACH_GROUP(m) {
        vf sums[4][MOST] = {{{0}}};
#pragma GCC unroll 8
        for (int v = 0; v < vectors; v++) sums[0][v] = load(nan + v * VW);
        int64_t k = first;
        for (; k + parts <= last; k += parts)
#pragma GCC unroll 4
            for (int p = 0; p < parts; p++) add_lanes(vectors, w[k + p], x + at[k + p] * LANES, sums[p]);
        for (; k < last; k++) add_lanes(vectors, w[k], x + at[k] * LANES, sums[0]);
#pragma GCC unroll 8
        for (int v = 0; v < vectors; v++)
            store(y + row * LANES + v * VW, (sums[0][v] + sums[1][v]) + (sums[2][v] + sums[3][v]));
    }
}

static void multiply_along(const Matrix *m, const float *x, const float *nan, int64_t lanes, float *y)
{
#define ALONG(count)                                                                               \
    case count: along_vectors(count, m, x, nan, y); break;
    switch ((lanes + VW - 1) / VW) {
        ALONG(1) ALONG(2)
#if VW <= 8
        ALONG(3) ALONG(4)
#endif
#if VW <= 4
        ALONG(5) ALONG(6) ALONG(7) ALONG(8)
#endif
    }
#undef ALONG
}
