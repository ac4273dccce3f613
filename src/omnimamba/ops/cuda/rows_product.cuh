// Products of a batch's rows and a weight matrix, u [rows, k] weights [n, k]^T, on the way from memory to sums in registers.
//
// At few rows the time is that of reading the weights once. Their first tiles travel before the kernels before this one have ended, whose
// results are the rows. Each block reads all weights of its outputs and all of its rows, from L2 if others need them, too: so the blocks of
// a cluster may share either, of which each brings a part to all (multicast). At many rows what counts is how often a tile in shared memory
// is read: by as few warpgroups as there can be, for as many outputs.
//
// A warpgroup multiplies 64 rows, one warp brings weights, another one rows; as many as warpgroups are there for what else is to do. Sums
// are fp32.
//
// The including code defines N_TILE, M_TILES (of 64 rows), both of a block, CLUSTER (blocks), SHARING_WEIGHTS and SHARING_ROWS (1 or
// CLUSTER), WEIGHT_STAGES and ROW_STAGES (of 64 columns).

constexpr int STEP = 64;  // columns
constexpr int ROWS = 64 * M_TILES;
constexpr int COMPUTING = M_TILES * GROUP;  // threads
constexpr int THREADS = COMPUTING + (2 + M_TILES) * 32;
constexpr int BRINGS_WEIGHTS = COMPUTING / 32, BRINGS_ROWS = BRINGS_WEIGHTS + 1, HELPS = BRINGS_WEIGHTS + 2;  // warps; the rest help, too
constexpr int NUM_SUMS = N_TILE / 2;  // of a thread

static_assert(N_TILE % 8 == 0);

// Who waits for tiles [SIZE, STEP], and for their places, in a ring of so many stages. SHARING blocks need the same ones.
template <int SIZE, int STAGES, int SHARING>
struct Ring {
    u64 full[STAGES], empty[STAGES];  // the latter: in all blocks that share

    static constexpr int PART = SIZE / SHARING;
    static_assert(PART % 8 == 0 && (SHARING == 1 || SHARING == CLUSTER));

    __device__ __forceinline__ void init() {
        for (int i = 0; i < STAGES; i++) {
            barrier_init(&full[i], 1);
            barrier_init(&empty[i], SHARING * COMPUTING / 32);
        }
    }

    // Columns [first, end) of a tensor [1, any, k] in boxes of PART rows, from `row` on.
    __device__ __forceinline__ void bring(char (&tiles)[STAGES][SIZE * ROW], const TensorMap& from, int row, int first, int end) {
        const int part = SHARING == 1 ? 0 : (int)rank_in_cluster<CLUSTER>() * PART;
        for (int num = 0; first + num * STEP < end; num++) {
            u64* barrier = expect_stage(full, empty, num, SIZE * ROW);
            char* to = tiles[num % STAGES] + part * ROW;
            if constexpr (SHARING == 1) {
                box_copy(to, from, first + num * STEP, row, 0, barrier);
            } else {
                box_copy_to_cluster<CLUSTER>(to, from, first + num * STEP, row + part, 0, barrier);
            }
        }
    }

    // The num-th tile.
    __device__ __forceinline__ const char* wait(const char (&tiles)[STAGES][SIZE * ROW], int num) {
        barrier_wait(&full[num % STAGES], num / STAGES & 1);
        return tiles[num % STAGES];
    }

    // A warp has read it.
    __device__ __forceinline__ void free(int num) {
        const int lane = threadIdx.x % 32;
        if constexpr (SHARING == 1) {
            if (lane == 0) barrier_arrive(&empty[num % STAGES]);
        } else {
            if (lane < SHARING) barrier_arrive_at<CLUSTER>(&empty[num % STAGES], lane);
        }
    }
};

// At a multiple of 1024 bytes.
struct Rings {
    char weight_tiles[WEIGHT_STAGES][N_TILE * ROW];
    char row_tiles[ROW_STAGES][ROWS * ROW];
    Ring<N_TILE, WEIGHT_STAGES, SHARING_WEIGHTS> weights;
    Ring<ROWS, ROW_STAGES, SHARING_ROWS> rows;
};

// The products of a warpgroup's rows, all of k columns.
__device__ __forceinline__ void multiply_rows(Rings& rings, int k, float (&sums)[NUM_SUMS]) {
    const int group = threadIdx.x / GROUP;
    for (int num = 0; num < k / STEP; num++) {
        const u64 w = tile_at(rings.weights.wait(rings.weight_tiles, num));
        const u64 u = tile_at(rings.rows.wait(rings.row_tiles, num) + group * BOX);
        products_begin();
#pragma unroll
        for (int i = 0; i < STEP; i += 16) multiply(sums, along_rows(u, i), along_rows(w, i), num + i > 0);
        products_end();
        products_wait<1>(sums);
        if (num > 0) {  // the products of the step before are done
            rings.weights.free(num - 1);
            rings.rows.free(num - 1);
        }
    }
    products_wait<0>(sums);
}

// One over the root mean square of each of NUM rows of k numbers from `first` on, as far as there are rows, by a warp. What the squares of
// a row sum up to are `num` numbers; 1 if there are none.
template <int NUM>
__device__ __forceinline__ void find_scales(float* scales, const float* squares, int first, int rows, int num, int k, float eps) {
    constexpr int LANES = 4, TOGETHER = 2, LOADS = 8;  // lanes for a row; loads that are under way before the first one is needed
    const int lane = threadIdx.x % 32;
#pragma unroll 1
    for (int start = 0; start < NUM; start += TOGETHER * 32 / LANES) {
        const int own = start + lane / LANES;
        float sums[TOGETHER] = {};
#pragma unroll 1
        for (int at = lane % LANES; at < num; at += LOADS * LANES) {
            float values[TOGETHER][LOADS];
#pragma unroll
            for (int i = 0; i < TOGETHER; i++) {
                const float* row = squares + min(first + own + i * 32 / LANES, rows - 1) * num;
#pragma unroll
                for (int j = 0; j < LOADS; j++) values[i][j] = row[min(at + j * LANES, num - 1)];
            }
#pragma unroll
            for (int i = 0; i < TOGETHER; i++) {
#pragma unroll
                for (int j = 0; j < LOADS; j++) sums[i] += at + j * LANES < num ? values[i][j] : 0;
            }
        }
#pragma unroll
        for (int i = 0; i < TOGETHER; i++) {
#pragma unroll
            for (int mask = LANES / 2; mask; mask /= 2) sums[i] += shuffle_xor(sums[i], mask);
            if (lane % LANES == 0) scales[own + i * 32 / LANES] = num == 0 ? 1 : 1 / sqrtf(sums[i] / k + eps);
        }
    }
}
