/* The kernels for x86 processors with AVX-512 (F, VL, BW, DQ). */

#if defined(__x86_64__)
#include <immintrin.h>
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
/* A function's own target takes the place of the file's in clang, and comes on top of it in gcc. */
#define WITH_VNNI __attribute__((target("avx512f,avx512vl,avx512bw,avx512dq,avx2,fma,f16c,avx512vnni")))
#include "has_tiles.h"
#if defined(HAS_TILES)
#define WITH_TILES __attribute__((target("avx512f,avx512vl,avx512bw,avx512dq,avx2,fma,f16c,amx-tile,amx-bf16,amx-int8")))
#endif
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512vl,avx512bw,avx512dq,avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512vl,avx512bw,avx512dq,avx2,fma,f16c")
#endif
#define VW 16
#define NAME(function) function##_avx512
#include "kernels.h"
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
