/* The recurrence of training.h for weights of which few are awake. Arrays are feature-major,
   [time, feature, lane]: the lanes are the sequences of a batch, filled up to whole vectors, so
   that every awake weight is one multiply-add over all of them and nothing is gathered. What comes
   from outside, or goes there, is turned step by step, while it is in the caches.

   Needs simd.h and training.h. */

typedef struct {
    int64_t rows;
    const int32_t *start;  /* [rows + 1], into column and value */
    const int32_t *column; /* ascending in a row */
    const float *value;
} Sparse;

typedef struct {
    float *at;         /* [T, batch, feature], or NULL */
    int64_t step, row; /* from one step, and from one sequence, to the next */
} Outside;

typedef struct {
    int64_t width, out;    /* units of each gate that the map reads, and writes */
    const Sparse *maps;    /* [4], out x width; `backward_sparse` takes the transposed ones */
    const float *bias;     /* [4, out], or NULL */
    const float *mask;     /* [4 width, lane], or NULL */
    float *pre, *post;     /* [T, 4 width (and more for the first pre), lane] */
    float *d_pre;          /* as pre */
    float *d_bias;         /* [4 out, lane], to be added to, or NULL */
} SparseDense;

typedef struct {
    int64_t steps, batch, lanes, size, inputs, activation, depth, rows, first;
    const Sparse *ih, *hh; /* rows x inputs, rows x size; transposed for `backward_sparse` */
    const float *bias;     /* [rows], or NULL */
    const SparseDense *dense;
    float *x;                     /* [T, inputs, lane] */
    float *z;                     /* [T, rows, lane] */
    float *gate;                  /* [T, 4 size, lane] */
    float *h, *c;                 /* [T + 1, size, lane] */
    float *tanh_c;                /* [T, size, lane] */
    float *d_z;
    float *d_gate;
    int64_t d_gate_step; /* from one step of d_gate to the next */
    float *d_h, *d_c;    /* [size, lane] */
    float *d_x;          /* [inputs, lane]: room for one step's, or NULL */
    float *d_bias;       /* [rows, lane], to be added to, or NULL */
    Outside in, out_h, out_c, grad_h, grad_c, d_in;
} SparseRecurrence;

/* Sequences of a batch, filled up to whole vectors. */
int64_t NAME(lanes)(int64_t batch) { return (batch + VW - 1) / VW * VW; }

/* to[column, row] (+)= from[row, column], where both have so many rows and columns of a 4 x 4 tile. */
INLINE void turn_tile(const int whole, int rows, int columns, const float *from, int64_t from_step,
                      float *to, int64_t to_step, int add)
{
#if VW > 4
    if (whole) {
        __m128 a = _mm_loadu_ps(from), b = _mm_loadu_ps(from + from_step);
        __m128 c = _mm_loadu_ps(from + 2 * from_step), d = _mm_loadu_ps(from + 3 * from_step);
        _MM_TRANSPOSE4_PS(a, b, c, d);
        const __m128 turned[4] = {a, b, c, d};
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++) {
            float *const at = to + i * to_step;
            _mm_storeu_ps(at, add ? _mm_add_ps(_mm_loadu_ps(at), turned[i]) : turned[i]);
        }
        return;
    }
#endif
    for (int c = 0; c < (whole ? 4 : columns); c++)
        for (int r = 0; r < (whole ? 4 : rows); r++) {
            float *const at = to + c * to_step + r;
            *at = add ? *at + from[r * from_step + c] : from[r * from_step + c];
        }
}

/* to[column, row] (+)= from[row, column]; in squares, so that lines of the cache are read and
   written as a whole. */
static void turn(const float *from, int64_t from_step, int64_t rows, int64_t columns, float *to,
                 int64_t to_step, int add)
{
    enum { SQUARE = 16 };
    for (int64_t r0 = 0; r0 < rows; r0 += SQUARE)
        for (int64_t c0 = 0; c0 < columns; c0 += SQUARE)
            for (int64_t r = r0; r < r0 + SQUARE && r < rows; r += 4)
                for (int64_t c = c0; c < c0 + SQUARE && c < columns; c += 4) {
                    const float *const a = from + r * from_step + c;
                    float *const b = to + c * to_step + r;
                    const int height = rows - r < 4 ? (int)(rows - r) : 4;
                    const int width = columns - c < 4 ? (int)(columns - c) : 4;
                    if (height == 4 && width == 4) turn_tile(1, 4, 4, a, from_step, b, to_step, add);
                    else turn_tile(0, height, width, a, from_step, b, to_step, add);
                }
}

/* Takes a step of what lies outside into lanes [features, lane], or adds it to them. */
static void take_in(const Outside *o, int64_t t, int64_t batch, int64_t features, int64_t lanes,
                    float *to, int add)
{
    turn(o->at + t * o->step, o->row, batch, features, to, lanes, add);
    for (int64_t k = 0; !add && lanes > batch && k < features; k++)
        memset(to + k * lanes + batch, 0, (size_t)(lanes - batch) * sizeof(float));
}

