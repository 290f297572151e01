/* A stack of H-LSTM layers over a sequence, for inference: one call for all layers, directions and
   time steps. One thread, and nothing that outlives the call. Needs simd.h, product.h, training.h
   (its activations) and matrix.h.

   Within, the four gates' units (i, f, g, o) lie `stride` floats apart, from one gate to the next,
   and the floats in between are zero. */

#define FEWEST 3           /* steps for which it pays to multiply all inputs at once, */
#define FEWEST_FOR_TILES 8 /* and to multiply by tiles: weights come from the second cache then */

#if defined(WITH_TILES)
_Static_assert(LANES == BAND, "multiply_band_by_tiles takes as many steps as run_cell");
#endif

typedef struct {
    int64_t rows;           /* per gate; 0: there is no such map */
    const Matrix *input[4]; /* of one step's input */
    const Matrix *along[4]; /* of several steps' inputs: dense, or by rows */
    const Matrix *state[4];
} Front;

typedef struct {
    int64_t width, out;   /* per gate: of the hidden layer that it reads, and of what it makes */
    const Matrix *map[4];
    const float *bias;    /* [4, stride(out)]; zeros beside a direct path */
} Back;

typedef struct {
    int64_t inputs, size, activation;
    Front front[2];       /* onto the first hidden layer, and onto the gates directly */
    const float *bias;    /* of both fronts: a row of z */
    int64_t depth;        /* hidden layers; 0 is the LSTM */
    const Back *back;     /* [depth] */
} Cell;

typedef struct {
    float *x;    /* [inputs, LANES], or one step's */
    float *digits; /* bytes: [MOST_DIGITS, LANES, whole_tiles(inputs)] */
    float *sums; /* [rows, LANES]: of one gate */
    float *z;    /* [LANES, z_step(cell)]: what both fronts make */
    float *pre;  /* of the second hidden layer on, one after the other */
    float *gate; /* [4, stride(size)] */
    float *h, *c;
    int again; /* whether many steps follow one another */
} Room;

INLINE int64_t stride(int64_t width) { return (width + 15) / 16 * 16 + PAD; }

int64_t NAME(decode_stride)(int64_t width) { return stride(width); }

INLINE int64_t front_size(const Front *f) { return f->rows ? 4 * stride(f->rows) : 0; }

INLINE int64_t z_step(const Cell *c) { return front_size(&c->front[0]) + front_size(&c->front[1]); }

INLINE int in_digits(const Front *front) { return front->rows && front->along[0]->type == INT8; }

/* Parts `floats` into what the cell needs for so many steps, and returns how many that is; NULL
   only counts. */
static int64_t furnish(const Cell *cell, int64_t steps, float *floats, Room *room)
{
    const int64_t at_once = steps < LANES ? steps : LANES;
    room->again = steps >= FEWEST_FOR_TILES;
    const int64_t one = cell->front[0].rows, other = cell->front[1].rows;
    int64_t used = 0, pre = 0;
    for (int64_t j = 1; j < cell->depth; j++) pre += 4 * stride(cell->back[j].width);
#define TAKE(name, count) room->name = floats ? floats + used : NULL, used += (count)
    TAKE(x, (steps < FEWEST ? 1 : LANES) * stride(cell->inputs));
    const int bytes = steps >= FEWEST && (in_digits(&cell->front[0]) || in_digits(&cell->front[1]));
    TAKE(digits, bytes ? MOST_DIGITS * LANES * whole_tiles(cell->inputs) / 4 : 0);
    TAKE(sums, steps < FEWEST ? 0 : (one > other ? one : other) * LANES);
    TAKE(z, at_once * z_step(cell));
    TAKE(pre, pre);
    TAKE(gate, 4 * stride(cell->size));
    TAKE(h, stride(cell->size));
    TAKE(c, stride(cell->size));
#undef TAKE
    return used;
}

/* Takes steps into lanes; the lanes that are left over are zero. */
static void take_lanes(const Cell *cell, int64_t steps, const float *x, int64_t x_step, float *to)
{
    turn(x, x_step, steps, cell->inputs, to, LANES, 0);
    for (int64_t k = 0; steps < LANES && k < cell->inputs; k++)
        clear(to + k * LANES + steps, LANES - steps);
}

