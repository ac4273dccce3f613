// What primitives.cuh does on a GPU, on a CPU: every thread of every block is a fiber, and whoever runs next is drawn at random, so that
// an order that only usually holds shows. A bulk copy arrives late, and what it replaces is gone at once; memory starts as NaN.

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <vector>

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

struct alignas(8) uint2 { u32 x, y; };
struct alignas(16) uint4 { u32 x, y, z, w; };
struct alignas(8) float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

#define __device__
#define __global__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)

using std::max;
using std::min;

namespace emulation {

constexpr int STACK = 1 << 15;

struct Meeting {  // of a fixed number of threads
    int arrived = 0;
    u64 generation = 0;
};

struct Warp {
    Meeting meeting;
    float values[2][32];
    u32 words[2][32][4];
};

struct Block {
    std::vector<char> shared;
    std::vector<Warp> warps;
    Meeting all, named, groups[2], cluster;  // the last one: of the cluster's first block
};

struct Fiber {
    ucontext_t context;
    std::unique_ptr<char[]> stack;
    int block, thread;
    bool is_done = false;
    std::function<bool()> is_ready;
    std::vector<int> groups{0};  // of stores: how many of each are under way
};

struct Copy {
    std::function<void()> arrive;
    u32 bytes;
    u64* barrier;  // null: a store
    Fiber* sender = nullptr;
    size_t group = 0;
};

struct Barrier {  // in the eight bytes of an mbarrier
    u16 count, pending;
    int bytes : 31;
    u32 phase : 1;
};
static_assert(sizeof(Barrier) == sizeof(u64));

inline std::vector<Block> blocks;
inline std::vector<Fiber> fibers;
inline std::vector<Copy> copies;
inline Fiber* self;
inline ucontext_t scheduler;
inline int num_threads;

template <class Ready>
void wait_until(Ready is_ready) {
    while (!is_ready()) {
        self->is_ready = is_ready;
        swapcontext(&self->context, &scheduler);
    }
}

inline void meet(Meeting& meeting, int num) {
    const u64 generation = meeting.generation;
    if (++meeting.arrived == num) {
        meeting.arrived = 0;
        meeting.generation++;
    }
    wait_until([&meeting, generation] { return meeting.generation > generation; });
}

inline Barrier& barrier(u64* at) { return *(Barrier*)at; }

inline void settle(Barrier& barrier) {
    if (barrier.pending == 0 && barrier.bytes == 0) {
        barrier.pending = barrier.count;
        barrier.phase ^= 1;
    }
}

struct Index { int x; };

}  // namespace emulation

#define threadIdx (emulation::Index{emulation::self->thread})
#define blockIdx (emulation::Index{emulation::self->block})
#define gridDim (emulation::Index{(int)emulation::blocks.size()})

inline void __syncthreads() { emulation::meet(emulation::blocks[blockIdx.x].all, emulation::num_threads); }

inline emulation::Warp& this_warp() { return emulation::blocks[blockIdx.x].warps[threadIdx.x / 32]; }

inline void __syncwarp() { emulation::meet(this_warp().meeting, 32); }

inline u64 shared_address(const void* pointer) { return (u64)pointer; }

namespace emulation {

// At a multiple of 1024, so that the same thing is at the same place in all blocks.
inline char* shared_of(int block) { return (char*)(((u64)blocks[block].shared.data() + 1023) / 1024 * 1024); }

// What is at this place of the own block's shared memory in another one of the cluster, whose blocks are neighbours.
template <class T>
T* in_cluster(int size, int rank, T* own) {
    return (T*)(shared_of(self->block / size * size + rank) + ((char*)own - shared_of(self->block)));
}

}  // namespace emulation

inline char* dynamic_shared() { return emulation::shared_of(blockIdx.x); }

inline void barrier_init(u64* barrier, u32 count) { emulation::barrier(barrier) = {(u16)count, (u16)count, 0, 0}; }

inline void barriers_ready() {}

