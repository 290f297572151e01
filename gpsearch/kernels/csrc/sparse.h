/* The recurrence of training.h by the products of sparse_product.h. Arrays are feature-major,
   [time, feature, lane]; what comes from outside, or goes there, is turned step by step, while it is
   in the caches.

   Needs simd.h, training.h and sparse_product.h. */

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
    int64_t pre_step, post_step; /* from one step to the next */
    float *d_pre;             /* as pre, but of `block` steps */
    float *bias_sums;         /* [4 out, lane]: room */
    float *d_bias;            /* [4 out], or NULL */
} SparseDense;

/* The gradients of sums are kept for `block` steps at a time: from these, while they are in the
   caches, come those of the inputs and weights. */
typedef struct {
    int64_t steps, block, batch, lanes, size, inputs, activation, depth, rows, first;
    int64_t x_step, z_step, gate_step, h_step, tanh_step; /* from one step to the next */
    const SparseWeight *ih, *hh; /* rows x inputs, rows x size */
    const float *bias;           /* [rows], or NULL */
    const SparseDense *dense;
    float *x;                     /* [T, inputs, lane] */
    float *z;                     /* [T, rows, lane] */
    float *gate;                  /* [T, 4 size, lane] */
    float *h, *c;                 /* [T + 1, size, lane] */
    float *tanh_c;                /* [T, size, lane] */
    float *d_z;                   /* [block, rows, lane], as far apart as z's */
    float *d_gate;                /* [block, 4 size, lane]; behind d_z's first where direct */
    int64_t d_gate_step;          /* from one step of d_gate to the next */
    float *d_h, *d_c;             /* [size, lane]: room */
    float *d_x;                   /* [steps together, inputs, lane]: room, or NULL */
    float *bias_sums;             /* [rows, lane]: room */
    float *d_bias;                /* [rows], or NULL */
    Outside in, h0, c0, out_h, grad_h, grad_c, d_in, d_h0, d_c0;
} SparseRecurrence;

/* Takes a step of what lies outside into lanes [features, lane], or adds it to them. */
static void take_in(const Outside *o, int64_t t, int64_t batch, int64_t features, int64_t lanes,
                    float *to, int add)
{
    turn(o->at + t * o->step, o->row, batch, features, to, lanes, add);
    for (int64_t k = 0; !add && lanes > batch && k < features; k++)
        clear(to + k * lanes + batch, lanes - batch);
}

static void put_out(const float *from, int64_t features, int64_t lanes, int64_t batch,
                    const Outside *o, int64_t t)
{
    turn(from, lanes, features, batch, o->at + t * o->step, o->row, 0);
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
    float *gate = r->gate + t * r->gate_step;
    const float *direct =
        r->rows > r->first ? r->z + t * r->z_step + r->first * r->lanes : NULL;
    const float *last = r->c + t * part;
    float *c = r->c + (t + 1) * part, *h = r->h + (t + 1) * r->h_step;
    float *tanh_c = r->tanh_c + t * r->tanh_step;
    cell_row(r->depth > 0, direct, part, gate, last, c, tanh_c, h);
}

INLINE int64_t at_most_steps(int64_t steps, int64_t most) { return steps < most ? steps : most; }

/* Takes in the input of some steps, and puts its share of their sums into z. */
static void take_inputs(const SparseRecurrence *r, int64_t t, int64_t steps)
{
    const SparseProduct onto_z = {forth(r->ih), r->bias, 0};
    for (int64_t step = t; step < t + steps; step++)
        take_in(&r->in, step, r->batch, r->inputs, r->lanes, r->x + step * r->x_step, 0);
    multiply_steps(&onto_z, steps, r->lanes, r->x + t * r->x_step, r->x_step, r->z + t * r->z_step,
                   r->z_step);
}

static void sparse_step(const SparseRecurrence *r, int64_t t)
{
    const SparseProduct onto_z = {forth(r->hh), NULL, 1};
    multiply_step(&onto_z, r->lanes, r->h + t * r->h_step, r->z + t * r->z_step);
    for (int64_t layer = 0; layer < r->depth; layer++) {
        const SparseDense *d = &r->dense[layer];
        const int last = layer + 1 == r->depth;
        const int64_t part = d->width * r->lanes, out_part = d->out * r->lanes;
        float *out = last ? r->gate + t * r->gate_step : (d + 1)->pre + t * (d + 1)->pre_step;
        const float *pre = d->pre + t * d->pre_step;
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
    put_out(r->h + (t + 1) * r->h_step, r->size, r->lanes, r->batch, &r->out_h, t);
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
    const int64_t state = r->size * r->lanes;
    float *d_gate = r->d_gate + kept * r->d_gate_step;
    if (r->grad_h.at) take_in(&r->grad_h, t, r->batch, r->size, r->lanes, r->d_h, 1);
    if (r->grad_c.at) take_in(&r->grad_c, t, r->batch, r->size, r->lanes, r->d_c, 1);
    cell_row_backward(state, r->gate + t * r->gate_step, r->tanh_c + t * r->tanh_step,
                      r->c + t * state, NULL, r->d_h, r->d_c, d_gate);
    for (int64_t layer = r->depth - 1; layer >= 0; layer--) {
        const SparseDense *d = &r->dense[layer];
        const int last = layer + 1 == r->depth;
        const int64_t part = d->width * r->lanes, out_part = d->out * r->lanes;
        const float *from = last ? d_gate : (d + 1)->d_pre + kept * (d + 1)->pre_step;
        const float *pre = d->pre + t * d->pre_step;
        float *d_pre = d->d_pre + kept * d->pre_step;
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
    const float *d_z = r->d_z + kept * r->z_step;
    if (r->d_bias) add_to(r->bias_sums, d_z, r->rows * r->lanes);
    multiply_step(&onto_h, r->lanes, d_z, r->d_h);
}

/* The gradients of the input of `steps` steps from t on, those of whose sums are kept. */
static void put_inputs_back(const SparseRecurrence *r, int64_t t, int64_t steps)
{
    const SparseProduct onto_x = {back(r->ih), NULL, 0};
    const int64_t x_step = r->inputs * r->lanes;
    const int64_t together = NAME(steps_together)(r->lanes);
    for (int64_t first = 0; first < steps; first += together) {
        const int64_t count = at_most_steps(steps - first, together);
        const float *d_z = r->d_z + first * r->z_step;
        multiply_steps(&onto_x, count, r->lanes, d_z, r->z_step, r->d_x, x_step);
        for (int64_t i = 0; i < count; i++)
            put_out(r->d_x + i * x_step, r->inputs, r->lanes, r->batch, &r->d_in, t + first + i);
    }
}

/* The share that `steps` steps from t on have in the weights' gradients. */
static void sample_weights(const SparseRecurrence *r, int64_t t, int64_t steps)
{
    sample(r->ih, steps, r->lanes, r->d_z, r->z_step, r->x + t * r->x_step, r->x_step);
    sample(r->hh, steps, r->lanes, r->d_z, r->z_step, r->h + t * r->h_step, r->h_step);
    for (int64_t layer = 0; layer < r->depth; layer++) {
        const SparseDense *d = &r->dense[layer];
        const int last = layer + 1 == r->depth;
        const int64_t part = d->width * r->lanes, out_part = d->out * r->lanes;
        const float *from = last ? r->d_gate : (d + 1)->d_pre;
        const int64_t step = last ? r->d_gate_step : (d + 1)->pre_step;
        for (int gate = 0; gate < 4; gate++)
            sample(&d->maps[gate], steps, r->lanes, from + gate * out_part, step,
                   d->post + t * d->post_step + gate * part, d->post_step);
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
