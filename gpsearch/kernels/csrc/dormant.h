/* Zeros where weights sleep. Needs simd.h. */

/* x where `awake` holds ones, and zeros where it holds zeros. */
INLINE vf only_awake(vf x, const uint8_t *awake)
{
#if VW == 16
    const __m128i bytes = _mm_loadu_si128((const __m128i *)awake);
    return (vf)_mm512_maskz_mov_ps(_mm_test_epi8_mask(bytes, bytes), (__m512)x);
#elif VW == 8
    const __m256i wide = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)awake));
    return (vf)_mm256_and_ps((__m256)x, (__m256)(-(vi)wide));
#else
    const vi wide = {-awake[0], -awake[1], -awake[2], -awake[3]};
    union { vf f; vi i; } only = {x};
    only.i &= wide;
    return only.f;
#endif
}

INLINE int differ(vf a, vf b)
{
    union { vf f; vi i; } left = {a}, right = {b};
    const vi x = left.i ^ right.i;
#if VW == 16
    return _mm512_test_epi32_mask((__m512i)x, (__m512i)x) != 0;
#elif VW == 8
    return !_mm256_testz_si256((__m256i)x, (__m256i)x);
#else
    return (x[0] | x[1] | x[2] | x[3]) != 0;
#endif
}

/* Writes only where something was not zero: weights that sleep from step to step are but read. */
void NAME(clear_dormant)(float *at, const uint8_t *awake, int64_t count)
{
    int64_t i = 0;
    for (; i + VW <= count; i += VW) {
        const vf x = load(at + i), only = only_awake(x, awake + i);
        if (differ(x, only)) store(at + i, only);
    }
    for (; i < count; i++)
        if (!awake[i]) at[i] = 0.0f;
}
