/* The recurrence of one direction of an H-LSTM layer, over all time steps of some rows of a batch:
   forward, and backward to the sums before every activation. Rows do not see one another, so
   threads take a slice each and never wait. All arrays are time-major, [time, batch, width]; the
   four gates (i, f, g, o) lie side by side in a row. Products that do not depend on the step
   before (of the inputs, and for the gradients of the weights) are the caller's.

   Needs simd.h, product.h and tiles.h. */

#include <math.h>
#include <stdlib.h>

enum { RELU, LEAKY_RELU, TANH, GELU };

typedef struct {
    int64_t width;        /* units of each gate's hidden layer that this map reads */
    int64_t out;          /* units of each gate that it writes */
    const float *packed;  /* the four gates' weights, for `forward`: out x width */
    const float *flipped; /* the same for `backward`: width x out */
    const float *tiles;   /* both as `pack_tiles` has them, or NULL */
    const float *flipped_tiles;
    const float *bias;    /* [4, out], or NULL */
    const float *mask;    /* [4, batch, width], scaled dropout of what it reads, or NULL */
    float *pre;           /* [T, B, 4 width (and more, see rows)], sums before the activation */
    float *post;          /* [T, B, 4 width], what the map reads; may take the place of pre's */
    int64_t post_step;    /* from one row of post to the next */
    float *d_pre;         /* as pre, backward, but for the step */
    int64_t d_pre_step;   /* from one row of d_pre to the next */
    float *d_bias;        /* [batch, 4 out], see Recurrence; or NULL */
} Dense;

typedef struct {
    int64_t steps, batch, size, activation;
    int64_t depth; /* hidden layers of a gate; 0 is the LSTM */
    int64_t rows;  /* of hh: the first hidden layer's, then those that lead to the gates directly */
    int64_t first; /* how many belong to the first hidden layer: 4 width, or 0 */
    int64_t terms; /* of a float, in what is packed in tiles */
    const float *hh, *hh_flipped; /* packed: rows x size, and size x rows */
    const float *hh_tiles, *hh_flipped_tiles; /* the same in tiles, or NULL */
    const float *bias;            /* [rows], or NULL */
    const Dense *dense;           /* [depth] */
    float *z;                     /* [T, B, rows]: products of the inputs, then all sums (or post) */
    float *gate;                  /* [T, B, 4 size]: i, f, g, o */
    float *h, *c;                 /* [T + 1, B, size], [0] is the initial state */
    float *tanh_c;                /* [T, B, size] */
    const float *grad_h, *grad_c; /* [T, B, size], or NULL: of the outputs */
    float *d_z;                   /* [T, B, rows] */
    float *d_gate;                /* [T, B, 4 size] gate sums; behind d_z's first where direct */
    int64_t d_z_step;             /* from one row of d_z to the next */
    int64_t d_gate_step;
    float *d_h, *d_c;             /* [B, size]: of the initial state */
    float *d_bias;                /* [B, rows], or NULL: a slice of the batch leaves the sums of
                                     its rows and all steps in its first row */
} Recurrence;

static const float SQRT_HALF = 0.70710678118654752f, INVERSE_SQRT_2_PI = 0.39894228040143268f;

static vf normal_below(vf x)
{
    for (int i = 0; i < VW; i++) x[i] = 0.5f * (1.0f + erff(x[i] * SQRT_HALF));
    return x;
}

INLINE vf activated(int64_t kind, vf x)
{
    switch (kind) {
        case RELU: return at_least(x, 0.0f);
        case LEAKY_RELU: return choose(x < splat(0.0f), x * splat(0.01f), x);
        case TANH: return hyperbolic(x);
        default: return x * normal_below(x);
    }
}

INLINE vf slope(int64_t kind, vf x)
{
    switch (kind) {
        case RELU: return choose(x > splat(0.0f), splat(1.0f), splat(0.0f));
        case LEAKY_RELU: return choose(x > splat(0.0f), splat(1.0f), splat(0.01f));
        case TANH: {
            const vf y = hyperbolic(x);
            return splat(1.0f) - y * y;
        }
        default: {
            const vf density = exponential(x * x * splat(-0.5f)) * splat(INVERSE_SQRT_2_PI);
            return normal_below(x) + x * density;
        }
    }
}

