/* What Python loads by ctypes: the kernels of every instruction set, and which of them run here.
   It is built like an extension module, but never imported as one. */

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#if defined(__x86_64__) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#include "has_tiles.h"
#endif

/* Tells whether there are kernels for tiles, this processor has them, and the system lets us use them:
   it keeps no room for their registers before it is asked to. */
int knows_tiles(void)
{
#if defined(HAS_TILES)
    enum { ASK = 0x1023, TILE_DATA = 18 };
    enum { OF_BFLOAT16 = 1 << 22, TILES = 1 << 24, OF_BYTES = 1 << 25 };
    unsigned a, b, c, d;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return 0;
    if (!(d & TILES) || !(d & OF_BFLOAT16) || !(d & OF_BYTES)) return 0;
    return syscall(SYS_arch_prctl, ASK, TILE_DATA) == 0;
#else
    return 0;
#endif
}

/* 0: portable, 1: AVX2, 2: AVX-512. The operating system's part (saving the registers) counts. */
int instruction_set(void)
{
#if defined(__x86_64__)
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq"))
        return 2;
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return 1;
#endif
    return 0;
}

static struct PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_native", NULL, -1, NULL,
                                        NULL, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit__native(void) { return PyModule_Create(&definition); }
