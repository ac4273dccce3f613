// The instructions of Hopper and later that the kernels use, as functions. tests/ops/cuda/emulation.h defines the same for a CPU.

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

extern __shared__ __align__(128) char dynamic_shared_memory[];

__device__ __forceinline__ char* dynamic_shared() { return dynamic_shared_memory; }

__device__ __forceinline__ u32 shared_address(const void* pointer) { return (u32)__cvta_generic_to_shared(pointer); }

// ---- mbarriers: a phase ends when `count` arrivals and all announced bytes have come

__device__ __forceinline__ void barrier_init(u64* barrier, u32 count) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(count) : "memory");
}

// What this thread has initialised may be used by the copy engine and, after the next __syncthreads, by the other threads.
__device__ __forceinline__ void barriers_ready() {
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

__device__ __forceinline__ void barrier_arrive(u64* barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}

__device__ __forceinline__ void barrier_expect(u64* barrier, u32 bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes) : "memory");
}

// Waits for the end of the barrier's phase of this parity: 0 for the first, third, ...
__device__ __forceinline__ void barrier_wait(u64* barrier, u32 parity) {
    asm volatile(
        "{\n"
        ".reg .pred done;\n"
        "again:\n"
        "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
        "@!done bra again;\n"
        "}" ::"r"(shared_address(barrier)),
        "r"(parity)
        : "memory");
}

// `bytes` (a multiple of 16, as the addresses are) from global to shared memory by the copy engine; the barrier counts them.
__device__ __forceinline__ void bulk_copy(char* to, const char* from, u32 bytes, u64* barrier) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(shared_address(to)),
                 "l"(from), "r"(bytes), "r"(shared_address(barrier))
                 : "memory");
}

// The same from shared to global memory; what this thread's warp has written there before must be `visible_to_copies`. Copies of a thread
// that `bulk_commit` ends are a group.
__device__ __forceinline__ void bulk_store(char* to, const char* from, u32 bytes) {
    asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(to), "r"(shared_address(from)), "r"(bytes) : "memory");
}

__device__ __forceinline__ void bulk_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }

// Until all but the last `num` groups of this thread have been read from shared memory.
template <int num>
__device__ __forceinline__ void bulk_wait_read() {
    asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(num) : "memory");
}

// Until all groups of this thread have been written.
__device__ __forceinline__ void bulk_wait_all() { asm volatile("cp.async.bulk.wait_group 0;" ::: "memory"); }

// What this thread has written to shared memory may be read by the copy engine, once threads have met.
__device__ __forceinline__ void visible_to_copies() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// ---- kernels one after the other: this one was started early (programmatic dependent launch), and so may be the next

__device__ __forceinline__ void start_next_kernel() { asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); }

__device__ __forceinline__ void wait_for_earlier_kernels() { asm volatile("griddepcontrol.wait;" ::: "memory"); }

// ---- threads of a block, blocks of a grid

// All of the first `threads` threads of the block.
template <int threads>
__device__ __forceinline__ void named_sync() {
    asm volatile("bar.sync 1, %0;" ::"n"(threads) : "memory");
}

// What the counter has been before it was raised by one.
__device__ __forceinline__ u32 count_up(u32* counter) { return atomicAdd(counter, 1); }

// Whether this is the last block to say so.
__device__ __forceinline__ bool last_of_grid(u32* counter) { return count_up(counter) == gridDim.x - 1; }

// The warp's index in its block, known to the compiler to be the same for all lanes.
__device__ __forceinline__ int warp_index() { return __shfl_sync(0xffffffffu, threadIdx.x / 32, 0); }

// The lanes of the warp for which it is so.
__device__ __forceinline__ u32 ballot(bool is_so) { return __ballot_sync(0xffffffffu, is_so); }

__device__ __forceinline__ float shuffle_xor(float value, int mask) { return __shfl_xor_sync(0xffffffffu, value, mask); }

