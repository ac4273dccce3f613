// The product of a batch's rows, which have yet to be divided by their root mean square, and a weight matrix, in bf16. The division
// commutes with the product. See rows_product.cuh.

// ---- what the host passes

struct Arguments {
    TensorMap u;           // [1, rows, k]
    TensorMap weights;     // [1, n, k]
    const float* squares;  // [rows, num_squares], whose sum is that of a row's squares
    u16* out;              // [rows, n], n a multiple of 8
    int rows, n, k, num_squares;
    float eps;
};

struct Shared {
    Rings rings;
    float scales[ROWS];
    u64 scaled;
};

static_assert(CLUSTER == 1 && sizeof(Shared) + 1024 <= SHARED_BYTES);
static_assert(ROWS * N_TILE * 2 <= sizeof(Rings::weight_tiles));

__device__ void compute(const Arguments& arguments, Shared& shared, int first, int output) {
    float sums[NUM_SUMS];
    multiply_rows(shared.rings, arguments.k, sums);
    add_groups(shared.rings, sums);
    if (threadIdx.x >= SUMMING) return;
    barrier_wait(&shared.scaled, 0);
    u16(*made)[N_TILE] = (u16(*)[N_TILE])shared.rings.weight_tiles;  // [ROWS]
    const int own = threadIdx.x / GROUP * 64 + first_row();
#pragma unroll
    for (int i = 0; i < NUM_SUMS / 2; i++) {
        const int row = own + 8 * (i % 2);
        *(u32*)&made[row][8 * (i / 2) + first_column()] = pack_bf16(sums[2 * i] * shared.scales[row], sums[2 * i + 1] * shared.scales[row]);
    }
    __syncwarp();
    constexpr int UNITS = N_TILE / 8;  // of 16 bytes
    for (int i = threadIdx.x % 32; i < 16 * UNITS; i += 32) {
        const int row = threadIdx.x / 32 * 16 + i / UNITS, column = output + i % UNITS * 8;
        if (first + row >= arguments.rows || column >= arguments.n) continue;
        *(uint4*)(arguments.out + (first + row) * arguments.n + column) = *(const uint4*)&made[row][column - output];
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, 1) project_in(const __grid_constant__ Arguments arguments) {
    Shared& shared = tiles_of_block<Shared>();
    start_next_kernel();
    const int warp = warp_index(), lane = threadIdx.x % 32;
    const int first = (int)blockIdx.x % ROW_BLOCKS * ROWS, output = (int)blockIdx.x / ROW_BLOCKS * N_TILE;
    if (warp == BRINGS_WEIGHTS && lane == 0) {
        shared.rings.init();
        barrier_init(&shared.scaled, 32 * HELPERS);
        barriers_ready();
    }
    __syncthreads();
    if (warp == BRINGS_WEIGHTS) {
        if (lane == 0) shared.rings.weights.bring(shared.rings.weight_tiles, arguments.weights, output, 0, arguments.k, PACE);
    } else if (warp == BRINGS_ROWS) {
        wait_for_earlier_kernels();
        if (lane == 0) shared.rings.rows.bring(shared.rings.row_tiles, arguments.u, first, 0, arguments.k);
    } else if (warp >= HELPS) {
        wait_for_earlier_kernels();
        const int row = (warp - HELPS) * ROWS / HELPERS;
        find_scales<ROWS / HELPERS>(
            shared.scales + row, arguments.squares, first + row, arguments.rows, arguments.num_squares, arguments.k, arguments.eps);
        barrier_arrive(&shared.scaled);
    } else {
        compute(arguments, shared, first, output);
    }
}