static void put_out(const float *from, int64_t features, int64_t lanes, int64_t batch,
                    const Outside *o, int64_t t)
{
    turn(from, lanes, features, batch, o->at + t * o->step, o->row, 0);
}

INLINE void add_to(float *sums, const float *x, int64_t count)
{
    for (int64_t i = 0; i < count; i += VW) store(sums + i, load(sums + i) + load(x + i));
}

#define MOST_VECTORS 4

/* sums += row of the map x columns, for `vectors` vectors of lanes; enough sums run side by side to
   hide how long a multiply-add takes. */
INLINE void add_row(
    const int vectors, const Sparse *map, int64_t row, const float *x, int64_t lanes, vf *sums)
{
    enum { SIDE_BY_SIDE = 8 };
    const int sets = SIDE_BY_SIDE / vectors;
    vf partial[SIDE_BY_SIDE] = {{0}};
    int64_t e = map->start[row];
    const int64_t end = map->start[row + 1];
    for (; e + sets <= end; e += sets) {
#pragma GCC unroll 8
        for (int s = 0; s < sets; s++) {
            const vf value = splat(map->value[e + s]);
            const float *from = x + (int64_t)map->column[e + s] * lanes;
#pragma GCC unroll 4
            for (int v = 0; v < vectors; v++)
                partial[s * vectors + v] += value * load(from + v * VW);
        }
    }
    for (; e < end; e++) {
        const vf value = splat(map->value[e]);
        const float *from = x + (int64_t)map->column[e] * lanes;
#pragma GCC unroll 4
        for (int v = 0; v < vectors; v++) sums[v] += value * load(from + v * VW);
    }
#pragma GCC unroll 8
    for (int s = 0; s < sets; s++)
#pragma GCC unroll 4
        for (int v = 0; v < vectors; v++) sums[v] += partial[s * vectors + v];
}

typedef struct {
    const Sparse *map;
    const float *x;
} Term;

INLINE void product_rows(
    const int vectors, const Term *terms, int count, const float *bias, int64_t lanes,
    int64_t lane, float *out)
{
    for (int64_t row = 0; row < terms[0].map->rows; row++) {
        vf sums[MOST_VECTORS];
#pragma GCC unroll 4
        for (int v = 0; v < vectors; v++) sums[v] = bias ? splat(bias[row]) : splat(0.0f);
        for (int i = 0; i < count; i++)
            add_row(vectors, terms[i].map, row, terms[i].x + lane, lanes, sums);
#pragma GCC unroll 4
        for (int v = 0; v < vectors; v++) store(out + row * lanes + lane + v * VW, sums[v]);
    }
}

/* out = bias + the terms' maps times their x. */
static void sparse_product(
    const Term *terms, int count, const float *bias, int64_t lanes, float *out)
{
    int64_t lane = 0;
    for (; lane + 4 * VW <= lanes; lane += 4 * VW)
        product_rows(4, terms, count, bias, lanes, lane, out);
    for (; lane + 2 * VW <= lanes; lane += 2 * VW)
        product_rows(2, terms, count, bias, lanes, lane, out);
    for (; lane < lanes; lane += VW)
        product_rows(1, terms, count, bias, lanes, lane, out);
}

static void sparse_cell(const SparseRecurrence *r, int64_t t)
{
    const int64_t part = r->size * r->lanes;
    float *gate = r->gate + t * 4 * part;
    const float *direct =
        r->rows > r->first ? r->z + (t * r->rows + r->first) * r->lanes : NULL;
    const float *last = r->c + t * part;
    float *c = r->c + (t + 1) * part, *h = r->h + (t + 1) * part, *tanh_c = r->tanh_c + t * part;
    cell_row(r->depth > 0, direct, part, gate, last, c, tanh_c, h);
}

/* Steps 0 to T - 1. */
void NAME(forward_sparse)(const SparseRecurrence *r)
{
    const int64_t state = r->size * r->lanes;
    for (int64_t t = 0; t < r->steps; t++) {
        float *z = r->z + t * r->rows * r->lanes, *x = r->x + t * r->inputs * r->lanes;
        const Term onto_z[] = {{r->ih, x}, {r->hh, r->h + t * state}};
        take_in(&r->in, t, r->batch, r->inputs, r->lanes, x, 0);
        sparse_product(onto_z, 2, r->bias, r->lanes, z);
        for (int64_t layer = 0; layer < r->depth; layer++) {
            const SparseDense *d = &r->dense[layer];
            const int last = layer + 1 == r->depth;
            const int64_t part = d->width * r->lanes, out_part = d->out * r->lanes;
            float *out = (last ? r->gate : r->dense[layer + 1].pre) + t * 4 * out_part;
            const float *pre = d->pre + t * (layer ? 4 * part : r->rows * r->lanes);
            float *post = d->post + t * 4 * part;
#define CALL(kind) activate(kind, 4 * part, pre, d->mask, post)
            EACH_KIND(r->activation, CALL)
#undef CALL
            for (int gate = 0; gate < 4; gate++) {
                const Term onto_out = {&d->maps[gate], post + gate * part};
                const float *bias = d->bias ? d->bias + gate * d->out : NULL;
                sparse_product(&onto_out, 1, bias, r->lanes, out + gate * out_part);
            }
        }
        sparse_cell(r, t);
        put_out(r->h + (t + 1) * state, r->size, r->lanes, r->batch, &r->out_h, t);
        put_out(r->c + (t + 1) * state, r->size, r->lanes, r->batch, &r->out_c, t);
    }
}