/* By weights of 8 bits: all steps at once in digits, or one by one where these do not suit. */
static void multiply_in_digits(
    const Cell *cell, const Front *front, int64_t steps, const float *x, int64_t x_step, float *z,
    const Room *room)
{
    InDigits digits[LANES];
    const int64_t next = whole_tiles(cell->inputs);
    const size_t size = (size_t)cell->inputs * sizeof(float);
    int all = 1;
    memset(room->x, 0, (size_t)stride(cell->inputs) * sizeof(float));
    for (int64_t t = 0; t < steps && all; t++) {
        memcpy(room->x, x + t * x_step, size);
        digits[t] = (InDigits){.lowest = (int8_t *)room->digits + t * next, .step = LANES * next};
        write_digits(room->x, cell->inputs, &digits[t]);
        all = digits[t].count > 0;
    }
    for (int gate = 0; all && gate < 4; gate++)
        multiply_all_digits(
            front->along[gate], steps, digits, next, room->again && front->along[gate]->tiles,
            z + gate * stride(front->rows), z_step(cell));
    for (int64_t t = 0; !all && t < steps; t++) {
        memcpy(room->x, x + t * x_step, size);
        multiply_each(
            4, front->along, room->x, 0, room->again, z + t * z_step(cell), stride(front->rows));
    }
}

static void multiply_inputs(const Cell *cell, int64_t steps, const float *x, int64_t x_step, Room *room)
{
    float nan[LANES];
    int64_t column = 0, turned = 0;
    for (int f = 0; f < 2; column += front_size(&cell->front[f++])) {
        const Front *front = &cell->front[f];
        if (in_digits(front)) {
            multiply_in_digits(cell, front, steps, x, x_step, room->z + column, room);
            continue;
        }
        for (int gate = 0; front->rows && gate < 4; gate++) {
            float *y = room->z + column + gate * stride(front->rows);
            const Matrix *m = front->along[gate];
            if (m->format == DENSE) {
                const Product by = {VALUES(m), NULL, m->rows, m->columns, 1};
                multiply(&by, steps, x, x_step, y, z_step(cell));
                continue;
            }
            if (!turned) {
                take_lanes(cell, steps, x, x_step, room->x);
                unrest_along(room->x, cell->inputs, nan);
                turned = 1;
            }
            multiply_along(m, room->x, nan, steps, room->sums);
            turn(room->sums, LANES, m->rows, steps, y, z_step(cell), 1);
        }
    }
}

/* Fills z for some steps with what does not depend on the state. */
static void begin(const Cell *cell, int64_t steps, const float *x, int64_t x_step, Room *room)
{
    for (int64_t t = 0; t < steps; t++)
        memcpy(room->z + t * z_step(cell), cell->bias, (size_t)z_step(cell) * sizeof(float));
    if (steps >= FEWEST) {
        multiply_inputs(cell, steps, x, x_step, room);
        return;
    }
    memset(room->x, 0, (size_t)stride(cell->inputs) * sizeof(float));
    for (int64_t t = 0; t < steps; t++) {
        float *z = room->z + t * z_step(cell);
        memcpy(room->x, x + t * x_step, (size_t)cell->inputs * sizeof(float));
        for (int f = 0; f < 2; z += front_size(&cell->front[f++]))
            if (cell->front[f].rows)
                multiply_each(4, cell->front[f].input, room->x, 0, 0, z, stride(cell->front[f].rows));
    }
}

/* An infinite input makes NaN of the zeros beyond a matrix's last row, which the next one would read. */
INLINE void clear_padding(int64_t width, float *z)
{
    memset(z + width, 0, (size_t)(stride(width) - width) * sizeof(float));
}

static void bend(int64_t activation, int64_t width, float *z)
{
    for (int64_t i = 0; i < 4 * stride(width); i += VW)
#define CALL(kind) store(z + i, activated(kind, load(z + i)))
        EACH_KIND(activation, CALL)
#undef CALL
    for (int gate = 0; gate < 4; gate++) clear_padding(width, z + gate * stride(width));
}

static void next_state(const Cell *cell, const float *gate, Room *room)
{
    const int64_t width = stride(cell->size);
    for (int64_t at = 0; at < width; at += VW) {
        const vf i = sigmoid(load(gate + at)), f = sigmoid(load(gate + width + at));
        const vf g = hyperbolic(load(gate + 2 * width + at));
        const vf o = sigmoid(load(gate + 3 * width + at));
        const vf c = f * load(room->c + at) + i * g;
        store(room->c + at, c);
        store(room->h + at, o * hyperbolic(c));
    }
    clear_padding(cell->size, room->h);
}

static void step(const Cell *cell, float *z, Room *room)
{
    float *const direct = z + front_size(&cell->front[0]), *gate = direct;
    for (int f = 0; f < 2; f++)
        if (cell->front[f].rows)
            multiply_each(4, cell->front[f].state, room->h, 0, room->again, f ? direct : z,
                          stride(cell->front[f].rows));
    float *from = z, *next = room->pre;
    for (int64_t j = 0; j < cell->depth; j++) {
        const Back *back = &cell->back[j];
        const int last = j + 1 == cell->depth, onto_direct = last && cell->front[1].rows;
        const int64_t out = stride(back->out);
        float *to = onto_direct ? direct : last ? room->gate : next;
        bend(cell->activation, back->width, from);
        if (!onto_direct) memcpy(to, back->bias, (size_t)(4 * out) * sizeof(float));
        multiply_each(4, back->map, from, stride(back->width), room->again, to, out);
        gate = from = to;
        next += 4 * out;
    }
    next_state(cell, gate, room);
}

