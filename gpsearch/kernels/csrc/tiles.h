/* Products by tiles (AMX): 16 x 16 sums of products of bfloat16 at a time.

   A float is the sum of three bfloat16 ("terms"), which have 8 of its 24 bits each. Of the nine products
   of two floats' terms the three smallest lie below a float's own rounding and are left out: sums are
   as exact as with floats, at 6 / 16 of the cost. With two terms, which have 17 bits, three products are
   left. The processor takes denormals for zeros: numbers and results below 1e-31 lose digits. An
   infinity is no sum of terms, and those of numbers beyond LARGEST could overflow where the float's
   product does not, or to NaN: then the caller is told, or floats are multiplied.

   The left factor is packed in tiles of 16 rows by 32 places in the sum, the right one in tiles of 16
   pairs of places by 16 columns, since the processor multiplies two places at once. Rows and columns
   come in bands of two tiles: a product of bands keeps four tiles of sums, each of which is ready again
   when its turn comes. Needs product.h and, where WITH_TILES is defined, immintrin.h. */

#if defined(WITH_TILES)

enum { KNOWS_TILES = 1 };

enum {
    SIDE = 16,                /* rows or columns of a tile, */
    ALONG = 32,               /* and places in the sum */
    TILE_SIZE = SIDE * ALONG, /* numbers */
    BAND = 2 * SIDE,          /* rows or columns of a band */
    TERM = 2 * TILE_SIZE,     /* numbers in a band's tiles of one term */
    MOST_TERMS = 3,
    LARGEST = 0x5b000000,     /* the bits of 2^55 */
    /* What `multiply_tiles` packs at a time and its sums fit the second cache. */
    TILED_ROWS = 8 * BAND,
    TILED_COLUMNS = 16 * BAND,
    TILED_PLACES = 4 * ALONG,
};

typedef struct {
    uint8_t palette, start, none[14];
    uint16_t bytes[16]; /* of a row of each of eight tiles */
    uint8_t rows[16];
} Tiles;

static const Tiles ALL_WHOLE = {
    1, 0, {0}, {64, 64, 64, 64, 64, 64, 64, 64}, {16, 16, 16, 16, 16, 16, 16, 16}};

/* Gcc does not know what a tile is loaded from: it is to be written before this. */
#define LOADED_BY_TILES __asm__ volatile("" ::: "memory")

#define TILED WITH_TILES static inline __attribute__((always_inline))

/* Writes the terms of 32 numbers: in their order, or one of `low` and one of `high` in turn. Returns
   which have none. */
TILED __mmask16 write_terms(const int in_turn, int terms, __m512 low, __m512 high, uint16_t *to)
{
    const __m512i turns = _mm512_set_epi16(
        31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21, 5, 20, 4,
        19, 3, 18, 2, 17, 1, 16, 0);
    const __m512i size = _mm512_max_epi32((__m512i)_mm512_abs_ps(low), (__m512i)_mm512_abs_ps(high));
#pragma GCC unroll 3
    for (int term = 0; term < MOST_TERMS; term++) {
        const __m512i both = (__m512i)_mm512_cvtne2ps_pbh(high, low);
        _mm512_storeu_si512(to + term * TERM, in_turn ? _mm512_permutexvar_epi16(turns, both) : both);
        if (term + 1 == terms) break;
        const __m256i first = _mm512_castsi512_si256(both), second = _mm512_extracti64x4_epi64(both, 1);
        low -= (__m512)_mm512_slli_epi32(_mm512_cvtepu16_epi32(first), 16);
        high -= (__m512)_mm512_slli_epi32(_mm512_cvtepu16_epi32(second), 16);
    }
    /* As whole numbers, since NaN is more than any float then. */
    return _mm512_cmpgt_epi32_mask(size, _mm512_set1_epi32(LARGEST));
}

/* Turns a tile of pairs by their lanes into one of lanes by their pairs, or the other way round. */
WITH_TILES static void turn_pairs(uint16_t *tile)
{
    __m512i a[SIDE], b[SIDE];
#pragma GCC unroll 16
    for (int i = 0; i < SIDE; i++) a[i] = _mm512_loadu_si512(tile + i * ALONG);
#pragma GCC unroll 8
    for (int i = 0; i < SIDE; i += 2) {
        b[i] = _mm512_unpacklo_epi32(a[i], a[i + 1]);
        b[i + 1] = _mm512_unpackhi_epi32(a[i], a[i + 1]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < SIDE; i += 4)
#pragma GCC unroll 2
        for (int j = 0; j < 2; j++) {
            a[i + 2 * j] = _mm512_unpacklo_epi64(b[i + j], b[i + j + 2]);
            a[i + 2 * j + 1] = _mm512_unpackhi_epi64(b[i + j], b[i + j + 2]);
        }
#pragma GCC unroll 2
    for (int half = 0; half < SIDE; half += 8)
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++) {
            b[half + i] = _mm512_shuffle_i32x4(a[half + i], a[half + i + 4], 0x88);
            b[half + i + 4] = _mm512_shuffle_i32x4(a[half + i], a[half + i + 4], 0xdd);
        }
#pragma GCC unroll 8
    for (int i = 0; i < 8; i++) {
        _mm512_storeu_si512(tile + i * ALONG, _mm512_shuffle_i32x4(b[i], b[i + 8], 0x88));
        _mm512_storeu_si512(tile + (i + 8) * ALONG, _mm512_shuffle_i32x4(b[i], b[i + 8], 0xdd));
    }
}

