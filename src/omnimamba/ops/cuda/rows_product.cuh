// Products of a batch's rows and a weight matrix, u [rows, k] weights [n, k]^T, on the way from memory to sums in registers.
//
// At few rows the time is that of reading the weights once. Their first tiles travel before the kernels before this one have ended, whose
// results are the rows. At many rows what counts is how often tiles in shared memory are read: by as few warpgroups as there can be, for as
// many outputs. So the blocks of a grid share out the outputs and, in ROW_BLOCKS parts, the rows; those of a cluster the columns. (Blocks
// that bring each other tiles by multicast take longer: they wait for each other.)
//
// A warpgroup multiplies 64 rows, one warp brings weights, another one rows; HELPERS are there for what else is to do. Sums are fp32.
//
// The including code defines N_TILE and M_TILES (of 64 rows), both of a block, ROW_BLOCKS, CLUSTER (blocks), K_GROUPS (warpgroups that have
// stages in turn), WEIGHT_STAGES and ROW_STAGES (of 64 columns), PACE (cycles that an early tile of weights takes at least).

constexpr int STEP = 64;  // columns
constexpr int ROWS = 64 * M_TILES;
constexpr int SUMMING = M_TILES * GROUP, COMPUTING = K_GROUPS * SUMMING;  // threads; the first ones add up what all have computed
constexpr int HELPERS = M_TILES < 2 ? M_TILES : 2;  // warps
constexpr int THREADS = COMPUTING + (2 + HELPERS) * 32;
constexpr int BRINGS_WEIGHTS = COMPUTING / 32, BRINGS_ROWS = BRINGS_WEIGHTS + 1, HELPS = BRINGS_WEIGHTS + 2;  // warps
constexpr int NUM_SUMS = N_TILE / 2;  // of a thread

static_assert(N_TILE % 8 == 0);
// A stage is always the same group's: whoever waited for a later round of one that it has not seen filled before would not wait at all.
static_assert(WEIGHT_STAGES % K_GROUPS == 0 && ROW_STAGES % K_GROUPS == 0);

// Who waits for tiles [SIZE, STEP], and for their places, in a ring of so many stages.
template <int SIZE, int STAGES>
struct Ring {
    u64 full[STAGES], empty[STAGES];

    __device__ __forceinline__ void init() { init_ring(full, empty, SUMMING / 32); }

    // Columns [first, end) of a tensor [1, any, k] in boxes of SIZE rows, from `row` on. Each of the first ones, which come ahead of their
    // use, takes so many cycles at least: what goes on meanwhile needs the memory, too.
    __device__ __forceinline__ void bring(
        char (&tiles)[STAGES][SIZE * ROW], const TensorMap& from, int row, int first, int end, int pace = 0) {
        const u64 start = cycles();
        for (int num = 0; first + num * STEP < end; num++) {
            if (num < STAGES) pause_until(start + num * pace);
            u64* barrier = expect_stage(full, empty, num, SIZE * ROW);
            box_copy(tiles[num % STAGES], from, first + num * STEP, row, 0, barrier);
        }
    }

    // The num-th tile.
    __device__ __forceinline__ const char* wait(const char (&tiles)[STAGES][SIZE * ROW], int num) {
        barrier_wait(&full[num % STAGES], num / STAGES & 1);
        return tiles[num % STAGES];
    }

    // A warp has read it.
    __device__ __forceinline__ void free(int num) {
        if (threadIdx.x % 32 == 0) barrier_arrive(&empty[num % STAGES]);
    }
};

// At a multiple of 1024 bytes.
struct Rings {
    char weight_tiles[WEIGHT_STAGES][N_TILE * ROW];
    char row_tiles[ROW_STAGES][ROWS * ROW];
    Ring<N_TILE, WEIGHT_STAGES> weights;
    Ring<ROWS, ROW_STAGES> rows;

    __device__ __forceinline__ void init() {
        weights.init();
        rows.init();
    }
};

// The products of a warpgroup's rows, all of k columns, or of each K_GROUPS steps one. Behind a step's products are the next step's of this
// group, or those of another one: then tiles are given back at once.
__device__ __forceinline__ void multiply_rows(Rings& rings, int k, float (&sums)[NUM_SUMS]) {
    constexpr int BEHIND = K_GROUPS == 1;
    const int group = threadIdx.x / GROUP % M_TILES, first = threadIdx.x / GROUP / M_TILES;
    for (int num = first; num < k / STEP; num += K_GROUPS) {
        const u64 w = tile_at(rings.weights.wait(rings.weight_tiles, num));
        const u64 u = tile_at(rings.rows.wait(rings.row_tiles, num) + group * BOX);
        products_begin();
#pragma unroll
        for (int i = 0; i < STEP; i += 16) multiply(sums, along_rows(u, i), along_rows(w, i), num > first || i > 0);
        products_end();
        products_wait<BEHIND>(sums);
        if (num >= BEHIND) {
            rings.weights.free(num - BEHIND);
            rings.rows.free(num - BEHIND);
        }
    }
    products_wait<0>(sums);
}

// The sums of all columns, in the threads that are SUMMING. Nobody reads tiles any more then.
__device__ __forceinline__ void add_groups(Rings& rings, float (&sums)[NUM_SUMS]) {
    named_sync<COMPUTING>();
    if constexpr (K_GROUPS == 1) return;
    static_assert((K_GROUPS - 1) * SUMMING * NUM_SUMS * 4 <= sizeof(Rings::row_tiles));
    float(*others)[NUM_SUMS][SUMMING] = (float(*)[NUM_SUMS][SUMMING])rings.row_tiles;  // [K_GROUPS - 1]
    const int own = threadIdx.x / SUMMING, thread = threadIdx.x % SUMMING;
    if (own > 0) {
#pragma unroll
        for (int i = 0; i < NUM_SUMS; i++) others[own - 1][i][thread] = sums[i];
    }
    named_sync<COMPUTING>();
    if (own > 0) return;
#pragma unroll
    for (int group = 0; group < K_GROUPS - 1; group++) {
#pragma unroll
        for (int i = 0; i < NUM_SUMS; i++) sums[i] += others[group][i][thread];
    }
}

// One over the root mean square of each of NUM rows of k numbers from `first` on, as far as there are rows, by a warp. What the squares of
// a row sum up to are `num` numbers.
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
            if (lane % LANES == 0) scales[own + i * 32 / LANES] = 1 / sqrtf(sums[i] / k + eps);
        }
    }
}
