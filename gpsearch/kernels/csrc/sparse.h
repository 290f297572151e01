/* The recurrence of training.h for weights of which few are awake. Arrays are feature-major,
   [time, feature, lane]: the lanes are the sequences of a batch, filled up to whole vectors, so
   that every awake weight is one multiply-add over all of them and nothing is gathered. What comes
   from outside, or goes there, is turned step by step, while it is in the caches.

   Needs simd.h and training.h. */

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

typedef struct {
    float *at;         /* [T, batch, feature], or NULL */
    int64_t step, row; /* from one step, and from one sequence, to the next */
} Outside;

typedef struct {
    int64_t width, out;       /* units of each gate that the map reads, and writes */
    const SparseWeight *maps; /* [4], out x width */
    const float *bias;        /* [4, out], or NULL */
    const float *mask;        /* [4 width, lane], or NULL */
    float *pre;               /* [T, 4 width (and more for the first), lane] */
    float *post;              /* [T, 4 width, lane]; may take the place of pre's */
    int64_t post_step;        /* from one step of post to the next */
    float *d_pre;             /* as pre, but of `block` steps */
    float *bias_sums;         /* [4 out, lane]: room */
    float *d_bias;            /* [4 out], or NULL */
} SparseDense;

/* The gradients of sums are kept for `block` steps at a time: from these, while they are in the
   caches, come those of the inputs and weights. */
typedef struct {
    int64_t steps, block, batch, lanes, size, inputs, activation, depth, rows, first;
    const SparseWeight *ih, *hh; /* rows x inputs, rows x size */
    const float *bias;           /* [rows], or NULL */
    const SparseDense *dense;
    float *x;                     /* [T, inputs, lane] */
    float *z;                     /* [T, rows, lane] */
    float *gate;                  /* [T, 4 size, lane] */
    float *h, *c;                 /* [T + 1, size, lane] */
    float *tanh_c;                /* [T, size, lane] */
    float *d_z;                   /* [block, rows, lane] */
    float *d_gate;                /* [block, 4 size, lane]; behind d_z's first where direct */
    int64_t d_gate_step;          /* from one step of d_gate to the next */
    float *d_h, *d_c;             /* [size, lane]: room */
    float *d_x;                   /* [steps together, inputs, lane]: room, or NULL */
    float *bias_sums;             /* [rows, lane]: room */
    float *d_bias;                /* [rows], or NULL */
    Outside in, h0, c0, out_h, grad_h, grad_c, d_in, d_h0, d_c0;
} SparseRecurrence;

/* Sequences of a batch, filled up to whole vectors. */
int64_t NAME(lanes)(int64_t batch) { return (batch + VW - 1) / VW * VW; }

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
    return lanes < MOST_VECTORS * VW ? MOST_VECTORS * VW / lanes : 1;
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
        const int vectors = count - first >= 4 ? 4 : count - first >= 2 ? 2 : 1;
        for (int v = 0; v < vectors; v++) {
            const int64_t step = (first + v) * VW / lanes, lane = (first + v) * VW % lanes;
            from[v] = x + step * x_step + lane;
            to[v] = out + step * out_step + lane;
        }
        if (vectors == 4) multiply_vectors(4, p, lanes, from, to);
        else if (vectors == 2) multiply_vectors(2, p, lanes, from, to);
        else multiply_vectors(1, p, lanes, from, to);
        first += vectors;
    }
}

static void multiply_step(const SparseProduct *p, int64_t lanes, const float *x, float *out)
{
    multiply_steps(p, 1, lanes, x, 0, out, 0);
}

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