TILED __mmask16 first_of(int64_t count)
{
    return (__mmask16)(count >= SIDE ? 0xffff : (1u << (count > 0 ? count : 0)) - 1);
}

/* Packs a tile of each term: lanes (rows of the left factor, columns of the right one) by places, or
   pairs of places by lanes. One of the steps is 1. Returns whether all numbers had terms. */
WITH_TILES static int pack_tiles(
    int pairs, int terms, const float *from, int64_t lane_step, int64_t place_step, int64_t lanes,
    int64_t places, uint16_t *to)
{
    const int along = place_step == 1;
    __mmask16 bad = 0;
    if (along) {
        const __mmask16 low = first_of(places), high = first_of(places - SIDE);
        for (int i = 0; i < SIDE; i++) {
            const float *at = from + (i < lanes ? i * lane_step : 0);
            bad |= write_terms(
                0, terms, _mm512_maskz_loadu_ps(i < lanes ? low : 0, at),
                _mm512_maskz_loadu_ps(i < lanes ? high : 0, at + SIDE), to + i * ALONG);
        }
    } else {
        const __mmask16 there = first_of(lanes);
        for (int i = 0; i < SIDE; i++) {
            const float *at = from + 2 * i * place_step;
            bad |= write_terms(
                1, terms, _mm512_maskz_loadu_ps(2 * i < places ? there : 0, at),
                _mm512_maskz_loadu_ps(2 * i + 1 < places ? there : 0, at + place_step), to + i * ALONG);
        }
    }
    if (along == pairs)
        for (int term = 0; term < terms; term++) turn_pairs(to + term * TERM);
    return bad == 0;
}

/* Packs the bands of one factor, each for all places in turn, in the order of the memory. */
WITH_TILES static int pack_bands(
    int pairs, int terms, const float *from, int64_t lane_step, int64_t place_step, int64_t lanes,
    int64_t places, uint16_t *to)
{
    const int64_t steps = (places + ALONG - 1) / ALONG, bands = (lanes + BAND - 1) / BAND;
    int good = 1;
    for (int64_t i = 0; i < steps * bands; i++) {
        const int64_t step = place_step == 1 ? i % steps : i / bands;
        const int64_t band = place_step == 1 ? i / steps : i % bands;
        for (int half = 0; half < 2; half++) {
            const int64_t lane = band * BAND + half * SIDE, place = step * ALONG;
            good &= pack_tiles(
                pairs, terms, from + (lane < lanes ? lane * lane_step : 0) + place * place_step,
                lane_step, place_step, lanes - lane, places - place,
                to + (band * steps + step) * terms * TERM + half * TILE_SIZE);
        }
    }
    return good;
}

/* to[32, 32] = sums[32, 32] (or 0) + the products of two bands over so many steps of 32 places. */
WITH_TILES static void multiply_bands(
    int terms, const uint16_t *a, const uint16_t *b, int64_t steps, const float *sums, float *to,
    int64_t to_step)
{
    const int64_t own = BAND * sizeof(float), to_bytes = to_step * (int64_t)sizeof(float);
    LOADED_BY_TILES;
    if (sums) {
        _tile_loadd(0, sums, own);
        _tile_loadd(1, sums + SIDE, own);
        _tile_loadd(2, sums + SIDE * BAND, own);
        _tile_loadd(3, sums + SIDE * BAND + SIDE, own);
    } else {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
    }
#define LEFT(term)                                                                                 \
    _tile_loadd(4, a + term * TERM, 64);                                                           \
    _tile_loadd(5, a + term * TERM + TILE_SIZE, 64)
#define RIGHT(term)                                                                                \
    _tile_loadd(6, b + term * TERM, 64);                                                           \
    _tile_loadd(7, b + term * TERM + TILE_SIZE, 64)
#define MULTIPLY                                                                                   \
    _tile_dpbf16ps(0, 4, 6);                                                                       \
    _tile_dpbf16ps(1, 4, 7);                                                                       \
    _tile_dpbf16ps(2, 5, 6);                                                                       \
    _tile_dpbf16ps(3, 5, 7)
    /* From one product of terms to the next only one side changes, where that can be. */
    for (int64_t step = 0; step < steps; step++, a += terms * TERM, b += terms * TERM) {
        if (terms == MOST_TERMS) {
            LEFT(2); RIGHT(0); MULTIPLY;
            LEFT(1); MULTIPLY;
            RIGHT(1); MULTIPLY;
            LEFT(0); MULTIPLY;
            RIGHT(2); MULTIPLY;
        } else {
            LEFT(1); RIGHT(0); MULTIPLY;
            LEFT(0); RIGHT(1); MULTIPLY;
        }
        RIGHT(0); MULTIPLY;
    }
#undef LEFT
#undef RIGHT
#undef MULTIPLY
    _tile_stored(0, to, to_bytes);
    _tile_stored(1, to + SIDE, to_bytes);
    _tile_stored(2, to + SIDE * to_step, to_bytes);
    _tile_stored(3, to + SIDE * to_step + SIDE, to_bytes);
}

