// What only Hopper has, as functions: matrix products of a warpgroup on the tensor cores, of bf16 with sums in fp32, and copies of boxes of
// a tensor. tests/ops/cuda/warpgroup.h defines the same for a CPU.

// How products name a tile in shared memory.
__device__ __forceinline__ u64 tile_at(const char* from) {
    return (u64)(shared_address(from) >> 4 & 0x3fff) | (u64)(BOX >> 4) << 16 | (u64)(8 * ROW >> 4) << 32 | (u64)1 << 62;
}

// Sixteen numbers of the summed dimension from `k` on, which is that of the tile's rows, or that of its columns.
__device__ __forceinline__ u64 along_rows(u64 tile, int k) { return tile + (k / 64 * BOX + k % 64 * 2 >> 4); }

__device__ __forceinline__ u64 along_columns(u64 tile, int k) { return tile + (k * ROW >> 4); }

__device__ __forceinline__ void products_begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

// The products since the last one are a group.
__device__ __forceinline__ void products_end() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Until all but the last `num` groups are done, of which `sums` belong to the last.
template <int num, int size>
__device__ __forceinline__ void products_wait(float (&sums)[size]) {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(num) : "memory");
#pragma unroll
    for (int i = 0; i < size; i++) asm volatile("" : "+f"(sums[i])::"memory");  // not read any earlier
}

#define SUMS_4(i) "+f"(sums[i]), "+f"(sums[i + 1]), "+f"(sums[i + 2]), "+f"(sums[i + 3])
#define SUMS_8(i) SUMS_4(i), SUMS_4(i + 4)
#define SUMS_32(i) SUMS_8(i), SUMS_8(i + 8), SUMS_8(i + 16), SUMS_8(i + 24)
#define NAMES_32                                                                                                                   \
    "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, " \
    "%27, %28, %29, %30, %31"
#define NAMES_64                                                                                                                     \
    NAMES_32                                                                                                                         \
    ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, " \
    "%57, %58, %59, %60, %61, %62, %63"

// sums (+)= a [64, 16] b [n, 16]^T, both in shared memory, `along_rows`; then which operands of the instruction are what.
#define MULTIPLY(n, sums_at, a_at, b_at, adds_at, ...)                                                         \
    __device__ __forceinline__ void multiply(float (&sums)[n / 2], u64 a, u64 b, bool adds) {                  \
        asm volatile(                                                                                          \
            "{\n"                                                                                              \
            ".reg .pred adds;\n"                                                                               \
            "setp.ne.b32 adds, %" #adds_at ", 0;\n"                                                            \
            "wgmma.mma_async.sync.aligned.m64n" #n "k16.f32.bf16.bf16 {" sums_at "}, %" #a_at ", %" #b_at      \
            ", adds, 1, 1, 0, 0;\n"                                                                            \
            "}"                                                                                                \
            : __VA_ARGS__                                                                                      \
            : "l"(a), "l"(b), "r"((int)adds));                                                                 \
    }

MULTIPLY(64, NAMES_32, 32, 33, 34, SUMS_32(0))
MULTIPLY(72, NAMES_32 ", %32, %33, %34, %35", 36, 37, 38, SUMS_32(0), SUMS_4(32))
MULTIPLY(128, NAMES_64, 64, 65, 66, SUMS_32(0), SUMS_32(32))
MULTIPLY(136, NAMES_64 ", %64, %65, %66, %67", 68, 69, 70, SUMS_32(0), SUMS_32(32), SUMS_4(64))