/* post = mask * activation(pre). */
INLINE void activate(int64_t kind, int64_t width, const float *pre, const float *mask, float *post)
{
#define BODY(at, count)                                                                            \
    do {                                                                                           \
        vf y = activated(kind, LOAD(pre + at, count));                                             \
        if (mask) y *= LOAD(mask + at, count);                                                     \
        STORE(post + at, y, count);                                                                \
    } while (0)
    EACH_VECTOR(width, BODY);
#undef BODY
}

/* d_pre = d_post * mask * slope(pre), where d_post stands in d_pre. Where post has taken the place of
   pre, its sign has to tell the slope (RELU, LEAKY_RELU; where the mask made it 0, so is d_pre). */
INLINE void deactivate(
    int64_t kind, int64_t width, const float *pre, const float *mask, float *d_pre)
{
#define BODY(at, count)                                                                            \
    do {                                                                                           \
        vf d = LOAD(d_pre + at, count) * slope(kind, LOAD(pre + at, count));                       \
        if (mask) d *= LOAD(mask + at, count);                                                     \
        STORE(d_pre + at, d, count);                                                               \
    } while (0)
    EACH_VECTOR(width, BODY);
#undef BODY
}

#define EACH_KIND(kind, CALL)                                                                      \
    switch (kind) {                                                                                \
        case RELU: CALL(RELU); break;                                                              \
        case LEAKY_RELU: CALL(LEAKY_RELU); break;                                                  \
        case TANH: CALL(TANH); break;                                                              \
        default: CALL(GELU); break;                                                                \
    }

INLINE int64_t pre_step(const Recurrence *r, int64_t layer)
{
    return layer == 0 ? r->rows : 4 * r->dense[layer].width;
}

INLINE const float *mask_of(const Recurrence *r, const Dense *d, int64_t gate, int64_t row)
{
    return d->mask ? d->mask + (gate * r->batch + row) * d->width : NULL;
}

static void activate_layer(const Recurrence *r, int64_t layer, int64_t t, int64_t a, int64_t b)
{
    const Dense *d = &r->dense[layer];
    for (int64_t row = a; row < b; row++) {
        const float *pre = d->pre + (t * r->batch + row) * pre_step(r, layer);
        float *post = d->post + (t * r->batch + row) * d->post_step;
        for (int64_t gate = 0; gate < 4; gate++) {
            const float *mask = mask_of(r, d, gate, row);
            const int64_t at = gate * d->width;
#define CALL(kind) activate(kind, d->width, pre + at, mask, post + at)
            EACH_KIND(r->activation, CALL)
#undef CALL
        }
    }
}

static void deactivate_layer(const Recurrence *r, int64_t layer, int64_t t, int64_t a, int64_t b)
{
    const Dense *d = &r->dense[layer];
    for (int64_t row = a; row < b; row++) {
        const int64_t at = t * r->batch + row;
        for (int64_t gate = 0; gate < 4; gate++) {
            const float *mask = mask_of(r, d, gate, row);
            const float *pre = d->pre + at * pre_step(r, layer) + gate * d->width;
            float *d_pre = d->d_pre + at * d->d_pre_step + gate * d->width;
#define CALL(kind) deactivate(kind, d->width, pre, mask, d_pre)
            EACH_KIND(r->activation, CALL)
#undef CALL
        }
    }
}

/* i, f, g, o and the new state of `size` units, whose four gates lie behind one another. The sums
   stand in gate, in direct (or NULL), or in both. */