/* Back from step T - 1 to 0; d_h and d_c begin as zeros and end as the initial state's gradients. */
void NAME(backward_sparse)(const SparseRecurrence *r)
{
    const int64_t state = r->size * r->lanes;
    for (int64_t t = r->steps - 1; t >= 0; t--) {
        if (r->grad_h.at) take_in(&r->grad_h, t, r->batch, r->size, r->lanes, r->d_h, 1);
        if (r->grad_c.at) take_in(&r->grad_c, t, r->batch, r->size, r->lanes, r->d_c, 1);
        float *d_gate = r->d_gate + t * r->d_gate_step;
        cell_row_backward(state, r->gate + t * 4 * state, r->tanh_c + t * state, r->c + t * state,
                          NULL, r->d_h, r->d_c, d_gate);
        for (int64_t layer = r->depth - 1; layer >= 0; layer--) {
            const SparseDense *d = &r->dense[layer];
            const int last = layer + 1 == r->depth;
            const int64_t part = d->width * r->lanes, out_part = d->out * r->lanes;
            const float *from = last ? d_gate : r->dense[layer + 1].d_pre + t * 4 * out_part;
            const int64_t step = layer ? 4 * part : r->rows * r->lanes;
            const float *pre = d->pre + t * step;
            float *d_pre = d->d_pre + t * step;
            if (d->d_bias) add_to(d->d_bias, from, 4 * out_part);
            for (int gate = 0; gate < 4; gate++) {
                const Term onto_pre = {&d->maps[gate], from + gate * out_part};
                sparse_product(&onto_pre, 1, NULL, r->lanes, d_pre + gate * part);
            }
#define CALL(kind) deactivate(kind, 4 * part, pre, d->mask, d_pre)
            EACH_KIND(r->activation, CALL)
#undef CALL
        }
        const float *d_z = r->d_z + t * r->rows * r->lanes;
        const Term onto_h = {r->hh, d_z}, onto_x = {r->ih, d_z};
        if (r->d_bias) add_to(r->d_bias, d_z, r->rows * r->lanes);
        sparse_product(&onto_h, 1, NULL, r->lanes, r->d_h);
        if (!r->d_x) continue;
        sparse_product(&onto_x, 1, NULL, r->lanes, r->d_x);
        put_out(r->d_x, r->inputs, r->lanes, r->batch, &r->d_in, t);
    }
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

/* grad = sums over steps and lanes of d[t, row] * x[t, column] where the map is awake, zero elsewhere.
   As many steps at a time as leave what they hold of x in the second cache. */
void NAME(sampled)(
    const Sparse *map, int64_t columns, int64_t steps, int64_t lanes, const float *d,
    int64_t d_step, const float *x, int64_t x_step, float *grad)
{
    enum { SIDE_BY_SIDE = 4, CACHED = 1 << 16 };
    const int64_t fitting = CACHED / (columns * lanes), block = fitting > 1 ? fitting : 1;
    memset(grad, 0, (size_t)(map->rows * columns) * sizeof(float));
    for (int64_t t = 0; t < steps; t += block) {
        const int64_t end = t + block < steps ? t + block : steps;
        for (int64_t row = 0; row < map->rows; row++)
            for (int64_t e = map->start[row]; e < map->start[row + 1]; e += SIDE_BY_SIDE) {
                const int64_t left = map->start[row + 1] - e;
                const float *from[SIDE_BY_SIDE];
                for (int i = 0; i < SIDE_BY_SIDE; i++) /* the last group reads its first again */
                    from[i] = x + (int64_t)map->column[i < left ? e + i : e] * lanes;
                vf sums[SIDE_BY_SIDE] = {{0}};
                for (int64_t step = t; step < end; step++) {
                    const float *of_row = d + step * d_step + row * lanes;
                    for (int64_t lane = 0; lane < lanes; lane += VW) {
                        const vf left_factor = load(of_row + lane);
#pragma GCC unroll 4
                        for (int i = 0; i < SIDE_BY_SIDE; i++)
                            sums[i] += left_factor * load(from[i] + step * x_step + lane);
                    }
                }
                const vf4 all = sums_of_lanes(sums);
                for (int i = 0; i < SIDE_BY_SIDE && i < left; i++)
                    grad[row * columns + map->column[e + i]] += all[i];
            }
    }
}
