/* Weight matrices packed for products with one vector, y += W x, each in the format that its zeros
   call for: how they are packed; matrix.h multiplies by them. Needs simd.h, product.h and tiles.h.

   A packed matrix is one block of memory, aligned to 64 bytes: the header, then the arrays that it
   points to. But for the dense format, rows come in groups of some height and a group takes as many
   steps as it needs; a step holds some values and their places.

     ROWS     1 row; a step is one non-zero with its column (CSR).
     SELL     16 rows; a step has one non-zero of each, with its column: x is gathered.
     WINDOWS, WINDOWS2, WINDOWS4   VW, 2 VW or 4 VW rows; a step looks at WINDOW consecutive entries
              of x, from its first column on, and each row takes from them its next non-zero if it
              is among them. A permutation within registers stands in for the gather; each value
              itself says which lane it wants, in its lowest bits, which costs it at most 2^-19 of
              its size. More rows need more steps, but a window is read once for them all.
     B16X1, B8X1   16 or 8 rows; a step has one column of them, with at least one non-zero.
     B4X4     4 rows; a step has four columns of them.

   Values are stored as one of three types: FLOAT32, BFLOAT16, or INT8, where a row's values are whole
   numbers times the row's scale. A type holds a matrix exactly, or the matrix is not packed so. In
   windows, INT8 takes 16 bits, of which the lower 8 are the lane. In DENSE, two columns of BFLOAT16 lie
   together, row by row within a panel, and with AVX-512 four of INT8.

   Rows of SELL and windows are sorted by their number of non-zeros, so that a group's are alike,
   where that saves more than it takes to add sums to y one by one. Groups are sorted by their number
   of steps: the processor foresees the end of a loop that is as long as the one before. Vectors are
   longer than they need to be: x and y go on to a multiple of 16 floats, then for PAD more, which in
   x are zero, so that every step is made of whole vectors. */

#include <stdlib.h>

enum { DENSE, ROWS, SELL, WINDOWS, WINDOWS2, WINDOWS4, B16X1, B8X1, B4X4 };
enum { FLOAT32, BFLOAT16, INT8 };

enum { BYTES_ALONG = 64 }; /* columns of a tile of bytes */

#define PAD 16
#define MOST_COLUMNS 65535 /* a column is 16 bits wide */
#define WINDOW (VW == 16 ? 32 : VW)      /* AVX-512 permutes two registers as fast as one, */
#define WINDOW_AT (VW == 16 ? 16 : 1)    /* and loads are slow across the lines of its cache */
#define TALLEST (4 * VW)                 /* rows of a group, at the most */

/* Bytes: weights come from memory that is farther away than the processor's own foresight reaches. */
#define AHEAD 1024

typedef struct {
    int64_t format, type, rows, columns, groups;
    /* In bytes from the header on: of all steps, of all groups, and of all their rows; order is 0
       where these follow one another, scales where there are none. */
    int64_t values, places, starts, heads, order, scales;
    int64_t tiles; /* 1: of DENSE in INT8, which is multiplied by tiles; see digits.h */
} Matrix;

/* The arrays of a packed matrix; of each group the steps, first to last - 1, and its first row. */
#define VALUES(m) ((const float *)((const char *)(m) + (m)->values))
#define SCALES(m) ((const float *)((const char *)(m) + (m)->scales))
#define PLACES(m, type) ((const type *)((const char *)(m) + (m)->places))
#define STARTS(m) ((const int32_t *)((const char *)(m) + (m)->starts))
#define HEADS(m) ((const int32_t *)((const char *)(m) + (m)->heads))
#define ORDER(m) ((const int32_t *)((const char *)(m) + (m)->order))
#define EACH_GROUP(m)                                                                              \
    for (int64_t g = 0, first, last, row;                                                          \
         g < (m)->groups && (first = STARTS(m)[g], last = STARTS(m)[g + 1], row = HEADS(m)[g], 1); \
         g++)

typedef struct {
    int height, values, place_bytes;
    int scattered_per_step; /* rows' sums added one by one in the time of a step; 0: never sorted */
} Shape;

typedef struct {
    const float *w; /* row-major; whole numbers where there are scales */
    int64_t rows, columns;
    const float *scales; /* of the rows, or NULL */
} Source;

