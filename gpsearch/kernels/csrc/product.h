/* Products. `multiply`: a few rows with a weight matrix that is used again and again. `outer`: sums
   over many rows of the products of two rows, for the gradients of weights.

   The right factor is packed, into panels of PANEL columns of the result. A tile of up to TILE rows
   and one panel is kept in registers while it runs along the sum. Needs simd.h. */

#define PANEL (2 * VW)
#define TILE (VW == 16 ? 12 : 6)
#define LINE 16       /* floats in a line of the cache */
#define ROWS_AHEAD VW /* rows of a panel; past its end the hint is harmless */
/* Rows that all tiles run along before they go on, so that the first cache still has them for the
   next tile; with narrower vectors that gained nothing. */
#define KEPT (VW == 16 ? 160 : 1 << 30)

INLINE int64_t panels(int64_t columns) { return (columns + PANEL - 1) / PANEL; }

/* Floats that a packed matrix takes. */
int64_t NAME(packed_size)(int64_t columns, int64_t inner) { return panels(columns) * PANEL * inner; }

/* Packs w, whose element (column of the result, place in the sum) is
   w[column * column_step + place * place_step], one of the steps 1; the last panel is filled up with
   zeros. */
void NAME(pack)(
    const float *w, int64_t column_step, int64_t place_step, int64_t columns, int64_t inner,
    float *packed)
{
    for (int64_t first = 0; first < columns; first += PANEL, packed += PANEL * inner) {
        const int64_t count = columns - first < PANEL ? columns - first : PANEL;
        const float *from = w + first * column_step;
        if (count < PANEL) clear(packed, PANEL * inner);
        if (place_step == 1) turn(from, column_step, count, inner, packed, PANEL, 0);
        else
            for (int64_t k = 0; k < inner; k++)
                memcpy(packed + k * PANEL, from + k * place_step, (size_t)count * sizeof(float));
    }
}

typedef struct {
    const float *packed; /* of one matrix */
    const float *bias;   /* added to every row, or NULL */
    int64_t columns, inner;
    int add; /* to what the result holds already */
} Product;

INLINE void tile(
    const int rows, const Product *by, const float *panel, int64_t column, const float *a,
    int64_t a_row, int64_t a_place, float *out, int64_t out_step)
{
    vf sums[TILE][2];
    const int64_t count = by->columns - column;
    float edge[TILE][PANEL];
    const int whole = count >= PANEL;
    float *to = whole ? out + column : edge[0];
    const int64_t to_step = whole ? out_step : PANEL;
    if (by->add && !whole)
        for (int i = 0; i < rows; i++)
            memcpy(edge[i], out + i * out_step + column, (size_t)count * sizeof(float));
    vf bias[2] = {{0}, {0}};
    if (by->bias) {
        float some[PANEL] = {0};
        const float *from = by->bias + column;
        if (!whole) from = memcpy(some, from, (size_t)count * sizeof(float));
        bias[0] = load(from), bias[1] = load(from + VW);
    }
#pragma GCC unroll 16
    for (int i = 0; i < rows; i++) {
        sums[i][0] = by->add ? load(to + i * to_step) + bias[0] : bias[0];
        sums[i][1] = by->add ? load(to + i * to_step + VW) + bias[1] : bias[1];
    }
    for (int64_t k = 0; k < by->inner; k++) {
        const vf left = load(panel + k * PANEL), right = load(panel + k * PANEL + VW);
        __builtin_prefetch(panel + (k + ROWS_AHEAD) * PANEL);
        if (PANEL > LINE) __builtin_prefetch(panel + (k + ROWS_AHEAD) * PANEL + LINE);
#pragma GCC unroll 16
        for (int i = 0; i < rows; i++) {
            const vf one = splat(a[i * a_row + k * a_place]);
            sums[i][0] += one * left;
            sums[i][1] += one * right;
        }
    }
#pragma GCC unroll 16
    for (int i = 0; i < rows; i++) {
        store(to + i * to_step, sums[i][0]);
        store(to + i * to_step + VW, sums[i][1]);
    }
    if (!whole)
        for (int i = 0; i < rows; i++)
            memcpy(out + i * out_step + column, edge[i], (size_t)count * sizeof(float));
}

#define CASE(height, CALL)                                                                         \
    case height: CALL(height); break;
