// What the kernels of the scan have in common. The including code defines D_STATE (64 or 128).

constexpr int Q = 64, HEADDIM = 64;   // positions of a chunk, channels of a head
constexpr int WARPS = GROUP / 32;     // of a warpgroup
constexpr int BOXES = D_STATE / 64;   // of B, C and a state
constexpr int COLUMNS = D_STATE / 8;  // eights of them

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

// A product's sums, or what was made of them, to a tile in bf16.
template <int columns>
__device__ __forceinline__ void put(const u32 (&pairs)[columns][2], char* tile) {
    const int lane = threadIdx.x % 32, row = threadIdx.x % GROUP / 32 * 16 + lane % 16;
#pragma unroll
    for (int i = 0; i < columns; i += 2) {
        const u32 matrices[4] = {pairs[i][0], pairs[i][1], pairs[i + 1][0], pairs[i + 1][1]};
        const int column = i + lane / 16;
        store_matrices(tile + column / 8 * BOX + swizzled(row, column % 8), matrices);
    }
}

template <int size>
__device__ __forceinline__ void put(const float (&sums)[size], char* tile) {
    u32 pairs[size / 4][2];
#pragma unroll
    for (int i = 0; i < size / 2; i++) pairs[i / 2][i % 2] = pack_bf16(sums[2 * i], sums[2 * i + 1]);
    put(pairs, tile);
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

// sums = a b^T, both tiles [64, depth].
template <int depth>
__device__ __forceinline__ void multiply_rows(float (&sums)[32], u64 a, u64 b) {
#pragma unroll
    for (int k = 0; k < depth; k += 16) multiply(sums, along_rows(a, k), along_rows(b, k), k > 0);
}

// sums += factor b, the factor [64, 64] in registers, b a tile of 64 rows.
template <int size>
__device__ __forceinline__ void add_product(float (&sums)[size], const u32 (&factor)[4][4], u64 b) {
#pragma unroll
    for (int k = 0; k < 4; k++) multiply(sums, factor[k], along_columns(b, 16 * k));
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