static void each_weight(const SparseRecurrence *r, void (*apply)(const SparseWeight *))
{
    apply(r->ih);
    apply(r->hh);
    for (int64_t layer = 0; layer < r->depth; layer++)
        for (int gate = 0; gate < 4; gate++) apply(&r->dense[layer].maps[gate]);
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

INLINE int64_t at_most_steps(int64_t steps, int64_t most) { return steps < most ? steps : most; }

/* Takes in the input of some steps, and puts its share of their sums into z. */
static void take_inputs(const SparseRecurrence *r, int64_t t, int64_t steps)
{
    const SparseProduct onto_z = {forth(r->ih), r->bias, 0};
    const int64_t x_step = r->inputs * r->lanes, z_step = r->rows * r->lanes;
    for (int64_t step = t; step < t + steps; step++)
        take_in(&r->in, step, r->batch, r->inputs, r->lanes, r->x + step * x_step, 0);
    multiply_steps(&onto_z, steps, r->lanes, r->x + t * x_step, x_step, r->z + t * z_step, z_step);
}

static void sparse_step(const SparseRecurrence *r, int64_t t)
{
    const SparseProduct onto_z = {forth(r->hh), NULL, 1};
    const int64_t state = r->size * r->lanes, z = r->rows * r->lanes;
    multiply_step(&onto_z, r->lanes, r->h + t * state, r->z + t * z);
    for (int64_t layer = 0; layer < r->depth; layer++) {
        const SparseDense *d = &r->dense[layer];
        const int last = layer + 1 == r->depth;
        const int64_t part = d->width * r->lanes, out_part = d->out * r->lanes;
        float *out = (last ? r->gate : r->dense[layer + 1].pre) + t * 4 * out_part;
        const float *pre = d->pre + t * (layer ? 4 * part : z);
        float *post = d->post + t * d->post_step;
#define CALL(kind) activate(kind, 4 * part, pre, d->mask, post)
        EACH_KIND(r->activation, CALL)
#undef CALL
        for (int gate = 0; gate < 4; gate++) {
            const float *bias = d->bias ? d->bias + gate * d->out : NULL;
            const SparseProduct onto_out = {forth(&d->maps[gate]), bias, 0};
            multiply_step(&onto_out, r->lanes, post + gate * part, out + gate * out_part);
        }
    }
    sparse_cell(r, t);
    put_out(r->h + (t + 1) * state, r->size, r->lanes, r->batch, &r->out_h, t);
}

/* Steps 0 to T - 1. */
void NAME(forward_sparse)(const SparseRecurrence *r)
{
    const int64_t together = NAME(steps_together)(r->lanes);
    each_weight(r, take_values);
    take_in(&r->h0, 0, r->batch, r->size, r->lanes, r->h, 0);
    take_in(&r->c0, 0, r->batch, r->size, r->lanes, r->c, 0);
    for (int64_t t = 0; t < r->steps; t++) {
        if (t % together == 0) take_inputs(r, t, at_most_steps(r->steps - t, together));
        sparse_step(r, t);
    }
}

/* One step back, whose gradients of sums are the arrays' `kept`th; but for that of its input. */
static void sparse_step_back(const SparseRecurrence *r, int64_t t, int64_t kept)
{
    const int64_t state = r->size * r->lanes, z = r->rows * r->lanes;
    float *d_gate = r->d_gate + kept * r->d_gate_step;
    if (r->grad_h.at) take_in(&r->grad_h, t, r->batch, r->size, r->lanes, r->d_h, 1);
    if (r->grad_c.at) take_in(&r->grad_c, t, r->batch, r->size, r->lanes, r->d_c, 1);
    cell_row_backward(state, r->gate + t * 4 * state, r->tanh_c + t * state, r->c + t * state, NULL,
                      r->d_h, r->d_c, d_gate);
    for (int64_t layer = r->depth - 1; layer >= 0; layer--) {
        const SparseDense *d = &r->dense[layer];
        const int last = layer + 1 == r->depth;
        const int64_t part = d->width * r->lanes, out_part = d->out * r->lanes;
        const int64_t step = layer ? 4 * part : z;
        const float *from = last ? d_gate : r->dense[layer + 1].d_pre + kept * 4 * out_part;
        const float *pre = d->pre + t * step;
        float *d_pre = d->d_pre + kept * step;
        if (d->d_bias) add_to(d->bias_sums, from, 4 * out_part);
        for (int gate = 0; gate < 4; gate++) {
            const SparseProduct onto_pre = {back(&d->maps[gate]), NULL, 0};
            multiply_step(&onto_pre, r->lanes, from + gate * out_part, d_pre + gate * part);
        }
#define CALL(kind) deactivate(kind, 4 * part, pre, d->mask, d_pre)
        EACH_KIND(r->activation, CALL)
#undef CALL
    }
    const SparseProduct onto_h = {back(r->hh), NULL, 0};
    if (r->d_bias) add_to(r->bias_sums, r->d_z + kept * z, z);
    multiply_step(&onto_h, r->lanes, r->d_z + kept * z, r->d_h);
}

/* The gradients of the input of `steps` steps from t on, those of whose sums are kept. */
static void put_inputs_back(const SparseRecurrence *r, int64_t t, int64_t steps)
{
    const SparseProduct onto_x = {back(r->ih), NULL, 0};
    const int64_t x_step = r->inputs * r->lanes, z_step = r->rows * r->lanes;
    const int64_t together = NAME(steps_together)(r->lanes);
    for (int64_t first = 0; first < steps; first += together) {
        const int64_t count = at_most_steps(steps - first, together);
        const float *d_z = r->d_z + first * z_step;
        multiply_steps(&onto_x, count, r->lanes, d_z, z_step, r->d_x, x_step);
        for (int64_t i = 0; i < count; i++)
            put_out(r->d_x + i * x_step, r->inputs, r->lanes, r->batch, &r->d_in, t + first + i);
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

/* sum += over `steps` steps and all lanes d[row] * x[column], for every awake weight. */
static void sample(
    const SparseWeight *w, int64_t steps, int64_t lanes, const float *d, int64_t d_step,
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

/* The share that `steps` steps from t on have in the weights' gradients. */
static void sample_weights(const SparseRecurrence *r, int64_t t, int64_t steps)
{
    const int64_t state = r->size * r->lanes, z = r->rows * r->lanes, x = r->inputs * r->lanes;
    sample(r->ih, steps, r->lanes, r->d_z, z, r->x + t * x, x);
    sample(r->hh, steps, r->lanes, r->d_z, z, r->h + t * state, state);
    for (int64_t layer = 0; layer < r->depth; layer++) {
        const SparseDense *d = &r->dense[layer];
        const int last = layer + 1 == r->depth;
        const int64_t part = d->width * r->lanes, out_part = d->out * r->lanes;
        const float *from = last ? r->d_gate : r->dense[layer + 1].d_pre;
        const int64_t step = last ? r->d_gate_step : 4 * out_part;
        for (int gate = 0; gate < 4; gate++)
            sample(&d->maps[gate], steps, r->lanes, from + gate * out_part, step,
                   d->post + t * d->post_step + gate * part, d->post_step);
    }
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

/* Back from step T - 1 to 0. */
void NAME(backward_sparse)(const SparseRecurrence *r)
{
    const int64_t state = r->size * r->lanes;
    each_weight(r, take_transposed);
    clear(r->d_h, state);
    clear(r->d_c, state);
    if (r->d_bias) clear(r->bias_sums, r->rows * r->lanes);
    for (int64_t layer = 0; layer < r->depth; layer++)
        if (r->dense[layer].d_bias)
            clear(r->dense[layer].bias_sums, 4 * r->dense[layer].out * r->lanes);

    for (int64_t end = r->steps; end > 0; end -= r->block) {
        const int64_t first = end > r->block ? end - r->block : 0;
        for (int64_t t = end - 1; t >= first; t--) sparse_step_back(r, t, t - first);
        if (r->d_x) put_inputs_back(r, first, end - first);
        sample_weights(r, first, end - first);
    }

    each_weight(r, put_gradients);
    if (r->d_bias) sum_lanes(r->bias_sums, r->rows, r->lanes, r->d_bias);
    for (int64_t layer = 0; layer < r->depth; layer++) {
        const SparseDense *d = &r->dense[layer];
        if (d->d_bias) sum_lanes(d->bias_sums, 4 * d->out, r->lanes, d->d_bias);
    }
    put_out(r->d_h, r->size, r->lanes, r->batch, &r->d_h0, 0);
    put_out(r->d_c, r->size, r->lanes, r->batch, &r->d_c0, 0);
}
