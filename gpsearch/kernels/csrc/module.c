/* What Python loads by ctypes: the kernels of every instruction set, and which of them run here.
   It is built like an extension module, but never imported as one. */

#define PY_SSIZE_T_CLEAN
#include <Python.h>

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
