/* Products with packed matrices, by one vector or by many time steps at once. Needs pack.h, and
   immintrin.h where VW is 8 or 16. */

#if VW == 16
INLINE vf gather(const float *x, const uint16_t *at)
{
    return (vf)_mm512_i32gather_ps(_mm512_cvtepu16_epi32(*(const __m256i_u *)at), x, 4);
}
INLINE vf picked(const float *x, const uint8_t *lanes)
{
    const __m512i at = _mm512_cvtepu8_epi32(*(const __m128i_u *)lanes);
    return (vf)_mm512_permutex2var_ps((__m512)load(x), at, (__m512)load(x + 16));
}
INLINE vf four_times(const float *x) { return (vf)_mm512_broadcast_f32x4(_mm_loadu_ps(x)); }
#elif VW == 8
INLINE vf gather(const float *x, const uint16_t *at)
{
    return (vf)_mm256_i32gather_ps(x, _mm256_cvtepu16_epi32(*(const __m128i_u *)at), 4);
}
INLINE vf picked(const float *x, const uint8_t *lanes)
{
    typedef uint32_t vu __attribute__((vector_size(32)));
    uint32_t all;
    memcpy(&all, lanes, 4);
    const vu at = ((vu){0} + all) >> (vu){0, 3, 6, 9, 12, 15, 18, 21}; /* of these, 3 bits count */
    return (vf)_mm256_permutevar8x32_ps((__m256)load(x), (__m256i)at);
}
INLINE vf four_times(const float *x) { return (vf)_mm256_broadcast_ps((const __m128 *)x); }
#else
INLINE vf gather(const float *x, const uint16_t *at)
{
    return (vf){x[at[0]], x[at[1]], x[at[2]], x[at[3]]};
}
INLINE vf picked(const float *x, const uint8_t *lanes)
{
    const unsigned at = *lanes;
    return (vf){x[at & 3], x[at >> 2 & 3], x[at >> 4 & 3], x[at >> 6]};
}
INLINE vf four_times(const float *x) { return load(x); }
#endif

INLINE float sum_of(vf x)
{
    float sum = 0.0f;
    for (int i = 0; i < VW; i++) sum += x[i];
    return sum;
}

/* The arrays of a packed matrix; of each group the steps, first to last - 1, and its first row. */
#define VALUES(m) ((const float *)((const char *)(m) + (m)->values))
#define PLACES(m, type) ((const type *)((const char *)(m) + (m)->places))
#define STARTS(m) ((const int32_t *)((const char *)(m) + (m)->starts))
#define HEADS(m) ((const int32_t *)((const char *)(m) + (m)->heads))
#define ORDER(m) ((const int32_t *)((const char *)(m) + (m)->order))
#define EACH_GROUP(m)                                                                              \
    for (int64_t g = 0, first, last, row;                                                          \
         g < (m)->groups && (first = STARTS(m)[g], last = STARTS(m)[g + 1], row = HEADS(m)[g], 1); \
         g++)

/* Weights come from memory that is farther away than the processor's own foresight reaches. */
#define AHEAD 1024
INLINE void fetch(const float *weights) { __builtin_prefetch((const char *)weights + AHEAD); }

/* Sums are taken in four parts: the next product need not wait for the last one. */