/* sums[32, 32] = what a product adds to: what stands in `out` (or NULL), a bias (or NULL), or both. */
static void begin_sums(
    const float *bias, int64_t rows, int64_t columns, const float *out, int64_t out_step, float *sums)
{
#define BODY(at, count)                                                                            \
    do {                                                                                           \
        vf sum = out ? LOAD(out + row * out_step + at, count) : splat(0.0f);                       \
        if (bias) sum += LOAD(bias + at, count);                                                   \
        store(sums + row * BAND + at, sum);                                                        \
    } while (0)
    for (int64_t row = 0; row < rows; row++) EACH_VECTOR(columns, BODY);
#undef BODY
}

static void end_sums(const float *sums, int64_t rows, int64_t columns, float *out, int64_t out_step)
{
#define BODY(at, count) STORE(out + row * out_step + at, load(sums + row * BAND + at), count)
    for (int64_t row = 0; row < rows; row++) EACH_VECTOR(columns, BODY);
#undef BODY
}

/* Floats that `multiply_tiles` needs room for. */
int64_t NAME(tiles_room)(void)
{
    return (TILED_ROWS + TILED_COLUMNS) * TILED_PLACES * MOST_TERMS / 2 + TILED_ROWS * TILED_COLUMNS;
}

static int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

/* out[rows, columns] = a[rows, inner] x b[inner, columns], where one of a factor's two steps is 1. The
   room begins at a line of the cache. Returns 0 where a number has no terms: out is not to be used. */
WITH_TILES int64_t NAME(multiply_tiles)(
    const float *a, int64_t a_row, int64_t a_place, const float *b, int64_t b_place, int64_t b_column,
    int64_t rows, int64_t columns, int64_t inner, int64_t terms, float *out, int64_t out_step, float *room)
{
    uint16_t *const left = (uint16_t *)room, *const right = left + TILED_ROWS * TILED_PLACES * terms;
    float *const sums = (float *)(right + TILED_COLUMNS * TILED_PLACES * terms);
    int good = 1;
    _tile_loadconfig(&ALL_WHOLE);
    for (int64_t c0 = 0; c0 < columns; c0 += TILED_COLUMNS)
        for (int64_t r0 = 0; r0 < rows; r0 += TILED_ROWS)
            for (int64_t k = 0; k < inner && good; k += TILED_PLACES) {
                const int64_t width = least(columns - c0, TILED_COLUMNS);
                const int64_t height = least(rows - r0, TILED_ROWS);
                const int64_t deep = least(inner - k, TILED_PLACES), steps = (deep + ALONG - 1) / ALONG;
                const int last = k + deep == inner;
                good &= pack_bands(
                    0, terms, a + r0 * a_row + k * a_place, a_row, a_place, height, deep, left);
                good &= pack_bands(
                    1, terms, b + k * b_place + c0 * b_column, b_column, b_place, width, deep, right);
                float *sum = sums;
                for (int64_t c = 0; c < width; c += BAND)
                    for (int64_t r = 0; r < height; r += BAND, sum += BAND * BAND) {
                        const uint16_t *const of_a = left + r / BAND * steps * terms * TERM;
                        const uint16_t *const of_b = right + c / BAND * steps * terms * TERM;
                        float *const to = out + (r0 + r) * out_step + c0 + c;
                        const int64_t high = least(height - r, BAND), wide = least(width - c, BAND);
                        const int straight = last && high == BAND && wide == BAND;
                        multiply_bands(
                            terms, of_a, of_b, steps, k ? sum : NULL, straight ? to : sum,
                            straight ? out_step : BAND);
                        if (last && !straight) end_sums(sum, high, wide, to, out_step);
                    }
            }
    _tile_release();
    return good;
}

