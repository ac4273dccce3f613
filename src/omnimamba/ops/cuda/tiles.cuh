// How tiles lie in shared memory and in the registers of a warpgroup (four warps), where matrix products find them.
//
// A tile is one box or two, 64 rows of 64 bf16 each, at a multiple of 1024 bytes. Within a row the eight units of 16 bytes are exchanged
// (`swizzled`), so that columns are read without conflicts; copies of boxes write them so.
//
// A lane has of a product [64, n], of each eight columns, four sums: two neighbours (`first_column`) of row `first_row`, then of the row
// eight further. Of a factor [64, 16] in registers it has the pairs at the same places: of columns 0 to 7 both rows, then of columns 8 to
// 15.

constexpr int GROUP = 128;     // threads
constexpr int ROW = 128;       // bytes of a box's row
constexpr int BOX = 64 * ROW;  // bytes

__device__ __forceinline__ int swizzled(int row, int unit) { return row * ROW + ((unit ^ (row & 7)) << 4); }

__device__ __forceinline__ int first_row() { return threadIdx.x % GROUP / 32 * 16 + threadIdx.x % 32 / 4; }

__device__ __forceinline__ int first_column() { return threadIdx.x % 4 * 2; }

// The block's shared memory from where tiles can begin on.
template <class Shared>
__device__ __forceinline__ Shared& tiles_of_block() {
    return *(Shared*)(dynamic_shared() + (1024 - shared_address(dynamic_shared()) % 1024) % 1024);
}

// Barriers of a ring: a stage is full once its copies have come, empty once so many warps have said so. By one thread,
// which then makes them `barriers_ready`.
template <int num>
__device__ __forceinline__ void init_ring(u64 (&full)[num], u64 (&empty)[num], u32 warps) {
    for (int i = 0; i < num; i++) {
        barrier_init(&full[i], 1);
        barrier_init(&empty[i], warps);
    }
}

// Waits for the stage that the num-th tiles go to, counted from 0, and announces their bytes to the barrier that counts them.
template <int stages>
__device__ __forceinline__ u64* expect_stage(u64 (&full)[stages], u64 (&empty)[stages], u32 num, u32 bytes) {
    const int stage = num % stages, lap = num / stages;
    if (lap > 0) barrier_wait(&empty[stage], lap - 1 & 1);
    barrier_expect(&full[stage], bytes);
    return &full[stage];
}
