/* The kernels for any processor. */

#define VW 4
#define NAME(function) function##_portable
#include "kernels.h"
