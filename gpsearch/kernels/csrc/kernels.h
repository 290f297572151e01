/* All kernels, once for the instruction set that the including file chose. */

#include "simd.h"
#include "product.h"
#include "tiles.h"
#include "training.h"
#include "sparse_product.h"
#include "sparse.h"
#include "dormant.h"
#include "pack.h"
#include "narrow.h"
#include "digits.h"
#include "matrix.h"
#include "decode.h"