// sums += a [64, 16] b [16, 64], a in registers, b in shared memory, `along_columns`.
__device__ __forceinline__ void multiply(float (&sums)[32], const u32 (&a)[4], u64 b) {
    asm volatile(
        "{\n"
        ".reg .pred adds;\n"
        "setp.eq.b32 adds, 0, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {" NAMES_32 "}, {%32, %33, %34, %35}, %36, adds, 1, 1, 1;\n"
        "}"
        : SUMS_32(0)
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}

// The same with b [16, 128].
__device__ __forceinline__ void multiply(float (&sums)[64], const u32 (&a)[4], u64 b) {
    asm volatile(
        "{\n"
        ".reg .pred adds;\n"
        "setp.eq.b32 adds, 0, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {" NAMES_64 "}, {%64, %65, %66, %67}, %68, adds, 1, 1, 1;\n"
        "}"
        : SUMS_32(0), SUMS_32(32)
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}

// sums += a [64, 16] b [16, n], both in shared memory, b `along_columns`, a too if it is transposed there, else `along_rows`.
template <bool is_transposed>
__device__ __forceinline__ void multiply_tiles(float (&sums)[32], u64 a, u64 b, bool adds = true) {
    asm volatile(
        "{\n"
        ".reg .pred adds;\n"
        "setp.ne.b32 adds, %35, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {" NAMES_32 "}, %32, %33, adds, 1, 1, %34, 1;\n"
        "}"
        : SUMS_32(0)
        : "l"(a), "l"(b), "n"((int)is_transposed), "r"((int)adds));
}

template <bool is_transposed>
__device__ __forceinline__ void multiply_tiles(float (&sums)[64], u64 a, u64 b, bool adds = true) {
    asm volatile(
        "{\n"
        ".reg .pred adds;\n"
        "setp.ne.b32 adds, %67, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {" NAMES_64 "}, %64, %65, adds, 1, 1, %66, 1;\n"
        "}"
        : SUMS_32(0), SUMS_32(32)
        : "l"(a), "l"(b), "n"((int)is_transposed), "r"((int)adds));
}

// Four 8 x 8 matrices, whose rows are at the addresses of eight lanes each, from shared memory, transposed, and to it.
__device__ __forceinline__ void load_transposed(u32 (&matrices)[4], const char* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(matrices[0]), "=r"(matrices[1]), "=r"(matrices[2]), "=r"(matrices[3])
                 : "r"(shared_address(row))
                 : "memory");
}

__device__ __forceinline__ void load_matrices(u32 (&matrices)[4], const char* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(matrices[0]), "=r"(matrices[1]), "=r"(matrices[2]), "=r"(matrices[3])
                 : "r"(shared_address(row))
                 : "memory");
}

__device__ __forceinline__ void store_matrices(char* row, const u32 (&matrices)[4]) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(shared_address(row)), "r"(matrices[0]),
                 "r"(matrices[1]), "r"(matrices[2]), "r"(matrices[3])
                 : "memory");
}

// A tensor [batch, rows, columns] as the driver describes it (cuTensorMapEncodeTiled).
struct alignas(64) TensorMap {
    char bytes[128];
};

// A box from there on, zeros beyond the tensor's end; the barrier counts its bytes.
__device__ __forceinline__ void box_copy(char* to, const TensorMap& from, int column, int row, int batch, u64* barrier) {
    asm volatile("cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, %4}], [%5];" ::"r"(
                     shared_address(to)),
                 "l"(&from), "r"(column), "r"(row), "r"(batch), "r"(shared_address(barrier))
                 : "memory");
}

// A box that other threads have made `visible_to_copies` to there, as far as the tensor goes; see `bulk_commit`.
__device__ __forceinline__ void box_store(const TensorMap& to, int column, int row, int batch, const char* from) {
    asm volatile("cp.async.bulk.tensor.3d.global.shared::cta.tile.bulk_group [%0, {%1, %2, %3}], [%4];" ::"l"(&to), "r"(column), "r"(row),
                 "r"(batch), "r"(shared_address(from))
                 : "memory");
}

// ---- clusters: `size` blocks at work side by side, the neighbours in a grid

template <int size>
__device__ __forceinline__ u32 rank_in_cluster() {
    u32 rank;
    asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return rank;
}

// All threads of the cluster meet. Barriers that are `barriers_ready` can be used from then on; nothing else becomes visible, for that
// takes a fence of the whole GPU.
template <int size>
__device__ __forceinline__ void cluster_sync() {
    asm volatile("barrier.cluster.arrive.relaxed.aligned;\nbarrier.cluster.wait.aligned;" ::: "memory");
}

// What is at this place in another block.
__device__ __forceinline__ u32 address_in_cluster(const void* own, u32 rank) {
    u32 address;
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(address) : "r"(shared_address(own)), "r"(rank));
    return address;
}

// `bytes` (a multiple of 16, as the addresses are) to this place in another block, whose barrier counts them.
template <int size>
__device__ __forceinline__ void copy_to_block(char* to, const char* from, u32 bytes, u64* barrier, u32 rank) {
    asm volatile("cp.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                     address_in_cluster(to, rank)),
                 "r"(shared_address(from)), "r"(bytes), "r"(address_in_cluster(barrier, rank))
                 : "memory");
}

// All threads of one of the first two warpgroups.
__device__ __forceinline__ void group_sync(int group) { asm volatile("bar.sync %0, 128;" ::"r"(group + 1) : "memory"); }

// The warpgroup has so many registers for a thread from now on, more or fewer than it started with.
template <int num>
__device__ __forceinline__ void take_registers() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(num));
}

template <int num>
__device__ __forceinline__ void leave_registers() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(num));
}