static void multiply_dense(const Matrix *m, const float *x, float *y)
{
    const float *panel = VALUES(m);
    for (int64_t row = 0; row < m->rows; row += PANEL, panel += PANEL * m->columns) {
        vf sums[4][2] = {{load(y + row), load(y + row + VW)}};
        int64_t k = 0;
        for (; k + 4 <= m->columns; k += 4)
#pragma GCC unroll 4
            for (int i = 0; i < 4; i++) {
                const vf one = splat(x[k + i]);
                fetch(panel + (k + i) * PANEL);
                sums[i][0] += one * load(panel + (k + i) * PANEL);
                sums[i][1] += one * load(panel + (k + i) * PANEL + VW);
            }
        for (; k < m->columns; k++) {
            sums[0][0] += splat(x[k]) * load(panel + k * PANEL);
            sums[0][1] += splat(x[k]) * load(panel + k * PANEL + VW);
        }
        store(y + row, (sums[0][0] + sums[1][0]) + (sums[2][0] + sums[3][0]));
        store(y + row + VW, (sums[0][1] + sums[1][1]) + (sums[2][1] + sums[3][1]));
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
INLINE void add_rows(const Matrix *m, int64_t lane, vf sums, float *y)
{
    const int32_t *order = ORDER(m) + lane;
    if (!m->order) store(y + lane, load(y + lane) + sums);
    else
        for (int i = 0; i < VW; i++) y[order[i]] += sums[i];
}

static void multiply_sell(const Matrix *m, const float *x, float *y)
{
    EACH_GROUP(m) {
        vf sums[2][16 / VW] = {{{0}}};
        const float *w = VALUES(m) + first * 16;
        const uint16_t *at = PLACES(m, uint16_t) + first * 16;
        int64_t k = last - first;
        for (; k >= 2; k -= 2, w += 32, at += 32)
#pragma GCC unroll 8
            for (int i = 0; i < 32 / VW; i++)
                sums[i * VW / 16][i % (16 / VW)] += gather(x, at + i * VW) * load(w + i * VW);
        if (k)
#pragma GCC unroll 4
            for (int i = 0; i < 16 / VW; i++) sums[0][i] += gather(x, at + i * VW) * load(w + i * VW);
        for (int i = 0; i < 16 / VW; i++)
            add_rows(m, row + i * VW, sums[0][i] + sums[1][i], y);
    }
}

static void multiply_windows(const Matrix *m, const float *x, float *y)
{
    EACH_GROUP(m) {
        vf sums[4] = {{0}};
        const float *w = VALUES(m) + first * VW;
        const uint8_t *four = PLACES(m, uint8_t) + first * (2 + LANES_BYTES);
        for (int64_t k = first; k < last; k += 4, w += 4 * VW, four += 4 * (2 + LANES_BYTES)) {
            uint64_t starts;
            memcpy(&starts, four, 8);
#pragma GCC unroll 4
            for (int i = 0; i < 4; i++)
                sums[i] += picked(x + (starts >> 16 * i & 0xffff), four + 8 + i * LANES_BYTES) *
                           load(w + i * VW);
        }
        add_rows(m, row, (sums[0] + sums[1]) + (sums[2] + sums[3]), y);
    }
}

#define TALL(name, height, width)                                                                  \
    static void name(const Matrix *m, const float *x, float *y)                                    \
    {                                                                                              \
        typedef float vt __attribute__((vector_size(4 * (width)), aligned(4), may_alias));         \
        const float *w = VALUES(m);                                                                \
        const uint16_t *at = PLACES(m, uint16_t);                                                  \
        EACH_GROUP(m) {                                                                            \
            vt sums[4][(height) / (width)] = {{{0}}};                                              \
            int64_t k = first;                                                                     \
            for (; k + 4 <= last; k += 4)                                                          \
                _Pragma("GCC unroll 4") for (int i = 0; i < 4; i++)                                \
                    _Pragma("GCC unroll 4") for (int j = 0; j < (height) / (width); j++)           \
                        sums[i][j] += (x[at[k + i]] - (vt){0}) *                                   \
                                      *(const vt *)(w + (k + i) * (height) + j * (width));         \
            for (; k < last; k++)                                                                  \
                _Pragma("GCC unroll 4") for (int j = 0; j < (height) / (width); j++)               \
                    sums[0][j] += (x[at[k]] - (vt){0}) *                                           \
                                  *(const vt *)(w + k * (height) + j * (width));                   \
            for (int j = 0; j < (height) / (width); j++)                                           \
                *(vt *)(y + row + j * (width)) +=                                                  \
                    (sums[0][j] + sums[1][j]) + (sums[2][j] + sums[3][j]);                         \
        }                                                                                          \
    }
TALL(multiply_16x1, 16, VW)
TALL(multiply_8x1, 8, (VW < 8 ? VW : 8))
#undef TALL

static void multiply_4x4(const Matrix *m, const float *x, float *y)
{
    const uint16_t *at = PLACES(m, uint16_t);
    EACH_GROUP(m) {
        vf sums[2][16 / VW] = {{{0}}};
        const float *w = VALUES(m) + first * 16;
        int64_t k = first;
        for (; k + 2 <= last; k += 2, w += 32)
#pragma GCC unroll 8
            for (int i = 0; i < 32 / VW; i++)
                sums[i * VW / 16][i % (16 / VW)] +=
                    four_times(x + 4 * at[k + i * VW / 16]) * load(w + i * VW);
        if (k < last)
#pragma GCC unroll 4
            for (int i = 0; i < 16 / VW; i++)
                sums[0][i] += four_times(x + 4 * at[k]) * load(w + i * VW);
        for (int i = 0; i < 16 / VW; i++) {
            const vf all = sums[0][i] + sums[1][i];
            for (int j = 0; j < VW / 4; j++)
                y[row + i * VW / 4 + j] +=
                    (all[4 * j] + all[4 * j + 1]) + (all[4 * j + 2] + all[4 * j + 3]);
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
    switch (m->format) {
        case DENSE: multiply_dense(m, x, y); break;
        case ROWS: multiply_rows(m, x, y); break;
        case SELL: multiply_sell(m, x, y); break;
        case WINDOWS: multiply_windows(m, x, y); break;
        case B16X1: multiply_16x1(m, x, y); break;
        case B8X1: multiply_8x1(m, x, y); break;
        default: multiply_4x4(m, x, y); break;
    }
}

/* The same for matrices of one format, as dense ones would have it; x_step is 0 where all read the
   same, else they read one after the other. */
static void multiply_each(
    int64_t count, const Matrix *const *m, const float *x, int64_t x_step, float *y, int64_t y_step)
{
    float nan = 0.0f;
    for (int64_t i = 0; i < count; i++, x += x_step, y += y_step) {
        multiply_packed(m[i], x, y);
        if (m[i]->format == DENSE) continue;
        if (i == 0 || x_step) nan = unrest(x, m[i]->columns);
        if (nan != 0.0f)
            for (int64_t row = 0; row < m[i]->rows; row++) y[row] += nan;
    }
}

void NAME(multiply_matrix)(const Matrix *m, const float *x, float *y)
{
    multiply_each(1, &m, x, 0, y, 0);
}

/* Many vectors at once: lanes of time. */

#define LANES 32 /* time steps that are multiplied together */

/* y[lane * step + row] += W x, where x is [columns, LANES], for some lanes. */
INLINE void along_vectors(
    const int vectors, const Matrix *m, const float *x, int64_t lanes, float *y, int64_t step)
{
    const float *w = VALUES(m);
    const uint16_t *at = PLACES(m, uint16_t);
    vf nan[LANES / VW] = {{0}};
    for (int64_t k = 0; k < m->columns; k++)
#pragma GCC unroll 8
        for (int v = 0; v < vectors; v++) nan[v] += splat(0.0f) * load(x + k * LANES + v * VW);
    EACH_GROUP(m) {
        vf sums[LANES / VW];
#pragma GCC unroll 8
        for (int v = 0; v < vectors; v++) sums[v] = nan[v];
        for (int64_t k = first; k < last; k++) {
            const vf one = splat(w[k]);
#pragma GCC unroll 8
            for (int v = 0; v < vectors; v++)
                sums[v] += one * load(x + (int64_t)at[k] * LANES + v * VW);
        }
        float sum[LANES];
#pragma GCC unroll 8
        for (int v = 0; v < vectors; v++) store(sum + v * VW, sums[v]);
        for (int64_t lane = 0; lane < lanes; lane++) y[lane * step + row] += sum[lane];
    }
}

static void multiply_along(const Matrix *m, const float *x, int64_t lanes, float *y, int64_t step)
{
#define ALONG(count)                                                                               \
    case count: along_vectors(count, m, x, lanes, y, step); break;
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
