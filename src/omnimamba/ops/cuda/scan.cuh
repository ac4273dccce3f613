// What the kernels of the scan have in common. The including code defines D_STATE (64 or 128).

constexpr int Q = 64, HEADDIM = 64;   // positions of a chunk, channels of a head
constexpr int WARPS = GROUP / 32;     // of a warpgroup
constexpr int BOXES = D_STATE / 64;   // of B, C and a state
constexpr int COLUMNS = D_STATE / 8;  // eights of them

// Where a matrix of two positions has one side of its diagonal only, warps would have from one to four times as much to do. So the rows of
// some tiles are dealt to them, eight positions from the chunk's start and eight from its end for each.
__device__ __forceinline__ int dealt_eight(int eight) { return eight % 2 ? 7 - eight / 2 : eight / 2; }

__device__ __forceinline__ int dealt(int row) { return 8 * dealt_eight(row / 8) + row % 8; }

// The position of a lane's first or second row.
__device__ __forceinline__ int dealt_row(int half) {
    const int warp = threadIdx.x % GROUP / 32;
    return 8 * (half ? 7 - warp : warp) + threadIdx.x % 32 / 4;
}

// A tile in this order, of a tensor in boxes of eight positions.
__device__ __forceinline__ void dealt_copy(char* to, const TensorMap& from, int column, int position, int batch, u64* barrier) {
    for (int i = 0; i < 8; i++) box_copy(to + 8 * i * ROW, from, column, position + 8 * dealt_eight(i), batch, barrier);
}

// A state [p, n], or a gradient [q, n], as a product's sums.
typedef float State[4 * COLUMNS];

// Calls use(number of the state, its place in [p, n]) for each two neighbours that the lane has.
template <typename Use>
__device__ __forceinline__ void each_pair(Use use) {
#pragma unroll
    for (int i = 0; i < COLUMNS; i++) {
#pragma unroll
        for (int half = 0; half < 2; half++) use(4 * i + 2 * half, (first_row() + 8 * half) * D_STATE + 8 * i + first_column());
    }
}

// The state in bf16, for a product.
__device__ __forceinline__ void put_state(const State& state, char* to) {
    const int lane = threadIdx.x % 32, row = threadIdx.x % GROUP / 32 * 16 + lane % 16;
#pragma unroll
    for (int i = 0; i < COLUMNS; i += 2) {
        const u32 matrices[4] = {pack_bf16(state[4 * i], state[4 * i + 1]), pack_bf16(state[4 * i + 2], state[4 * i + 3]),
                                 pack_bf16(state[4 * i + 4], state[4 * i + 5]), pack_bf16(state[4 * i + 6], state[4 * i + 7])};
        const int column = i + lane / 16;
        store_matrices(to + column / 8 * BOX + swizzled(row, column % 8), matrices);
    }
}

// Where a lane's pairs of a tile are that has the layout of sums.
__device__ __forceinline__ u32* pair_at(char* tile, int i, int half) {
    return (u32*)(tile + swizzled(first_row() + 8 * half, i) + 2 * first_column());
}

// Over the four lanes that have a row.
__device__ __forceinline__ float sum_of_row(float value) {
    value += shuffle_xor(value, 1);
    return value + shuffle_xor(value, 2);
}

__device__ __forceinline__ u32 times(u32 pair, float first, float second) {
    const float2 two = unpack_bf16(pair);
    return pack_bf16(two.x * first, two.y * second);
}

// x [q, p] transposed, as a factor, positions times their scales, which a lane has at its columns.
__device__ __forceinline__ void scaled_columns(const char* x, const float2 (&scales)[8], u32 (&factors)[4][4]) {
    const int lane = threadIdx.x % 32, row = lane / 16 * 8 + lane % 8, unit = threadIdx.x % GROUP / 32 * 2 + lane / 8 % 2;
#pragma unroll
    for (int k = 0; k < 4; k++) load_transposed(factors[k], x + 16 * k * ROW + swizzled(row, unit));
#pragma unroll
    for (int k = 0; k < 4; k++) {
#pragma unroll
        for (int i = 0; i < 4; i++) factors[k][i] = times(factors[k][i], scales[2 * k + i / 2].x, scales[2 * k + i / 2].y);
    }
}

// The block's shared memory from where tiles can begin on.
template <class Shared>
__device__ __forceinline__ Shared& tiles_of_block() {
    return *(Shared*)(dynamic_shared() + (1024 - shared_address(dynamic_shared()) % 1024) % 1024);
}

// Barriers of a ring: a stage is full once its copies have come, empty once so many warps have said so. By one thread.
template <int num>
__device__ __forceinline__ void init_ring(u64 (&full)[num], u64 (&empty)[num], u32 warps) {
    for (int i = 0; i < num; i++) {
        barrier_init(&full[i], 1);
        barrier_init(&empty[i], warps);
    }
    barriers_ready();
}
