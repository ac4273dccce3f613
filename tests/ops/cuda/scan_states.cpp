// scan_states.cu on a CPU, as a function of a shared library.

#include "warpgroup.h"

#include "scan.cuh"
#include "scan_states.cu"

extern "C" int emulate(const Arguments* arguments, int grid, unsigned seed) {
    return emulation::launch(grid, THREADS, sizeof(Shared) + 1024, seed, [=] { scan_states(*arguments); });
}
