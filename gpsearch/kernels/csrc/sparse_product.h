/* Products with weights of which few are awake. What they multiply is feature-major,
   [feature, lane]: the lanes are the sequences of a batch, filled up to whole vectors, so that every
   awake weight is one multiply-add over all of them and nothing is gathered.

   Needs simd.h. */

enum { GROUP = 4 }; /* What one row multiplies comes in whole groups. */

typedef struct {
    int64_t rows;
    const int32_t *start;  /* [rows + 1], into column and value */
    const int32_t *column; /* any where a row does not fill its last group */
    const float *value;    /* 0 there */
} Sparse;

/* A matrix of weights of which few are awake: which ones, row by row and column by column. */
typedef struct {
    int64_t rows, columns;
    const int32_t *start, *column;     /* as in Sparse */
    const int32_t *place;              /* of each in the matrix; -1 where a group is not filled */
    const int32_t *start_t, *column_t; /* as in Sparse, of the transpose */
    const int32_t *order;              /* where the row-by-row order has it; -1 as above */
    const float *weight;               /* [rows, columns] */
    float *value, *value_t;            /* room for the awake weights, in both orders */
    float *sum;                        /* room for their gradients, row by row */
    float *grad;                       /* [rows, columns]: these, and zeros */
} SparseWeight;

/* Sequences of a batch, filled up to whole vectors. */
int64_t NAME(lanes)(int64_t batch) { return (batch + VW - 1) / VW * VW; }

INLINE Sparse forth(const SparseWeight *w) { return (Sparse){w->rows, w->start, w->column, w->value}; }

INLINE Sparse back(const SparseWeight *w)
{
    return (Sparse){w->columns, w->start_t, w->column_t, w->value_t};
}

static void take_values(const SparseWeight *w)
{
    for (int64_t e = 0; e < w->start[w->rows]; e++)
        w->value[e] = w->place[e] < 0 ? 0.0f : w->weight[w->place[e]];
}

static void take_transposed(const SparseWeight *w)
{
    for (int64_t e = 0; e < w->start_t[w->columns]; e++)
        w->value_t[e] = w->order[e] < 0 ? 0.0f : w->value[w->order[e]];
    clear(w->sum, w->start[w->rows]);
}

static void put_gradients(const SparseWeight *w)
{
    clear(w->grad, w->rows * w->columns);
    for (int64_t e = 0; e < w->start[w->rows]; e++)
        if (w->place[e] >= 0) w->grad[w->place[e]] = w->sum[e];
}

typedef struct {
    Sparse map;
    const float *bias; /* [rows], or NULL */
    int add;           /* to what stands there, and no bias */
} SparseProduct;

enum { MOST_VECTORS = 4 }; /* What a weight is multiplied with at once. */

/* Steps that go through a product together where none waits for the one before: a weight is then
   fetched once for all of them. */
int64_t NAME(steps_together)(int64_t lanes)
{
    return 0 < lanes && lanes < MOST_VECTORS * VW ? MOST_VECTORS * VW / lanes : 1;
}

/* sums += row of the map x columns, for `vectors` vectors of lanes. */
INLINE void add_row(
    const int vectors, const Sparse *map, int64_t row, const float *const *x, int64_t lanes,
    vf *sums)
{
    vf others[MOST_VECTORS] = {{0}}; /* a multiply-add need not wait for the one before */
    for (int64_t e = map->start[row]; e < map->start[row + 1]; e += GROUP)
#pragma GCC unroll 4
        for (int i = 0; i < GROUP; i++) {
            const vf value = splat(map->value[e + i]);
            const int64_t at = (int64_t)map->column[e + i] * lanes;
#pragma GCC unroll 4
            for (int v = 0; v < vectors; v++)
                (i % 2 ? others : sums)[v] += value * load(x[v] + at);
        }
#pragma GCC unroll 4
    for (int v = 0; v < vectors; v++) sums[v] += others[v];
}

INLINE void multiply_vectors(
    const int vectors, const SparseProduct *p, int64_t lanes, const float *const *x,
    float *const *out)
{
    for (int64_t row = 0; row < p->map.rows; row++) {
        vf sums[MOST_VECTORS];
#pragma GCC unroll 4
        for (int v = 0; v < vectors; v++)
            sums[v] = p->add    ? load(out[v] + row * lanes)
                      : p->bias ? splat(p->bias[row])
                                : splat(0.0f);
        add_row(vectors, &p->map, row, x, lanes, sums);
#pragma GCC unroll 4
        for (int v = 0; v < vectors; v++) store(out[v] + row * lanes, sums[v]);
    }
}