/* Floats that weights take which are packed for `apply`. */
static int64_t tiles_size(int64_t columns, int64_t inner, int64_t terms)
{
    return (columns + BAND - 1) / BAND * ((inner + ALONG - 1) / ALONG) * terms * TERM / 2;
}

int64_t NAME(tiles_size)(int64_t columns, int64_t inner, int64_t terms)
{
    return tiles_size(columns, inner, terms);
}

/* As `pack` does; returns 0 where a weight has no terms. */
WITH_TILES int64_t NAME(pack_tiles)(
    const float *w, int64_t column_step, int64_t place_step, int64_t columns, int64_t inner, int64_t terms,
    float *packed)
{
    return pack_bands(1, terms, w, column_step, place_step, columns, inner, (uint16_t *)packed);
}

/* Tells whether all these numbers have terms. */
static int have_terms(int64_t rows, const float *a, int64_t a_step, int64_t width)
{
    vi good = {0};
    good = ~good;
#define BODY(at, count)                                                                            \
    do {                                                                                           \
        const vf x = LOAD(a + row * a_step + at, count);                                           \
        good &= (x <= splat(0x1p55f)) & (x >= splat(-0x1p55f));                                    \
    } while (0)
    for (int64_t row = 0; row < rows; row++) EACH_VECTOR(width, BODY);
#undef BODY
    int all = -1;
    for (int i = 0; i < VW; i++) all &= good[i];
    return all;
}

enum { FEW_BANDS = 2, FEW_STEPS = 16 }; /* packed at a time */

/* Bytes of the room for `apply`, aligned to a line of the cache. */
static int64_t apply_room(void) { return FEW_BANDS * FEW_STEPS * MOST_TERMS * TERM * sizeof(uint16_t); }

/* What `multiply` does, of up to FEW_BANDS bands of rows. */
WITH_TILES static void multiply_by_tiles(
    const Product *by, int terms, const uint16_t *tiles, int64_t rows, const float *a, int64_t a_step,
    float *out, int64_t out_step, uint16_t *packed)
{
    float sums[BAND * BAND] __attribute__((aligned(64)));
    const int64_t all_steps = (by->inner + ALONG - 1) / ALONG;
    _tile_loadconfig(&ALL_WHOLE);
    for (int64_t first = 0; first < all_steps; first += FEW_STEPS) {
        const int64_t steps = least(all_steps - first, FEW_STEPS), k = first * ALONG;
        const int add = first || by->add;
        pack_bands(0, terms, a + k, a_step, 1, rows, least(by->inner - k, steps * ALONG), packed);
        for (int64_t c = 0; c < by->columns; c += BAND)
            for (int64_t r = 0; r < rows; r += BAND) {
                const int64_t high = least(rows - r, BAND), wide = least(by->columns - c, BAND);
                const float *const bias = by->bias && !first ? by->bias + c : NULL;
                float *const to = out + r * out_step + c;
                if (add || bias) begin_sums(bias, high, wide, add ? to : NULL, out_step, sums);
                multiply_bands(
                    terms, packed + r / BAND * steps * terms * TERM,
                    tiles + (c / BAND * all_steps + first) * terms * TERM, steps,
                    add || bias ? sums : NULL, sums, BAND);
                end_sums(sums, high, wide, to, out_step);
            }
    }
    _tile_release();
}

/* What `multiply` does, by tiles if there are any, and room. */
static void apply(
    const Product *by, int64_t terms, const float *tiles, int64_t rows, const float *a, int64_t a_step,
    float *out, int64_t out_step, void *room)
{
    enum { AT_ONCE = FEW_BANDS * BAND };
    if (!tiles || !room || !have_terms(rows, a, a_step, by->inner)) {
        multiply(by, rows, a, a_step, out, out_step);
        return;
    }
    for (int64_t row = 0; row < rows; row += AT_ONCE)
        multiply_by_tiles(
            by, (int)terms, (const uint16_t *)tiles, least(rows - row, AT_ONCE), a + row * a_step, a_step,
            out + row * out_step, out_step, room);
}

#undef TILED

#else

enum { KNOWS_TILES = 0 };

static int64_t tiles_size(int64_t columns, int64_t inner, int64_t terms)
{
    return (void)columns, (void)inner, (void)terms, 0;
}

static int64_t apply_room(void) { return 0; }

static void apply(
    const Product *by, int64_t terms, const float *tiles, int64_t rows, const float *a, int64_t a_step,
    float *out, int64_t out_step, void *room)
{
    (void)terms, (void)tiles, (void)room;
    multiply(by, rows, a, a_step, out, out_step);
}

#endif
