// mix_rows.cu on a CPU, as a function of a shared library.

#include "emulation.h"

#include "channels.cuh"
#include "mixer.cuh"
#include "mix_rows.cu"

extern "C" int emulate(const Arguments* arguments, int grid, unsigned seed) {
    return emulation::launch(grid, THREADS, RING_BYTES + SHARED_BYTES, seed, [=] { mix_rows(*arguments); });
}