INLINE void cell_row(
    int hidden, const float *direct, int64_t size, float *gate, const float *last, float *c,
    float *tanh_c, float *h)
{
#define SUM(number, at, count)                                                                     \
    ((hidden ? LOAD(gate + number * size + at, count) : splat(0.0f)) +                             \
     (direct ? LOAD(direct + number * size + at, count) : splat(0.0f)))
#define BODY(at, count)                                                                            \
    do {                                                                                           \
        const vf i = sigmoid(SUM(0, at, count)), f = sigmoid(SUM(1, at, count));                   \
        const vf g = hyperbolic(SUM(2, at, count)), o = sigmoid(SUM(3, at, count));                \
        const vf now = f * LOAD(last + at, count) + i * g, bent = hyperbolic(now);                 \
        STORE(gate + at, i, count);                                                                \
        STORE(gate + size + at, f, count);                                                         \
        STORE(gate + 2 * size + at, g, count);                                                     \
        STORE(gate + 3 * size + at, o, count);                                                     \
        STORE(c + at, now, count);                                                                 \
        STORE(tanh_c + at, bent, count);                                                           \
        STORE(h + at, o * bent, count);                                                            \
    } while (0)
    EACH_VECTOR(size, BODY);
#undef BODY
#undef SUM
}

/* From the gradients of h and c, those of the gates' sums and of the last c (in place of c's). */
INLINE void cell_row_backward(
    int64_t size, const float *gate, const float *tanh_c, const float *last, const float *grad_c,
    const float *d_h, float *d_c, float *d_gate)
{
    const vf one = splat(1.0f);
#define BODY(at, count)                                                                            \
    do {                                                                                           \
        const vf i = LOAD(gate + at, count), f = LOAD(gate + size + at, count);                    \
        const vf g = LOAD(gate + 2 * size + at, count), o = LOAD(gate + 3 * size + at, count);     \
        const vf bent = LOAD(tanh_c + at, count), dh = LOAD(d_h + at, count);                      \
        vf dc = LOAD(d_c + at, count) + dh * o * (one - bent * bent);                              \
        if (grad_c) dc += LOAD(grad_c + at, count);                                                \
        STORE(d_gate + at, dc * g * i * (one - i), count);                                         \
        STORE(d_gate + size + at, dc * LOAD(last + at, count) * f * (one - f), count);             \
        STORE(d_gate + 2 * size + at, dc * i * (one - g * g), count);                              \
        STORE(d_gate + 3 * size + at, dh * bent * o * (one - o), count);                           \
        STORE(d_c + at, dc * f, count);                                                            \
    } while (0)
    EACH_VECTOR(size, BODY);
#undef BODY
}

static void cell(const Recurrence *r, int64_t t, int64_t row)
{
    const int64_t at = t * r->batch + row, next = at + r->batch, size = r->size;
    const float *direct = r->rows > r->first ? r->z + at * r->rows + r->first : NULL;
    cell_row(
        r->depth > 0, direct, size, r->gate + at * 4 * size, r->c + at * size, r->c + next * size,
        r->tanh_c + at * size, r->h + next * size);
}

static void cell_backward(const Recurrence *r, int64_t t, int64_t row)
{
    const int64_t at = t * r->batch + row, size = r->size;
    cell_row_backward(
        size, r->gate + at * 4 * size, r->tanh_c + at * size, r->c + at * size,
        r->grad_c ? r->grad_c + at * size : NULL, r->d_h + row * size, r->d_c + row * size,
        r->d_gate + at * r->d_gate_step);
}

/* Steps 0 to T - 1 of rows a to b - 1. */
void NAME(forward)(const Recurrence *r, int64_t a, int64_t b)
{
    void *const memory = r->hh_tiles ? malloc((size_t)apply_room() + LINE_BYTES) : NULL;
    void *const room = from_a_line(memory);
    const Product onto_z = {r->hh, r->bias, r->rows, r->size, 1};
    for (int64_t t = 0; t < r->steps; t++) {
        const int64_t at = t * r->batch + a;
        apply(
            &onto_z, r->terms, r->hh_tiles, b - a, r->h + at * r->size, r->size, r->z + at * r->rows,
            r->rows, room);
        for (int64_t layer = 0; layer < r->depth; layer++) {
            const Dense *d = &r->dense[layer];
            const int last = layer + 1 == r->depth;
            float *out = (last ? r->gate : r->dense[layer + 1].pre) + at * 4 * d->out;
            const int64_t packed = NAME(packed_size)(d->out, d->width);
            const int64_t in_tiles = tiles_size(d->out, d->width, r->terms);
            activate_layer(r, layer, t, a, b);
            for (int64_t gate = 0; gate < 4; gate++) {
                const float *bias = d->bias ? d->bias + gate * d->out : NULL;
                const Product map = {d->packed + gate * packed, bias, d->out, d->width, 0};
                const float *from = d->post + at * d->post_step + gate * d->width;
                const float *tiles = d->tiles ? d->tiles + gate * in_tiles : NULL;
                apply(
                    &map, r->terms, tiles, b - a, from, d->post_step, out + gate * d->out, 4 * d->out,
                    room);
            }
        }
        for (int64_t row = a; row < b; row++) cell(r, t, row);
    }
    free(memory);
}