static Shape shape_of(int64_t format)
{
    switch (format) {
        case ROWS: return (Shape){1, 1, 2, 0};
        case SELL: return (Shape){16, 16, 32, 16};
        case WINDOWS: return (Shape){VW, VW, 2, 3};
        case WINDOWS2: return (Shape){2 * VW, 2 * VW, 2, 4};
        case WINDOWS4: return (Shape){4 * VW, 4 * VW, 2, 6};
        case B16X1: return (Shape){16, 16, 2, 0};
        case B8X1: return (Shape){8, 8, 2, 0};
        default: return (Shape){4, 16, 2, 0};
    }
}

/* Steps of windows that are taken together: enough for sums in four vectors, or more. */
INLINE int steps_at_once(const int tall) { return tall == 1 ? 4 : 2; }

INLINE int in_windows(int64_t format) { return format >= WINDOWS && format <= WINDOWS4; }

/* Columns of a dense matrix that lie together, and the number of columns, rounded up by such of zeros. */
INLINE int64_t together(const Matrix *m)
{
    if (m->format != DENSE || m->type == FLOAT32) return 1;
    return m->type == BFLOAT16 ? 2 : VW == 16 ? 4 : 1;
}

INLINE int64_t padded_columns(const Matrix *m)
{
    return together(m) > 1 ? (m->columns + 7) / 8 * 8 : m->columns;
}

/* Types */

INLINE int64_t bytes_of(int64_t type) { return type == FLOAT32 ? 4 : type == BFLOAT16 ? 2 : 1; }

/* Whether a lane in the lowest bits of a value is no matter: not where it is denormal or no number. */
static int has_room(float x)
{
    const float size = x < 0.0f ? -x : x;
    return size == 0.0f || (size > 1e-30f && size < 1e38f);
}

/* The number nearest to x of those whose lowest bits are the lane. */
static float with_lane(float x, int32_t lane)
{
    int32_t bits;
    memcpy(&bits, &x, 4);
    const int32_t too_many = (bits - lane + WINDOW / 2) & (WINDOW - 1);
    bits -= too_many - WINDOW / 2;
    memcpy(&x, &bits, 4);
    return x;
}

/* Finds the scale of a row that makes its values whole numbers within 127, and these; 0: none. */
static int whole_numbers(const float *w, int64_t columns, float *scale, float *whole)
{
    float most = 0.0f;
    for (int64_t k = 0; k < columns; k++) {
        const float size = w[k] < 0.0f ? -w[k] : w[k];
        most = size > most ? size : most;
    }
    *scale = most / 127.0f;
    for (int64_t k = 0; k < columns; k++) {
        const float times = most > 0.0f ? w[k] / *scale : 0.0f;
        if (!(times > -127.5f && times < 127.5f)) return 0;
        whole[k] = (float)(int32_t)(times + (times < 0.0f ? -0.5f : 0.5f));
        if (whole[k] * *scale != w[k]) return 0;
    }
    return 1;
}

/* Tells whether a type holds all values exactly; for INT8, writes what stands in for them. */
static int holds(int64_t type, const Source *s, float *scales, float *whole)
{
    const int64_t n = s->columns;
    for (int64_t row = 0; type == INT8 && row < s->rows; row++)
        if (!whole_numbers(s->w + row * n, n, scales + row, whole + row * n)) return 0;
    for (int64_t i = 0; type == BFLOAT16 && i < s->rows * n; i++) {
        uint32_t bits;
        memcpy(&bits, s->w + i, 4);
        if (bits & 0xffff) return 0;
    }
    return 1;
}

static void write_value(const Matrix *m, float value, int64_t at, char *to)
{
    uint32_t bits;
    memcpy(&bits, &value, 4);
    if (m->type == BFLOAT16) ((uint16_t *)to)[at] = (uint16_t)(bits >> 16);
    else if (in_windows(m->format)) ((int16_t *)to)[at] = (int16_t)value; /* and the lane */
    else ((int8_t *)to)[at] = (int8_t)value;
}

