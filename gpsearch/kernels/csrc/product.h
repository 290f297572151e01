/* Products of a few rows with a weight matrix that is used again and again: batch x weights.

   The weights are packed once, into panels of PANEL columns of the result. A tile of up to TILE
   rows and one panel is kept in registers while it runs along the sum. Needs simd.h. */

#define PANEL (2 * VW)
#define TILE (VW == 16 ? 12 : 6)

INLINE int64_t panels(int64_t columns) { return (columns + PANEL - 1) / PANEL; }

/* Floats that a packed matrix takes. */
int64_t NAME(packed_size)(int64_t columns, int64_t inner) { return panels(columns) * PANEL * inner; }

/* Packs w, whose element (column of the result, place in the sum) is
   w[column * column_step + place * place_step]; the last panel is filled up with zeros. */
void NAME(pack)(
    const float *w, int64_t column_step, int64_t place_step, int64_t columns, int64_t inner,
    float *packed)
{
    for (int64_t first = 0; first < columns; first += PANEL)
        for (int64_t k = 0; k < inner; k++)
            for (int64_t j = 0; j < PANEL; j++, packed++)
                *packed =
                    first + j < columns ? w[(first + j) * column_step + k * place_step] : 0.0f;
}

typedef struct {
    const float *packed; /* of one matrix */
    const float *bias;   /* added to every row, or NULL */
    int64_t columns, inner;
    int add; /* to what the result holds already */
} Product;

INLINE void tile(
    const int rows, const Product *by, const float *panel, int64_t column, const float *a,
    int64_t a_step, float *out, int64_t out_step)
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
        sums[i][0] = by->add ? load(to + i * to_step) : bias[0];
        sums[i][1] = by->add ? load(to + i * to_step + VW) : bias[1];
    }
    for (int64_t k = 0; k < by->inner; k++) {
        const vf left = load(panel + k * PANEL), right = load(panel + k * PANEL + VW);
#pragma GCC unroll 16
        for (int i = 0; i < rows; i++) {
            const vf one = splat(a[i * a_step + k]);
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

/* out[rows, columns] (+)= a[rows, inner] x w + bias. */
static void multiply(
    const Product *by, int64_t rows, const float *a, int64_t a_step, float *out, int64_t out_step)
{
    const int64_t blocks = (rows + TILE - 1) / TILE;
    for (int64_t column = 0; column < by->columns; column += PANEL) {
        const float *panel = by->packed + column * by->inner;
        for (int64_t block = 0; block < blocks; block++) {
            /* Tiles of about equal height: one of 6 and one of 2 would be slower than two of 4. */
            const int64_t first = rows * block / blocks, last = rows * (block + 1) / blocks;
            const float *from = a + first * a_step;
            float *to = out + first * out_step;
#define CASE(height)                                                                               \
    case height: tile(height, by, panel, column, from, a_step, to, out_step); break;
            switch (last - first) {
                CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6)
#if VW == 16
                CASE(7) CASE(8) CASE(9) CASE(10) CASE(11) CASE(12)
#endif
            }
#undef CASE
        }
    }
}