inline void barrier_arrive(u64* barrier) {
    emulation::barrier(barrier).pending--;
    emulation::settle(emulation::barrier(barrier));
}

inline void barrier_expect(u64* barrier, u32 bytes) {
    emulation::barrier(barrier).bytes += (int)bytes;
    barrier_arrive(barrier);
}

inline void barrier_wait(u64* barrier, u32 parity) {
    emulation::wait_until([=] { return emulation::barrier(barrier).phase != parity; });
}

inline void bulk_copy(char* to, const char* from, u32 bytes, u64* barrier) {
    std::memset(to, 0xff, bytes);
    emulation::copies.push_back({[=] { std::memcpy(to, from, bytes); }, bytes, barrier});
}

namespace emulation {

inline void send(std::function<void()> arrive) {
    self->groups.back()++;
    copies.push_back({arrive, 0, nullptr, self, self->groups.size() - 1});
}

}  // namespace emulation

inline void bulk_store(char* to, const char* from, u32 bytes) {
    emulation::send([=] { std::memcpy(to, from, bytes); });
}

inline void bulk_commit() { emulation::self->groups.push_back(0); }

template <int num>
void bulk_wait_read() {
    const std::vector<int>& groups = emulation::self->groups;
    const size_t oldest = groups.size() - 1;  // the last one has not been committed
    for (size_t i = 0; i + num < oldest; i++) emulation::wait_until([&groups, i] { return groups[i] == 0; });
}

inline void bulk_wait_all() { bulk_wait_read<0>(); }

inline void visible_to_copies() {}

inline void start_next_kernel() {}

inline void wait_for_earlier_kernels() {}

template <int threads>
void named_sync() {
    emulation::meet(emulation::blocks[blockIdx.x].named, threads);
}

inline u32 count_up(u32* counter) { return (*counter)++; }

inline bool last_of_grid(u32* counter) { return (int)count_up(counter) == gridDim.x - 1; }

inline int warp_index() {  // all lanes ask for it at once
    __syncwarp();
    return threadIdx.x / 32;
}

inline u64 cycles() { return 0; }

inline void pause_until(u64) {}

inline float lane_value(float value, int lane) {
    emulation::Warp& warp = this_warp();
    float* values = warp.values[warp.meeting.generation % 2];
    values[threadIdx.x % 32] = value;
    __syncwarp();
    return values[lane];
}

inline float shuffle_xor(float value, int mask) { return lane_value(value, threadIdx.x % 32 ^ mask); }

inline u32 ballot(bool is_so) {
    u32 bits = 0;
    for (int lane = 0; lane < 32; lane++) bits |= (u32)(lane_value(is_so, lane) != 0) << lane;
    return bits;
}

inline int __popc(u32 bits) { return __builtin_popcount(bits); }

inline float largest_of_lanes(float value) {
    for (int mask = 16; mask; mask /= 2) value = max(value, shuffle_xor(value, mask));
    return value;
}

inline u32 word_at(const float* from) {
    u32 word;
    std::memcpy(&word, from, 4);
    return word;
}

inline void publish(float* to, float value, u32 tag) {
    const u32 word = (word_at(&value) & ~1u) | tag;
    std::memcpy(to, &word, 4);
}

inline u32 peek(const float* from) { return word_at(from); }

inline uint4 peek4(const float* from) { return {word_at(from), word_at(from + 1), word_at(from + 2), word_at(from + 3)}; }

inline float receive(u32 word, const float* from, u32 tag) {
    if ((word ^ tag) & 1) emulation::wait_until([=] { return ((word_at(from) ^ tag) & 1) == 0; });
    return *from;
}

inline float4 receive4(uint4 words, const float* from, u32 tag) {
    return {receive(words.x, from, tag), receive(words.y, from + 1, tag), receive(words.z, from + 2, tag), receive(words.w, from + 3, tag)};
}

inline float float_of(u32 bits) {
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}

inline u32 bits_of(float value) { return word_at(&value); }