/* out [rows, lane] = bias (or out) + the map times x [columns, lane], for every step. */
static void multiply_steps(
    const SparseProduct *p, int64_t steps, int64_t lanes, const float *x, int64_t x_step, float *out,
    int64_t out_step)
{
    const int64_t count = steps * lanes / VW;
    for (int64_t first = 0; first < count;) {
        const float *from[MOST_VECTORS];
        float *to[MOST_VECTORS];
        const int64_t left = count - first;
        const int vectors = left >= MOST_VECTORS ? MOST_VECTORS : left >= 2 ? 2 : 1;
        for (int v = 0; v < vectors; v++) {
            const int64_t step = (first + v) * VW / lanes, lane = (first + v) * VW % lanes;
            from[v] = x + step * x_step + lane;
            to[v] = out + step * out_step + lane;
        }
        if (vectors == MOST_VECTORS) multiply_vectors(MOST_VECTORS, p, lanes, from, to);
        else if (vectors == 2) multiply_vectors(2, p, lanes, from, to);
        else multiply_vectors(1, p, lanes, from, to);
        first += vectors;
    }
}

static void multiply_step(const SparseProduct *p, int64_t lanes, const float *x, float *out)
{
    multiply_steps(p, 1, lanes, x, 0, out, 0);
}

INLINE void add_to(float *sums, const float *x, int64_t count)
{
    for (int64_t i = 0; i < count; i += VW) store(sums + i, load(sums + i) + load(x + i));
}

typedef float vf4 __attribute__((vector_size(16)));

/* By halves, down to four lanes. */
INLINE vf4 quarter_sums(vf x)
{
    union { vf whole; vf4 part[VW / 4]; } sums = {x};
#pragma GCC unroll 4
    for (int count = VW / 8; count; count /= 2)
#pragma GCC unroll 4
        for (int i = 0; i < count; i++) sums.part[i] += sums.part[i + count];
    return sums.part[0];
}

/* The sums over the lanes of each of four vectors. */
INLINE vf4 sums_of_lanes(const vf x[4])
{
#if VW > 4
    __m128 a = (__m128)quarter_sums(x[0]), b = (__m128)quarter_sums(x[1]);
    __m128 c = (__m128)quarter_sums(x[2]), d = (__m128)quarter_sums(x[3]);
    _MM_TRANSPOSE4_PS(a, b, c, d);
    return (vf4)_mm_add_ps(_mm_add_ps(a, c), _mm_add_ps(b, d));
#else
    vf4 sums;
    for (int i = 0; i < 4; i++) {
        const vf4 four = quarter_sums(x[i]);
        sums[i] = (four[0] + four[2]) + (four[1] + four[3]);
    }
    return sums;
#endif
}

static void sum_lanes(const float *sums, int64_t rows, int64_t lanes, float *out)
{
    for (int64_t row = 0; row < rows; row++) {
        vf sum = {0};
        for (int64_t lane = 0; lane < lanes; lane += VW) sum += load(sums + row * lanes + lane);
        const vf4 four = quarter_sums(sum);
        out[row] = (four[0] + four[2]) + (four[1] + four[3]);
    }
}

INLINE void sample_lanes(
    const SparseWeight *w, int64_t steps, const int64_t lanes, const float *d, int64_t d_step,
    const float *x, int64_t x_step)
{
    for (int64_t row = 0; row < w->rows; row++)
        for (int64_t e = w->start[row]; e < w->start[row + 1]; e += GROUP) {
            const float *from[GROUP];
            for (int i = 0; i < GROUP; i++) from[i] = x + (int64_t)w->column[e + i] * lanes;
            vf sums[GROUP] = {{0}};
            for (int64_t step = 0; step < steps; step++) {
                const float *of_row = d + step * d_step + row * lanes;
                for (int64_t lane = 0; lane < lanes; lane += VW) {
                    const vf left = load(of_row + lane);
#pragma GCC unroll 4
                    for (int i = 0; i < GROUP; i++)
                        sums[i] += left * load(from[i] + step * x_step + lane);
                }
            }
            const vf4 all = sums_of_lanes(sums);
            for (int i = 0; i < GROUP; i++) w->sum[e + i] += all[i];
        }
}

/* sum += over `steps` steps and all lanes d[row] * x[column], for every awake weight. */
static void sample(
    const SparseWeight *w, int64_t steps, int64_t lanes, const float *d, int64_t d_step,
    const float *x, int64_t x_step)
{
    if (lanes == VW) sample_lanes(w, steps, VW, d, d_step, x, x_step); /* without an inner loop */
    else sample_lanes(w, steps, lanes, d, d_step, x, x_step);
}