/* sums[width] += the sum of all rows of `from`. */
static void sum_rows(const float *from, int64_t step, int64_t rows, int64_t width, float *sums)
{
#define BODY(at, count)                                                                            \
    do {                                                                                           \
        vf sum = LOAD(from + at, count);                                                           \
        for (int64_t row = 1; row < rows; row++) sum += LOAD(from + row * step + at, count);       \
        STORE(sums + at, LOAD(sums + at, count) + sum, count);                                     \
    } while (0)
    EACH_VECTOR(width, BODY);
#undef BODY
}

/* Back from step T - 1 to 0; d_h and d_c begin as zeros and end as the initial state's gradients. */
void NAME(backward)(const Recurrence *r, int64_t a, int64_t b)
{
    void *const memory = r->hh_flipped_tiles ? malloc((size_t)apply_room() + LINE_BYTES) : NULL;
    void *const room = from_a_line(memory);
    const Product onto_h = {r->hh_flipped, NULL, r->size, r->rows, 0};
    if (r->d_bias) clear(r->d_bias + a * r->rows, r->rows);
    for (int64_t layer = 0; layer < r->depth; layer++) {
        const int64_t width = 4 * r->dense[layer].out;
        if (r->dense[layer].d_bias) clear(r->dense[layer].d_bias + a * width, width);
    }
    for (int64_t t = r->steps - 1; t >= 0; t--) {
        const int64_t at = t * r->batch + a;
        if (r->grad_h) {
            const float *grad = r->grad_h + at * r->size;
            for (int64_t i = 0; i < (b - a) * r->size; i++) r->d_h[a * r->size + i] += grad[i];
        }
        for (int64_t row = a; row < b; row++) cell_backward(r, t, row);
        for (int64_t layer = r->depth - 1; layer >= 0; layer--) {
            const Dense *d = &r->dense[layer];
            const int last = layer + 1 == r->depth;
            const int64_t from_step = last ? r->d_gate_step : d[1].d_pre_step;
            const float *from = (last ? r->d_gate : d[1].d_pre) + at * from_step;
            const int64_t packed = NAME(packed_size)(d->width, d->out);
            const int64_t in_tiles = tiles_size(d->width, d->out, r->terms);
            if (d->d_bias)
                sum_rows(from, from_step, b - a, 4 * d->out, d->d_bias + a * 4 * d->out);
            for (int64_t gate = 0; gate < 4; gate++) {
                const Product map = {d->flipped + gate * packed, NULL, d->width, d->out, 0};
                float *to = d->d_pre + at * d->d_pre_step + gate * d->width;
                const float *tiles = d->flipped_tiles ? d->flipped_tiles + gate * in_tiles : NULL;
                apply(
                    &map, r->terms, tiles, b - a, from + gate * d->out, from_step, to, d->d_pre_step,
                    room);
            }
            deactivate_layer(r, layer, t, a, b);
        }
        const float *d_z = r->d_z + at * r->d_z_step;
        if (r->d_bias) sum_rows(d_z, r->d_z_step, b - a, r->rows, r->d_bias + a * r->rows);
        apply(
            &onto_h, r->terms, r->hh_flipped_tiles, b - a, d_z, r->d_z_step, r->d_h + a * r->size,
            r->size, room);
    }
    free(memory);
}
