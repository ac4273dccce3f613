// backbone_step.cu on a CPU, as a function of a shared library.

#include "emulation.h"

#include "channels.cuh"
#include "mixer.cuh"
#include "backbone_step.cu"

extern "C" int emulate(const Arguments* arguments, int grid, unsigned seed) {
    return emulation::launch(grid, THREADS, NUM_STAGES * STAGE_BYTES + SHARED_BYTES, seed, [=] { backbone_step(*arguments); });
}