/* Runs one direction of one layer; steps may go backwards. h and c are [size], in and out. */
static void run_cell(
    const Cell *cell, int64_t steps, const float *x, int64_t x_step, float *out, int64_t out_step,
    float *h, float *c, float *floats)
{
    Room room;
    const size_t size = (size_t)cell->size * sizeof(float);
    furnish(cell, steps, floats, &room);
    memset(room.h, 0, (size_t)stride(cell->size) * sizeof(float));
    memset(room.c, 0, (size_t)stride(cell->size) * sizeof(float));
    memcpy(room.h, h, size), memcpy(room.c, c, size);
    for (int64_t first = 0; first < steps; first += LANES) {
        const int64_t count = steps - first < LANES ? steps - first : LANES;
        begin(cell, count, x + first * x_step, x_step, &room);
        for (int64_t t = 0; t < count; t++) {
            step(cell, room.z + t * z_step(cell), &room);
            memcpy(out + (first + t) * out_step, room.h, size);
        }
    }
    memcpy(h, room.h, size), memcpy(c, room.c, size);
}

typedef struct {
    int64_t layers, directions;
    const Cell *cells; /* [layers, directions] */
    int64_t x_step, x_row, out_step, out_row; /* from a step, and from a sequence, to the next */
    int64_t batch;
    float *h, *c; /* [layers, directions, batch, size] */
} Stack;

/* Runs one sequence of a batch through all layers; `between` holds two layers' outputs. */
static void run_sequence(
    const Stack *s, int64_t row, int64_t steps, const float *x, float *out, float *between,
    float *floats)
{
    const int64_t size = s->cells[0].size, width = s->directions * size;
    int64_t x_step = s->x_step;
    for (int64_t layer = 0; layer < s->layers; layer++) {
        const int last = layer + 1 == s->layers;
        float *to = last ? out : between + (layer % 2) * steps * width;
        const int64_t to_step = last ? s->out_step : width;
        for (int64_t d = 0; d < s->directions; d++) {
            const int64_t at = layer * s->directions + d, state = (at * s->batch + row) * size;
            const int64_t from = d ? steps - 1 : 0, sign = d ? -1 : 1;
            run_cell(&s->cells[at], steps, x + from * x_step, sign * x_step,
                     to + from * to_step + d * size, sign * to_step, s->h + state, s->c + state,
                     floats);
        }
        x = to, x_step = to_step;
    }
}

/* Runs a batch of sequences, one after the other; lengths may be NULL: all are `steps` long.
   Outputs beyond a length are zeros. Returns -1 where memory is lacking, else 0. */
int64_t NAME(decode)(
    const Stack *s, int64_t steps, const int64_t *lengths, const float *x, float *out)
{
    const int64_t width = s->directions * s->cells[0].size;
    int64_t room = 0;
    for (int64_t i = 0; i < s->layers * s->directions; i++) {
        Room any;
        const int64_t needs = furnish(&s->cells[i], steps, NULL, &any);
        room = needs > room ? needs : room;
    }
    const int64_t between = s->layers > 1 ? 2 * steps * width : 0;
    void *const memory = malloc((size_t)(room + between) * sizeof(float) + LINE_BYTES);
    if (!memory) return -1;
    float *const floats = from_a_line(memory);
    for (int64_t row = 0; row < s->batch; row++, x += s->x_row, out += s->out_row) {
        const int64_t length = lengths ? lengths[row] : steps;
        run_sequence(s, row, length, x, out, floats + room, floats);
        for (int64_t t = length; t < steps; t++)
            memset(out + t * s->out_step, 0, (size_t)width * sizeof(float));
    }
    free(memory);
    return 0;
}

/* One step of a single cell for a batch: from h and c [batch, size] to the next ones. */
int64_t NAME(decode_step)(
    const Cell *cell, int64_t batch, const float *x, int64_t x_row, const float *h, const float *c,
    float *next_h, float *next_c)
{
    const size_t size = (size_t)(batch * cell->size) * sizeof(float);
    memcpy(next_h, h, size), memcpy(next_c, c, size);
    const Stack one = {1, 1, cell, 0, x_row, 0, cell->size, batch, next_h, next_c};
    return NAME(decode)(&one, 1, NULL, x, next_h);
}
