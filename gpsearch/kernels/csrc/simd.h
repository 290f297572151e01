/* Vectors of VW floats by the compiler's vector extensions: one source for every instruction set.

   A file that includes this one first chooses its instruction set, VW, and NAME, which gives the
   functions of each set names of their own. */

#include <stdint.h>
#include <string.h>

#define INLINE static inline __attribute__((always_inline))

typedef float vf __attribute__((vector_size(4 * VW)));
typedef int32_t vi __attribute__((vector_size(4 * VW)));
typedef float vf_anywhere __attribute__((vector_size(4 * VW), aligned(4), may_alias));

INLINE vf load(const float *from) { return *(const vf_anywhere *)from; }
INLINE void store(float *to, vf x) { *(vf_anywhere *)to = x; }
INLINE vf splat(float x) { return x - (vf){0}; } /* x + 0 would turn -0 into 0 */

INLINE vf load_some(const float *from, int64_t count)
{
    vf x = {0};
    memcpy(&x, from, (size_t)count * sizeof(float));
    return x;
}

INLINE void store_some(float *to, vf x, int64_t count)
{
    memcpy(to, &x, (size_t)count * sizeof(float));
}

#define LINE_BYTES 64 /* of a line of the cache */

/* The first line of some memory, or NULL of NULL. */
INLINE void *from_a_line(void *memory)
{
    return (void *)(((uintptr_t)memory + LINE_BYTES - 1) & ~(uintptr_t)(LINE_BYTES - 1));
}

/* Of no numbers, `at` may be NULL, with which memset must not be called. */
INLINE void clear(float *at, int64_t count)
{
    if (count) memset(at, 0, (size_t)count * sizeof(float));
}

/* Runs BODY(at, count) for all vectors of `size` floats; count is a constant but for the last. */
#define EACH_VECTOR(size, BODY)                                                                    \
    do {                                                                                           \
        int64_t at_ = 0;                                                                           \
        for (; at_ + VW <= (size); at_ += VW) BODY(at_, VW);                                       \
        if (at_ < (size)) BODY(at_, (size) - at_);                                                 \
    } while (0)

#define LOAD(from, count) ((count) == VW ? load(from) : load_some(from, count))
#define STORE(to, x, count) ((count) == VW ? store(to, x) : store_some(to, x, count))

INLINE vf choose(vi where, vf yes, vf no)
{
    union { vf f; vi i; } a = {yes}, b = {no}, c;
    c.i = (a.i & where) | (b.i & ~where);
    return c.f;
}

/* A NaN passes: it compares false, and of two of which one is NaN, x86 takes the second. */
#if VW == 16
INLINE vf at_most(vf x, float limit) { return (vf)_mm512_min_ps((__m512)splat(limit), (__m512)x); }
INLINE vf at_least(vf x, float limit) { return (vf)_mm512_max_ps((__m512)splat(limit), (__m512)x); }
#elif VW == 8
INLINE vf at_most(vf x, float limit) { return (vf)_mm256_min_ps((__m256)splat(limit), (__m256)x); }
INLINE vf at_least(vf x, float limit) { return (vf)_mm256_max_ps((__m256)splat(limit), (__m256)x); }
#else
INLINE vf at_most(vf x, float limit) { return choose(x > splat(limit), splat(limit), x); }
INLINE vf at_least(vf x, float limit) { return choose(x < splat(limit), splat(limit), x); }
#endif

/* e^x to 2 ulp for |x| <= 87, beyond that e^+-87; Cephes' polynomial. */
INLINE vf exponential(vf x)
{
    const vf magic = splat(12582912.0f); /* 1.5 * 2^23: adding it rounds to a whole number */
    union { vf f; vi i; } whole, power;
    x = at_least(at_most(x, 87.0f), -87.0f);
    whole.f = x * splat(1.44269504089f) + magic;
    vf n = whole.f - magic;
    vf r = x - n * splat(0.693359375f);
    r = r - n * splat(-2.12194440e-4f);
    vf p = splat(1.9875691500e-4f);
    p = p * r + splat(1.3981999507e-3f);
    p = p * r + splat(8.3334519073e-3f);
    p = p * r + splat(4.1665795894e-2f);
    p = p * r + splat(1.6666665459e-1f);
    p = p * r + splat(5.0000001201e-1f);
    p = p * r * r + r + splat(1.0f);
    power.i = (whole.i << 23) + (int32_t)0x3f800000; /* the magic number's own bits fall out */
    return p * power.f;
}

INLINE vf sigmoid(vf x) { return splat(1.0f) / (splat(1.0f) + exponential(-x)); }

/* tanh to 3 ulp: a rational function near 0, where 1 - 2 / (e^2x + 1) cancels. */
INLINE vf hyperbolic(vf x)
{
    x = at_least(at_most(x, 7.99881172180175781f), -7.99881172180175781f);
    vf s = x * x;
    vf p = splat(-2.76076847742355e-16f);
    p = p * s + splat(2.00018790482477e-13f);
    p = p * s + splat(-8.60467152213735e-11f);
    p = p * s + splat(5.12229709037114e-08f);
    p = p * s + splat(1.48572235717979e-05f);
    p = p * s + splat(6.37261928875436e-04f);
    p = p * s + splat(4.89352455891786e-03f);
    vf q = splat(1.19825839466702e-06f);
    q = q * s + splat(1.18534705686654e-04f);
    q = q * s + splat(2.26843463243900e-03f);
    q = q * s + splat(4.89352518554385e-03f);
    return x * p / q;
}

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