static void write_narrow(const Matrix *m, const float *values, int64_t count, char *to)
{
    const int64_t many = together(m), columns = m->columns;
    if (many > 1) memset(to, 0, (size_t)(panels(m->rows) * PANEL * padded_columns(m) * bytes_of(m->type)));
    for (int64_t i = 0; i < count; i++) {
        int64_t at = i;
        if (many > 1) {
            const int64_t lane = i % PANEL, k = i / PANEL % columns, panel = i / PANEL / columns;
            at = (panel * padded_columns(m) + k / many * many) * PANEL + lane * many + k % many;
        }
        write_value(m, values[i], at, to);
    }
}

/* Packing */

static int64_t next_nonzero(const Source *s, int64_t row, int64_t column)
{
    if (row >= s->rows) return s->columns;
    while (column < s->columns && s->w[row * s->columns + column] == 0.0f) column++;
    return column;
}

INLINE float element(const Source *s, int64_t row, int64_t column)
{
    return row < s->rows && column < s->columns ? s->w[row * s->columns + column] : 0.0f;
}

/* Each of these writes the steps of a group and returns their number; without values, only that.
   `rows` are the group's, or beyond the matrix's where it has fewer. */

static int64_t write_nonzeros(const Source *s, const int32_t *rows, int height, float *values,
                              uint16_t *places)
{
    int64_t at[16], steps = 0, live = 1;
    for (int i = 0; i < height; i++) at[i] = next_nonzero(s, rows[i], 0);
    for (;; steps++) {
        live = 0;
        for (int i = 0; i < height; i++) live |= at[i] < s->columns;
        if (!live) return steps;
        for (int i = 0; i < height; i++) {
            const int there = at[i] < s->columns;
            if (values) {
                values[steps * height + i] = element(s, rows[i], at[i]);
                places[steps * height + i] = there ? (uint16_t)at[i] : 0;
            }
            if (there) at[i] = next_nonzero(s, rows[i], at[i] + 1);
        }
    }
}

/* Rounded up to as many steps as are taken together. */
static int64_t write_windows(const Source *s, const int32_t *rows, int height, float *values,
                             uint16_t *places)
{
    int64_t at[TALLEST], steps = 0;
    for (int i = 0; i < height; i++) at[i] = next_nonzero(s, rows[i], 0);
    for (;; steps++) {
        int64_t first = s->columns;
        for (int i = 0; i < height; i++) first = at[i] < first ? at[i] : first;
        if (first == s->columns && steps % steps_at_once(height / VW) == 0) return steps;
        const uint16_t start = first == s->columns ? 0 : (uint16_t)(first / WINDOW_AT * WINDOW_AT);
        if (values) places[steps] = start;
        for (int i = 0; i < height; i++) {
            const int inside = at[i] < s->columns && at[i] < start + WINDOW;
            const int32_t lane = inside ? (int32_t)(at[i] - start) : 0;
            const float x = inside ? element(s, rows[i], at[i]) : 0.0f;
            if (values && s->scales) values[steps * height + i] = 256.0f * x + (float)lane;
            else if (values) values[steps * height + i] = inside ? with_lane(x, lane) : 0.0f;
            if (inside) at[i] = next_nonzero(s, rows[i], at[i] + 1);
        }
    }
}

static int64_t write_blocks(const Source *s, const int32_t *rows, int height, int width,
                            float *values, uint16_t *places)
{
    int64_t steps = 0;
    for (int64_t column = 0; column < s->columns; column += width) {
        int live = 0;
        for (int i = 0; i < height; i++)
            for (int j = 0; j < width; j++) live |= element(s, rows[i], column + j) != 0.0f;
        if (!live) continue;
        if (values) {
            places[steps] = (uint16_t)(column / width);
            for (int i = 0; i < height; i++)
                for (int j = 0; j < width; j++)
                    values[(steps * height + i) * width + j] = element(s, rows[i], column + j);
        }
        steps++;
    }
    return steps;
}

static int64_t write_group(int64_t format, const Source *s, const int32_t *rows, float *values,
                           void *places)
{
    const Shape shape = shape_of(format);
    switch (format) {
        case ROWS:
        case SELL: return write_nonzeros(s, rows, shape.height, values, places);
        case WINDOWS:
        case WINDOWS2:
        case WINDOWS4: return write_windows(s, rows, shape.height, values, places);
        case B4X4: return write_blocks(s, rows, 4, 4, values, places);
        default: return write_blocks(s, rows, shape.height, 1, values, places);
    }
}

