/* Products by tiles (AMX): 16 x 16 sums of products of bfloat16 at a time.

   A float is the sum of three bfloat16 ("terms"), which have 8 of its 24 bits each. Of the nine products
   of two floats' terms the three smallest lie below a float's own rounding and are left out: sums are
   as exact as with floats, at 6 / 16 of the cost. With two terms, which have 17 bits, three products are
   left. The processor takes denormals for zeros: numbers and results below 1e-31 lose digits. An
   infinity is no sum of terms, and those of numbers beyond LARGEST could overflow where the float's
   product does not, or to NaN: then the caller is told, or floats are multiplied.

   The processor multiplies two places in the sum at once, here those that lie 16 apart: the left factor
   is packed in tiles of 16 rows by 16 such pairs, the right one in tiles of 16 pairs by 16 columns. Rows
   and columns come in bands of two tiles: a product of bands keeps four tiles of sums, each of which is
   ready again when its turn comes. Needs product.h and, where WITH_TILES is defined, immintrin.h. */

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
    /* What `multiply_tiles` packs at a time, so that the second cache holds the left part, */
    TILED_ROWS = 16 * BAND,
    TILED_COLUMNS = 16 * BAND,
    TILED_PLACES = 8 * ALONG,
    TILED_IN_ALL = 1 << 20, /* and the numbers of a right factor that is packed as a whole */
};

typedef struct {
    uint8_t palette, start, none[14];
    uint16_t bytes[16]; /* of a row of each of eight tiles */
    uint8_t rows[16];
} Tiles;

static const Tiles ALL_WHOLE = {
    1, 0, {0}, {64, 64, 64, 64, 64, 64, 64, 64}, {16, 16, 16, 16, 16, 16, 16, 16}};

static int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

static int64_t rounded(int64_t count, int64_t to) { return (count + to - 1) / to * to; }

/* Gcc does not know what a tile is loaded from: it is to be written before this. */
#define LOADED_BY_TILES __asm__ volatile("" ::: "memory")

#define TILED WITH_TILES static inline __attribute__((always_inline))