// The largest of a warp's numbers, none of which is negative.
__device__ __forceinline__ float largest_of_lanes(float value) {
    return __uint_as_float(__reduce_max_sync(0xffffffffu, __float_as_uint(value)));
}

// ---- time: in cycles of the multiprocessor

__device__ __forceinline__ u64 cycles() { return clock64(); }

__device__ __forceinline__ void pause_until(u64 time) {
    while (cycles() < time) {}
}

// ---- numbers from block to block: the lowest bit of a word says whether it is the new one, so nothing else has to be waited for

__device__ __forceinline__ void publish(float* to, float value, u32 tag) {
    const u32 bits = (__float_as_uint(value) & ~1u) | tag;
    asm volatile("st.relaxed.gpu.global.u32 [%0], %1;" ::"l"(to), "r"(bits) : "memory");
}

__device__ __forceinline__ u32 peek(const float* from) {
    u32 word;
    asm volatile("ld.relaxed.gpu.global.u32 %0, [%1];" : "=r"(word) : "l"(from) : "memory");
    return word;
}

__device__ __forceinline__ uint4 peek4(const float* from) {
    uint4 words;
    asm volatile("ld.relaxed.gpu.global.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(words.x), "=r"(words.y), "=r"(words.z), "=r"(words.w)
                 : "l"(from)
                 : "memory");
    return words;
}

// What was peeked, once it has this tag.
__device__ __forceinline__ float receive(u32 word, const float* from, u32 tag) {
    while ((word ^ tag) & 1) word = peek(from);
    return __uint_as_float(word);
}

__device__ __forceinline__ float4 receive4(uint4 words, const float* from, u32 tag) {
    while (((words.x ^ tag) | (words.y ^ tag) | (words.z ^ tag) | (words.w ^ tag)) & 1) words = peek4(from);
    return make_float4(__uint_as_float(words.x), __uint_as_float(words.y), __uint_as_float(words.z), __uint_as_float(words.w));
}

// ---- numbers

__device__ __forceinline__ float float_of(u32 bits) { return __uint_as_float(bits); }

__device__ __forceinline__ u32 bits_of(float value) { return __float_as_uint(value); }

__device__ __forceinline__ u16 to_bf16(float value) {
    u16 bits;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(value));
    return bits;
}

// Two numbers in a word, the first in its lower half.
__device__ __forceinline__ u32 pack_bf16(float first, float second) {
    u32 pair;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(second), "f"(first));
    return pair;
}

__device__ __forceinline__ float2 unpack_bf16(u32 pair) { return make_float2(float_of(pair << 16), float_of(pair & 0xffff0000u)); }

__device__ __forceinline__ float exp2_of(float x) {
    float result;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
    return result;
}

__device__ __forceinline__ float reciprocal(float x) {
    float result;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
    return result;
}

// a b + sum, of two bf16 each.
__device__ __forceinline__ u32 multiply_add_bf16(u32 a, u32 b, u32 sum) {
    u32 result;
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(result) : "r"(a), "r"(b), "r"(sum));
    return result;
}

// sum + the products of four int8 with four others.
__device__ __forceinline__ int dot4(u32 a, u32 b, int sum) {
    int result;
    asm("dp4a.s32.s32 %0, %1, %2, %3;" : "=r"(result) : "r"(a), "r"(b), "r"(sum));
    return result;
}

// Two float8 e4m3.
__device__ __forceinline__ void widen_fp8(u16 bytes, float* numbers) {
    asm("{\n"
        ".reg .b32 both;\n"
        ".reg .b16 low, high;\n"
        "cvt.rn.f16x2.e4m3x2 both, %2;\n"
        "mov.b32 {low, high}, both;\n"
        "cvt.f32.f16 %0, low;\n"
        "cvt.f32.f16 %1, high;\n"
        "}"
        : "=f"(numbers[0]), "=f"(numbers[1])
        : "h"(bytes));
}
