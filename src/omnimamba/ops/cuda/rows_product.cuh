// Products of a batch's rows and a weight matrix, u [rows, k] weights [n, k]^T, on the way from memory to sums in registers.
//
// At few rows the time is that of reading the weights once. A block has N_TILE outputs of all rows: its weights come through a deep ring,
// and their first stages travel before the kernels before this one have ended, whose results are the rows. Each block reads all rows, more
// bytes than its weights are: so SHARING neighbours bring a part of them each, to all (multicast), and L2 gives them once.
//
// A warpgroup multiplies 64 rows, one warp brings weights, another one rows; as many as warpgroups are there for what else is to do. Sums
// are fp32.
//
// The including code defines N_TILE, M_TILES (of 64 rows), CLUSTER (blocks), SHARING (1 or CLUSTER), WEIGHT_STAGES and ROW_STAGES (of 64
// columns).

constexpr int STEP = 64;  // columns
constexpr int ROWS = 64 * M_TILES, SHARE = ROWS / SHARING;
constexpr int COMPUTING = M_TILES * GROUP;  // threads
constexpr int THREADS = COMPUTING + (2 + M_TILES) * 32;
constexpr int BRINGS_WEIGHTS = COMPUTING / 32, BRINGS_ROWS = BRINGS_WEIGHTS + 1, HELPS = BRINGS_WEIGHTS + 2;  // warps; the rest help, too
constexpr int NUM_SUMS = N_TILE / 2;  // of a thread

static_assert(N_TILE % 8 == 0 && SHARE % 8 == 0 && (SHARING == 1 || SHARING == CLUSTER));

// At a multiple of 1024 bytes.
struct Rings {
    char weights[WEIGHT_STAGES][N_TILE * ROW];
    char rows[ROW_STAGES][ROWS * ROW];
    u64 full_weights[WEIGHT_STAGES], empty_weights[WEIGHT_STAGES];
    u64 full_rows[ROW_STAGES], empty_rows[ROW_STAGES];  // the latter: in all blocks that share them

    __device__ void init() {
        for (int i = 0; i < WEIGHT_STAGES; i++) {
            barrier_init(&full_weights[i], 1);
            barrier_init(&empty_weights[i], COMPUTING / 32);
        }
        for (int i = 0; i < ROW_STAGES; i++) {
            barrier_init(&full_rows[i], 1);
            barrier_init(&empty_rows[i], SHARING * COMPUTING / 32);
        }
    }
};

// Columns [first, end) of outputs from `output` on; of a tensor [1, n, k] in boxes of N_TILE rows.
__device__ __forceinline__ void bring_weights(Rings& rings, const TensorMap& weights, int output, int first, int end) {
    for (int num = 0; first + num * STEP < end; num++) {
        u64* full = expect_stage(rings.full_weights, rings.empty_weights, num, N_TILE * ROW);
        box_copy(rings.weights[num % WEIGHT_STAGES], weights, first + num * STEP, output, 0, full);
    }
}

// The same of the rows, a tensor [1, rows, k] in boxes of SHARE rows.
__device__ __forceinline__ void bring_rows(Rings& rings, const TensorMap& u, int first, int end) {
    const int share = SHARING == 1 ? 0 : (int)rank_in_cluster<CLUSTER>() * SHARE;
    for (int num = 0; first + num * STEP < end; num++) {
        u64* full = expect_stage(rings.full_rows, rings.empty_rows, num, ROWS * ROW);
        char* to = rings.rows[num % ROW_STAGES] + share * ROW;
        if constexpr (SHARING == 1) {
            box_copy(to, u, first + num * STEP, share, 0, full);
        } else {
            box_copy_to_cluster<CLUSTER>(to, u, first + num * STEP, share, 0, full);
        }
    }
}

// The products of a warpgroup's rows, all of k columns.
__device__ __forceinline__ void multiply_rows(Rings& rings, int k, float (&sums)[NUM_SUMS]) {
    const int group = threadIdx.x / GROUP, lane = threadIdx.x % 32;
    for (int num = 0; num < k / STEP; num++) {
        const int weights = num % WEIGHT_STAGES, rows = num % ROW_STAGES;
        barrier_wait(&rings.full_weights[weights], num / WEIGHT_STAGES & 1);
        barrier_wait(&rings.full_rows[rows], num / ROW_STAGES & 1);
        const u64 u = tile_at(rings.rows[rows] + group * BOX), w = tile_at(rings.weights[weights]);
        products_begin();
#pragma unroll
        for (int i = 0; i < STEP; i += 16) multiply(sums, along_rows(u, i), along_rows(w, i), num + i > 0);
        products_end();
        products_wait<1>(sums);
        if (num > 0) {  // the products of the step before are done
            if (lane == 0) barrier_arrive(&rings.empty_weights[(num - 1) % WEIGHT_STAGES]);
            u64* empty_rows = &rings.empty_rows[(num - 1) % ROW_STAGES];
            if constexpr (SHARING == 1) {
                if (lane == 0) barrier_arrive(empty_rows);
            } else {
                if (lane < SHARING) barrier_arrive_at<CLUSTER>(empty_rows, lane);
            }
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