inline u16 to_bf16(float value) {
    const u32 bits = bits_of(value);
    return (u16)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

inline u32 pack_bf16(float first, float second) { return to_bf16(first) | (u32)to_bf16(second) << 16; }

inline float2 unpack_bf16(u32 pair) { return {float_of(pair << 16), float_of(pair & 0xffff0000u)}; }

inline u32 __byte_perm(u32 low, u32 high, u32 selector) {
    const u64 bytes = (u64)high << 32 | low;
    u32 result = 0;
    for (int i = 0; i < 4; i++) result |= (u32)(bytes >> 8 * (selector >> 4 * i & 7) & 0xff) << 8 * i;
    return result;
}

inline float exp2_of(float x) { return std::exp2(x); }

inline float reciprocal(float x) { return 1 / x; }

inline float rsqrtf(float x) { return 1 / std::sqrt(x); }

inline u32 multiply_add_bf16(u32 a, u32 b, u32 sum) {
    const float2 x = unpack_bf16(a), y = unpack_bf16(b), z = unpack_bf16(sum);
    return pack_bf16(x.x * y.x + z.x, x.y * y.y + z.y);
}

inline int dot4(u32 a, u32 b, int sum) {
    for (int i = 0; i < 32; i += 8) sum += (signed char)(a >> i) * (signed char)(b >> i);
    return sum;
}

inline void widen_fp8(u16 bytes, float* numbers) {
    for (int i = 0; i < 2; i++) {
        const u8 byte = bytes >> 8 * i;
        const int exponent = byte >> 3 & 15, mantissa = byte & 7;
        const float size = exponent ? std::ldexp(8 + mantissa, exponent - 10) : std::ldexp(mantissa, -9);
        numbers[i] = byte >> 7 ? -size : size;
    }
}

namespace emulation {

inline std::function<void()> entry;

inline void run_fiber() {
    entry();
    self->is_done = true;
    swapcontext(&self->context, &scheduler);
}

// Whether all threads have ended; false if they wait for each other.
inline bool launch(int grid, int threads, size_t shared, unsigned seed, std::function<void()> kernel) {
    std::mt19937 random(seed);
    entry = kernel;
    num_threads = threads;
    blocks.assign(grid, {});
    fibers.clear();
    fibers.resize(grid * threads);
    copies.clear();
    for (Block& block : blocks) {
        block.shared.assign(shared + 1024, (char)0xff);
        block.warps.resize(threads / 32);
    }
    for (int i = 0; i < grid * threads; i++) {
        Fiber& fiber = fibers[i];
        fiber.stack.reset(new char[STACK]);
        fiber.block = i / threads, fiber.thread = i % threads;
        getcontext(&fiber.context);
        fiber.context.uc_stack.ss_sp = fiber.stack.get();
        fiber.context.uc_stack.ss_size = STACK;
        fiber.context.uc_link = nullptr;
        makecontext(&fiber.context, run_fiber, 0);
    }
    std::vector<Fiber*> waiting;
    for (Fiber& fiber : fibers) waiting.push_back(&fiber);
    while (!waiting.empty()) {
        bool is_alive = !copies.empty();
        std::shuffle(waiting.begin(), waiting.end(), random);
        for (Fiber* fiber : waiting) {
            if (fiber->is_ready && !fiber->is_ready()) continue;
            is_alive = true;
            self = fiber;
            swapcontext(&scheduler, &fiber->context);
        }
        waiting.erase(std::remove_if(waiting.begin(), waiting.end(), [](Fiber* fiber) { return fiber->is_done; }), waiting.end());
        for (size_t arriving = (copies.size() + 1) / 2; arriving; arriving--) {
            std::swap(copies[random() % copies.size()], copies.back());
            const Copy copy = copies.back();
            copies.pop_back();
            copy.arrive();
            if (copy.barrier) {
                barrier(copy.barrier).bytes -= (int)copy.bytes;
                settle(barrier(copy.barrier));
            } else {
                copy.sender->groups[copy.group]--;
            }
        }
        if (!is_alive) return false;
    }
    return true;
}

}  // namespace emulation