#if VW == 16
#define CASES(CALL)                                                                                \
    CASE(7, CALL) CASE(8, CALL) CASE(9, CALL) CASE(10, CALL) CASE(11, CALL) CASE(12, CALL)
#else
#define CASES(CALL)
#endif
/* Calls CALL with a constant for the height of a tile. */
#define EACH_HEIGHT(height, CALL)                                                                  \
    switch (height) {                                                                              \
        CASE(1, CALL) CASE(2, CALL) CASE(3, CALL) CASE(4, CALL) CASE(5, CALL) CASE(6, CALL)        \
        CASES(CALL)                                                                                \
    }

/* out[rows, columns] (+)= a[rows, inner] x w + bias. Where there are several tiles, they all run along
   one part of a panel before they go on to its next. */
static void multiply(
    const Product *by, int64_t rows, const float *a, int64_t a_step, float *out, int64_t out_step)
{
    const int64_t blocks = (rows + TILE - 1) / TILE;
    const int64_t parts = blocks > 1 && by->inner > KEPT ? (by->inner + KEPT - 1) / KEPT : 1;
    for (int64_t column = 0; column < by->columns; column += PANEL) {
        for (int64_t part = 0; part < parts; part++) {
            const int64_t k = by->inner * part / parts, end = by->inner * (part + 1) / parts;
            const Product along = {
                by->packed, part ? NULL : by->bias, by->columns, end - k, by->add || part};
            const float *panel = by->packed + column * by->inner + k * PANEL;
            for (int64_t block = 0; block < blocks; block++) {
                /* Tiles of about equal height: one of 6 and one of 2 would be slower than two of 4. */
                const int64_t first = rows * block / blocks, last = rows * (block + 1) / blocks;
                const float *from = a + first * a_step + k;
                float *to = out + first * out_step;
#define CALL(height) tile(height, &along, panel, column, from, a_step, 1, to, out_step)
                EACH_HEIGHT(last - first, CALL)
#undef CALL
            }
        }
    }
}

INLINE void pack_tile(const int height, const float *a, int64_t a_step, int64_t deep, float *packed)
{
    for (int64_t k = 0; k < deep; k++)
        memcpy(packed + k * TILE, a + k * a_step, (size_t)height * sizeof(float));
}

/* Packs columns top to bottom - 1 of a into tiles of TILE of them. */
static void pack_rows(
    const float *a, int64_t a_step, int64_t top, int64_t bottom, int64_t deep, float *packed)
{
    for (int64_t row = top; row < bottom; row += TILE, packed += TILE * deep) {
        const int64_t height = bottom - row < TILE ? bottom - row : TILE;
#define CALL(height) pack_tile(height, a + row, a_step, deep, packed)
        EACH_HEIGHT(height, CALL)
#undef CALL
    }
}

enum { DEEP = 256, HIGH = 96 }; /* A panel stays in the first cache, HIGH rows in the second. */

/* Floats that `outer` needs room for. */
int64_t NAME(outer_room)(int64_t columns) { return (panels(columns) * PANEL + HIGH) * DEEP; }

/* out[rows, columns] = sum over `inner` of a[k, row] * b[k, column]. */
void NAME(outer)(
    const float *a, int64_t a_step, const float *b, int64_t b_step, int64_t rows, int64_t columns,
    int64_t inner, float *out, int64_t out_step, float *room)
{
    float *packed = room, *high = room + panels(columns) * PANEL * DEEP;
    for (int64_t k = 0; k < inner; k += DEEP) {
        const int64_t deep = inner - k < DEEP ? inner - k : DEEP;
        const Product by = {packed, NULL, columns, deep, k > 0};
        NAME(pack)(b + k * b_step, 1, b_step, columns, deep, packed);
        for (int64_t top = 0; top < rows; top += HIGH) {
            const int64_t bottom = top + HIGH < rows ? top + HIGH : rows;
            pack_rows(a + k * a_step, a_step, top, bottom, deep, high);
            for (int64_t column = 0; column < columns; column += PANEL) {
                const float *panel = packed + column * deep, *from = high;
                for (int64_t row = top; row < bottom; row += TILE, from += TILE * deep) {
                    float *to = out + row * out_step;
                    const int64_t height = bottom - row < TILE ? bottom - row : TILE;
#define CALL(height) tile(height, &by, panel, column, from, 1, TILE, to, out_step)
                    EACH_HEIGHT(height, CALL)
#undef CALL
                }
            }
        }
    }
}
