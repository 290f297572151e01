/* Products with dense weights of 8 and 16 bits, of which several columns lie together. Needs pack.h,
   and where VW is 16 immintrin.h.

   BFLOAT16: a row's weights in two columns fill the bits of one float, and the weight in the upper
   half becomes one by clearing the lower.

   INT8, with AVX-512: four columns, as digits.h wants them; here they are turned into floats. */

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

#if VW == 16

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

INLINE void multiply_fours(const Matrix *m, const float *x, float *y) { (void)m, (void)x, (void)y; }

#endif