static int smaller_first(const void *one, const void *other)
{
    const int64_t a = *(const int64_t *)one, b = *(const int64_t *)other;
    return (a > b) - (a < b);
}

/* How a matrix will be packed; orders are keys whose lower half is a row's or a group's number. */
typedef struct {
    int64_t steps;
    int64_t *order;  /* of the rows, filled up to whole groups by ones that the matrix lacks */
    int64_t *groups; /* and of the groups */
} Plan;

INLINE int32_t number(int64_t key) { return (int32_t)(key & INT32_MAX); }

static void rows_of(const Plan *p, int64_t group, int height, int32_t *rows)
{
    for (int i = 0; i < height; i++) rows[i] = number(p->order[group * height + i]);
}

/* Plans with rows as they are, or sorted; a plan without order could get no memory. */
static Plan planned(int64_t format, const Source *s, int64_t groups, int sorted)
{
    const int height = shape_of(format).height;
    const size_t lanes = (size_t)(groups * height);
    Plan p = {0, malloc((lanes + (size_t)groups + 1) * sizeof(int64_t)), NULL};
    if (!p.order) return p;
    p.groups = p.order + lanes;
    for (int64_t row = 0; row < groups * height; row++) {
        p.order[row] = row < s->rows ? row : s->rows;
        for (int64_t k = 0; sorted && row < s->rows && k < s->columns; k++)
            p.order[row] += (int64_t)(element(s, row, k) == 0.0f) << 32;
    }
    if (sorted) qsort(p.order, (size_t)s->rows, sizeof *p.order, smaller_first);
    for (int64_t g = 0; g < groups; g++) {
        int32_t rows[TALLEST];
        rows_of(&p, g, height, rows);
        const int64_t steps = write_group(format, s, rows, NULL, NULL);
        p.groups[g] = ((INT32_MAX - steps) << 32) + g;
        p.steps += steps;
    }
    qsort(p.groups, (size_t)groups, sizeof *p.groups, smaller_first);
    return p;
}

INLINE int64_t whole_lines(int64_t bytes) { return (bytes + 63) / 64 * 64; }

/* Places the arrays of a matrix one after the other, and returns the bytes that it takes. */
static int64_t place(Matrix *m, int64_t values, int64_t steps, int64_t lanes, int sorted)
{
    const Shape shape = shape_of(m->format);
    m->values = whole_lines(sizeof(Matrix));
    const int64_t lane_too = in_windows(m->format) && m->type == INT8;
    if (together(m) > 1) values = lanes * padded_columns(m);
    /* The last tile of the last panel may reach beyond it. */
    const int64_t too_few = m->tiles ? padded_columns(m) % BYTES_ALONG : 0;
    const int64_t beyond = too_few ? (BYTES_ALONG - too_few) * PANEL : 0;
    m->scales = m->values + whole_lines(values * (bytes_of(m->type) + lane_too) + beyond);
    m->places = m->scales + (m->type == INT8 ? whole_lines(4 * lanes) : 0);
    m->starts = m->places + whole_lines(steps * shape.place_bytes);
    m->heads = m->starts + (m->groups ? whole_lines(4 * (m->groups + 1)) : 0);
    m->order = m->heads + whole_lines(4 * m->groups);
    const int64_t size = m->order + (sorted ? whole_lines(4 * lanes) : 0);
    if (!sorted) m->order = 0;
    if (m->type != INT8) m->scales = 0;
    return size;
}

