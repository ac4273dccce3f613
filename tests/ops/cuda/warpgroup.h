// What warpgroup.cuh does on a GPU, on a CPU. A product is there at once, so that one which is read too early does not show; what it is of
// must be there.

#include "emulation.h"

#include "tiles.cuh"

namespace emulation {

constexpr u64 COLUMNS_ALONG = (u64)1 << 63;  // the dimension that is summed up is that of a tile's rows

inline float number_at(const char* at) {
    u16 bits;
    std::memcpy(&bits, at, 2);
    return float_of((u32)bits << 16);
}

// Of a tile whose summed dimension goes on from `place` on.
inline float element(u64 place, int other, int k) {
    const char* tile = (const char*)(place & 0xffffffffffff);
    const int summed = (int)(place >> 48 & 0x7fff) + k;
    const int row = place & COLUMNS_ALONG ? summed : other, column = place & COLUMNS_ALONG ? other : summed;
    return number_at(tile + column / 64 * BOX + swizzled(row, column % 64 / 8) + column % 8 * 2);
}

// The words of all lanes of the warp.
inline u32 (&exchange(const u32 (&own)[4]))[32][4] {
    Warp& warp = this_warp();
    u32(&words)[32][4] = warp.words[warp.meeting.generation % 2];
    std::copy(own, own + 4, words[threadIdx.x % 32]);
    __syncwarp();
    return words;
}

template <int size, class Factor>
void add_products(float (&sums)[size], Factor factor, u64 b, bool adds) {
    for (int i = 0; i < size; i++) {
        const int half = i / 2 % 2, column = i / 4 * 8 + threadIdx.x % 4 * 2 + i % 2;
        float sum = adds ? sums[i] : 0;
        for (int k = 0; k < 16; k++) sum += factor(half, k) * element(b, column, k);
        sums[i] = sum;
    }
}

}  // namespace emulation

inline u64 tile_at(const char* from) { return (u64)from; }

inline u64 along_rows(u64 tile, int k) { return tile | (u64)k << 48; }

inline u64 along_columns(u64 tile, int k) { return tile | (u64)k << 48 | emulation::COLUMNS_ALONG; }

inline void products_begin() {}

inline void products_end() {}

template <int num, int size>
void products_wait(float (&sums)[size]) {
    __syncwarp();
}

template <int size>
void multiply(float (&sums)[size], u64 a, u64 b, bool adds) {
    emulation::add_products(sums, [=](int half, int k) { return emulation::element(a, first_row() + 8 * half, k); }, b, adds);
}

template <int size>
void multiply(float (&sums)[size], const u32 (&a)[4], u64 b) {
    u32(&words)[32][4] = emulation::exchange(a);
    const int first = threadIdx.x % 32 / 4 * 4;
    const auto factor = [&](int half, int k) {
        const float2 two = unpack_bf16(words[first + k % 8 / 2][k / 8 * 2 + half]);
        return k % 2 ? two.y : two.x;
    };
    emulation::add_products(sums, factor, b, true);
    __syncwarp();
}

template <bool is_transposed, int size>
void multiply_tiles(float (&sums)[size], u64 a, u64 b, bool adds = true) {
    multiply(sums, a, b, adds);
}

namespace emulation {

// Where the row of a matrix is that this lane has a pair of.
inline const char* row_of(const char* own, int matrix, int row) {
    const u64 address = (u64)own;
    u32(&words)[32][4] = exchange({(u32)address, (u32)(address >> 32), 0, 0});
    const u32* two = words[8 * matrix + row];
    const char* found = (const char*)(two[0] | (u64)two[1] << 32);
    __syncwarp();
    return found;
}

}  // namespace emulation

inline void load_matrices(u32 (&matrices)[4], const char* row) {
    for (int i = 0; i < 4; i++) std::memcpy(&matrices[i], emulation::row_of(row, i, threadIdx.x % 32 / 4) + threadIdx.x % 4 * 4, 4);
}

inline void load_transposed(u32 (&matrices)[4], const char* row) {
    for (int i = 0; i < 4; i++) {
        u16 two[2];
        for (int j = 0; j < 2; j++) std::memcpy(&two[j], emulation::row_of(row, i, threadIdx.x % 4 * 2 + j) + threadIdx.x % 32 / 4 * 2, 2);
        matrices[i] = two[0] | (u32)two[1] << 16;
    }
}

inline void store_matrices(char* row, const u32 (&matrices)[4]) {
    for (int i = 0; i < 4; i++) std::memcpy((char*)emulation::row_of(row, i, threadIdx.x % 32 / 4) + threadIdx.x % 4 * 4, &matrices[i], 4);
}

// As `box_description` of conftest.py describes a tensor [batch, rows, columns] in place of the driver.
struct alignas(64) TensorMap {
    char* address;
    long long batches, rows, columns, batch_stride, row_stride;  // strides in bytes
    long long box_rows;
    char padding[72];
};
static_assert(sizeof(TensorMap) == 128);

namespace emulation {

// Calls move(place in a box, in the tensor) for each unit of 16 bytes that is in both, outside(place in the box) for those beyond the end.
template <class Move, class Outside>
void each_unit(const TensorMap& map, int column, int row, int batch, Move move, Outside outside) {
    for (int i = 0; i < map.box_rows; i++) {
        for (int unit = 0; unit < 8; unit++) {
            const bool is_there = row + i < map.rows && column + 8 * unit < map.columns && batch < map.batches;
            if (is_there) {
                move(swizzled(i, unit), map.address + batch * map.batch_stride + (row + i) * map.row_stride + (column + 8 * unit) * 2);
            } else {
                outside(swizzled(i, unit));
            }
        }
    }
}

}  // namespace emulation

inline void box_copy(char* to, const TensorMap& from, int column, int row, int batch, u64* barrier) {
    const u32 bytes = (u32)from.box_rows * ROW;
    std::memset(to, 0xff, bytes);
    const auto arrive = [=, &from] {
        emulation::each_unit(
            from, column, row, batch, [=](int place, const char* at) { std::memcpy(to + place, at, 16); },
            [=](int place) { std::memset(to + place, 0, 16); });
    };
    emulation::copies.push_back({arrive, bytes, barrier});
}

inline void box_store(const TensorMap& to, int column, int row, int batch, const char* from) {
    emulation::send([=, &to] {
        emulation::each_unit(to, column, row, batch, [=](int place, char* at) { std::memcpy(at, from + place, 16); }, [](int) {});
    });
}

template <int size>
u32 rank_in_cluster() {
    return blockIdx.x % size;
}

template <int size>
void cluster_sync() {
    emulation::meet(emulation::blocks[blockIdx.x / size * size].cluster, size * emulation::num_threads);
}

template <int size>
void copy_to_block(char* to, const char* from, u32 bytes, u64* barrier, u32 rank) {
    bulk_copy(emulation::in_cluster(size, rank, to), from, bytes, emulation::in_cluster(size, rank, barrier));
}

inline void group_sync(int group) { emulation::meet(emulation::blocks[blockIdx.x].groups[group], GROUP); }

template <int num>
void take_registers() {}

template <int num>
void leave_registers() {}