/* Writes the terms of 16 pairs, and takes their sizes into account. */
TILED void write_terms(int terms, __m512i first, __m512i second, uint16_t *to, __m512i *sizes)
{
    const __m512i upper = _mm512_set1_epi32((int)0xffff0000), half = _mm512_set1_epi32(0x8000);
    const __m512i size = _mm512_set1_epi32(0x7fffffff);
    /* As whole numbers, since NaN is more than any float then. */
    *sizes = _mm512_max_epi32(*sizes, _mm512_max_epi32(first & size, second & size));
#pragma GCC unroll 3
    for (int term = 0; term < MOST_TERMS; term++) {
        const __m512i more = term + 1 < MOST_TERMS ? half : _mm512_setzero_si512(); /* 8 bits are left */
        const __m512i low = _mm512_add_epi32(first, more);
        const __m512i high = _mm512_add_epi32(second, more) & upper;
        _mm512_storeu_si512(to + term * TERM, _mm512_srli_epi32(low, 16) | high);
        if (term + 1 == terms) break;
        first = (__m512i)((__m512)first - (__m512)(low & upper));
        second = (__m512i)((__m512)second - (__m512)high);
    }
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

/* Rows of the left factor or columns of the right one (lanes) by places in the sum. One step is 1. */
typedef struct {
    const float *at;
    int64_t lane_step, place_step, lanes, places;
} Factor;

TILED int64_t bands_of(const Factor *f) { return (f->lanes + BAND - 1) / BAND; }

TILED int64_t steps_of(const Factor *f) { return (f->places + ALONG - 1) / ALONG; }

/* So much of a factor, from there on. */
TILED Factor part_of(const Factor *f, int64_t lane, int64_t place, int64_t lanes, int64_t places)
{
    const Factor part = {
        f->at + lane * f->lane_step + place * f->place_step, f->lane_step, f->place_step,
        least(f->lanes - lane, lanes), least(f->places - place, places)};
    return part;
}

/* Packs a tile of each term: lanes by pairs, or pairs by lanes; without any lanes, zeros. */
TILED void pack_tiles(int by_pairs, int terms, const Factor *f, uint16_t *to, __m512i *sizes)
{
    const int along = f->place_step == 1;
    const int64_t step = along ? f->lane_step : f->place_step, count = along ? f->lanes : f->places;
    const int64_t other = SIDE * f->place_step; /* from a pair's first number to its second */
    const __mmask16 first = first_of(along ? f->places : f->lanes);
    const __mmask16 second = along ? first_of(f->places - SIDE) : first;
    for (int i = 0; i < SIDE; i++) {
        const int there = i < count, both = along ? there : i + SIDE < count;
        const float *const at = f->at + (there ? i * step : 0);
        write_terms(
            terms, _mm512_maskz_loadu_epi32(there ? first : 0, at),
            _mm512_maskz_loadu_epi32(both ? second : 0, at + other), to + i * ALONG, sizes);
    }
    if (along == by_pairs)
        for (int term = 0; term < terms; term++) turn_pairs(to + term * TERM);
}

/* The next 32 lanes by 32 places, in the order of the memory. */
TILED Factor nth_part(const Factor *f, int64_t i, int64_t *band, int64_t *step)
{
    *band = f->place_step == 1 ? i / steps_of(f) : i % bands_of(f);
    *step = f->place_step == 1 ? i % steps_of(f) : i / bands_of(f);
    return part_of(f, *band * BAND, *step * ALONG, BAND, ALONG);
}

/* Asks for a part's lines, of which the processor does not foresee that they will be read. */
TILED void fetch_part(const Factor *f)
{
    const int64_t step = f->place_step == 1 ? f->lane_step : f->place_step;
    for (int i = 0; i < BAND; i++) {
        __builtin_prefetch(f->at + i * step, 0, 2);
        __builtin_prefetch(f->at + i * step + SIDE, 0, 2);
    }
}

/* Packs the bands of one factor, each for all places in turn. Returns whether all numbers have terms. */
WITH_TILES static int pack_bands(int by_pairs, int terms, const Factor *f, uint16_t *to)
{
    const int64_t steps = steps_of(f), count = steps * bands_of(f);
    __m512i sizes = _mm512_setzero_si512();
    for (int64_t i = 0, band, step; i < count; i++) {
        const Factor next = nth_part(f, i + 1, &band, &step), now = nth_part(f, i, &band, &step);
        fetch_part(&next); /* past the last one that does no harm */
        for (int half = 0; half < 2; half++) {
            const Factor tile = part_of(&now, half * SIDE, 0, SIDE, ALONG);
            uint16_t *const at = to + (band * steps + step) * terms * TERM + half * TILE_SIZE;
            pack_tiles(by_pairs, terms, &tile, at, &sizes);
        }
    }
    return _mm512_cmpgt_epi32_mask(sizes, _mm512_set1_epi32(LARGEST)) == 0;
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

typedef struct {
    int64_t columns, places;
} Extent;

/* How much of the right factor is packed at a time: all of it, if that is little enough. */
static Extent packed_at_once(int64_t columns, int64_t inner)
{
    const Extent all = {rounded(columns, BAND), rounded(inner, ALONG)};
    const Extent part = {TILED_COLUMNS, TILED_PLACES};
    return all.columns * all.places <= TILED_IN_ALL ? all : part;
}

/* Floats that `multiply_tiles` needs room for. */
int64_t NAME(tiles_room)(int64_t columns, int64_t inner)
{
    const Extent of_b = packed_at_once(columns, inner);
    const int64_t packed = TILED_ROWS * TILED_PLACES + of_b.columns * of_b.places;
    return packed * MOST_TERMS / 2 + TILED_ROWS * of_b.columns;
}

/* The product of two packed parts: `sums` keeps it from the first to the last places in the sum. */
WITH_TILES static void multiply_parts(
    int terms, const uint16_t *left, const uint16_t *right, int64_t rows, int64_t columns, int64_t steps,
    int first, int last, float *sums, float *out, int64_t out_step)
{
    for (int64_t c = 0; c < columns; c += BAND, right += steps * terms * TERM)
        for (int64_t r = 0; r < rows; r += BAND, sums += BAND * BAND) {
            float *const to = out + r * out_step + c;
            const int64_t high = least(rows - r, BAND), wide = least(columns - c, BAND);
            const int straight = last && high == BAND && wide == BAND;
            for (int i = 0; straight && i < BAND; i++) {
                __builtin_prefetch(to + i * out_step, 1);
                __builtin_prefetch(to + i * out_step + SIDE, 1);
            }
            multiply_bands(
                terms, left + r * steps * ALONG * terms, right, steps, first ? NULL : sums,
                straight ? to : sums, straight ? out_step : BAND);
            if (last && !straight) end_sums(sums, high, wide, to, out_step);
        }
}

/* out[rows, columns] = a[rows, inner] x b[inner, columns], where one of a factor's two steps is 1. The
   room begins at a line of the cache. Returns 0 where a number has no terms: out is not to be used. */
WITH_TILES int64_t NAME(multiply_tiles)(
    const float *a, int64_t a_row, int64_t a_place, const float *b, int64_t b_place, int64_t b_column,
    int64_t rows, int64_t columns, int64_t inner, int64_t terms, float *out, int64_t out_step, float *room)
{
    const Factor of_a = {a, a_row, a_place, rows, inner}, of_b = {b, b_column, b_place, columns, inner};
    const Extent at_once = packed_at_once(columns, inner);
    const int stays = at_once.places >= inner; /* packed while all rows go by */
    /* Without a right factor to pack again for every part of the left one, longer parts are better:
       the sums of their fewer rows stay in the second cache, too. */
    const int64_t tall = stays ? TILED_ROWS / 2 : TILED_ROWS, deep = TILED_ROWS * TILED_PLACES / tall;
    uint16_t *const left = (uint16_t *)room, *const rights = left + TILED_ROWS * TILED_PLACES * terms;
    float *const sums = (float *)(rights + at_once.columns * at_once.places * terms);
    int good = 1;
    _tile_loadconfig(&ALL_WHOLE);
    for (int64_t c = 0; c < columns; c += at_once.columns)
        for (int64_t r = 0; r < rows; r += tall)
            for (int64_t k = 0; k < inner && good; k += deep) {
                const Factor part_a = part_of(&of_a, r, k, tall, deep);
                const Factor part_b = part_of(&of_b, c, k, at_once.columns, deep);
                uint16_t *const right = rights + (stays ? at_once.columns * k * terms : 0);
                good &= pack_bands(0, terms, &part_a, left);
                if (!stays || r == 0) good &= pack_bands(1, terms, &part_b, right);
                multiply_parts(
                    terms, left, right, part_a.lanes, part_b.lanes, steps_of(&part_a), k == 0,
                    k + deep >= inner, sums, out + r * out_step + c, out_step);
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
    const Factor f = {w, column_step, place_step, columns, inner};
    return pack_bands(1, terms, &f, (uint16_t *)packed);
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
        const Factor part = {a + k, a_step, 1, rows, least(by->inner - k, steps * ALONG)};
        pack_bands(0, terms, &part, packed);
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
