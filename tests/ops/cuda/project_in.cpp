// project_in.cu on a CPU, as a function of a shared library.

#include "warpgroup.h"

#include "rows_product.cuh"
#include "project_in.cu"

extern "C" int emulate(const Arguments* arguments, int grid, unsigned seed) {
    return emulation::launch(grid, THREADS, sizeof(Shared) + 1024, seed, [=] { project_in(*arguments); });
}