/* Writes what `place` made room for; a dense matrix has no plan. */
static void write_matrix(const Matrix *m, const Source *s, const Plan *p, float *values, char *to)
{
    const Shape shape = shape_of(m->format);
    int32_t *starts = (int32_t *)(to + m->starts), *heads = (int32_t *)(to + m->heads), rows[TALLEST];
    memcpy(to, m, sizeof *m);
    if (!p) NAME(pack)(s->w, s->columns, 1, s->rows, s->columns, values);
    else starts[0] = 0;
    for (int64_t g = 0; g < m->groups; g++) {
        heads[g] = number(p->groups[g]) * shape.height;
        rows_of(p, number(p->groups[g]), shape.height, rows);
        starts[g + 1] = starts[g] + (int32_t)write_group(
            m->format, s, rows, values + (int64_t)starts[g] * shape.values,
            to + m->places + (int64_t)starts[g] * shape.place_bytes);
    }
    const int64_t lanes = p ? m->groups * shape.height : panels(m->rows) * PANEL;
    for (int64_t i = 0; i < lanes; i++) {
        const int64_t row = m->order ? number(p->order[i]) : i;
        if (m->order) ((int32_t *)(to + m->order))[i] = (int32_t)row;
        const float shift = in_windows(m->format) ? 256.0f : 1.0f; /* of the lanes' bits */
        if (m->scales) ((float *)(to + m->scales))[i] = row < s->rows ? s->scales[row] / shift : 0.0f;
    }
}

static int64_t pack_planned(Matrix *m, const Source *s, const Plan *p, int sorted, char *to)
{
    const Shape shape = shape_of(m->format);
    const int64_t lanes = p ? m->groups * shape.height : panels(m->rows) * PANEL;
    const int64_t count = p ? p->steps * shape.values : lanes * m->columns;
    if (p && p->steps >= INT32_MAX) return -1;
    const int64_t size = place(m, count, p ? p->steps : 0, lanes, sorted);
    if (!to) return size;
    float *const values =
        m->type == FLOAT32 ? (float *)(to + m->values) : malloc((size_t)count * sizeof(float) + 1);
    if (!values) return -1;
    write_matrix(m, s, p, values, to);
    if (m->type == FLOAT32) return size;
    write_narrow(m, values, count, to + m->values);
    free(values);
    return size;
}

static int64_t pack_source(Matrix *m, const Source *s, char *to)
{
    if (m->format == DENSE) return pack_planned(m, s, NULL, 0, to);
    if (m->type != FLOAT32 && (m->format == ROWS || m->format == B8X1)) return -1;
    if (m->type == BFLOAT16 && in_windows(m->format)) return -1;
    for (int64_t i = 0; in_windows(m->format) && i < m->rows * m->columns; i++)
        if (!has_room(s->w[i])) return -1;
    for (int64_t row = 0; in_windows(m->format) && s->scales && row < m->rows; row++)
        if (!has_room(s->scales[row])) return -1;
    if (m->columns > MOST_COLUMNS || m->rows >= INT32_MAX - PAD) return -1;
    const Shape shape = shape_of(m->format);
    m->groups = (m->rows + shape.height - 1) / shape.height;
    Plan plain = planned(m->format, s, m->groups, 0), sorted = {0, NULL, NULL};
    if (shape.scattered_per_step) sorted = planned(m->format, s, m->groups, 1);
    const int sort = sorted.order && (plain.steps - sorted.steps) * shape.scattered_per_step > m->rows;
    const int64_t size = plain.order ? pack_planned(m, s, sort ? &sorted : &plain, sort, to) : -1;
    free(plain.order), free(sorted.order);
    return size;
}

/* Packs w [rows, columns] into `to`, and returns the bytes that it takes; without `to`, only that.
   With `tiles`, what fills tiles well enough will be multiplied by them; it is for processors that have
   them. -1: the format cannot hold so many columns or non-zeros, or the type these values, or memory is
   lacking. */
int64_t NAME(pack_matrix)(
    int64_t format, int64_t type, const float *w, int64_t rows, int64_t columns, int64_t tiles, void *to)
{
    Matrix m = {.format = format, .type = type, .rows = rows, .columns = columns};
    const int filled = rows >= 2 * PANEL && columns >= BYTES_ALONG;
    m.tiles = KNOWS_TILES && tiles && filled && format == DENSE && type == INT8;
    Source s = {w, rows, columns, NULL};
    if (type == FLOAT32) return pack_source(&m, &s, to);
    float *const scales = malloc((size_t)(rows * (columns + 1)) * sizeof(float) + 1);
    if (!scales) return -1;
    int64_t size = -1;
    if (holds(type, &s, scales, scales + rows)) {
        if (type == INT8) s.w = scales + rows, s.scales = scales;
        size = pack_source(&m, &s, to);
    }
    free(scales);
    return size;
}
