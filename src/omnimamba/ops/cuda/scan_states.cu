// The states that enter the chunks of a scan, and the gradients of those that leave them, for heads of 64 channels in bf16:
// `states_kernel` of ops/triton/ssd_backward.py, of which this is the faster form on Hopper.
//
// Both are the recurrence state <- decay of the chunk * state + (scaled x)^T B, forwards with x and B, backwards with dy and C. A block has
// two heads at a time, one for each of two warpgroups, in one of the directions; a third warpgroup copies what comes next to shared memory.
//
// The including code defines D_STATE (64 or 128).

constexpr int HEADS = 2;  // of a block, one for each warpgroup
constexpr int NUM_STAGES = 3, NUM_SENT = 3;  // chunks on their way in, and states on their way out
constexpr int THREADS = (HEADS + 1) * GROUP;
enum { FORWARDS, BACKWARDS };

struct Arguments {
    TensorMap x[2];               // and dy: [b, l, h * HEADDIM]
    TensorMap B[2];               // and C: [b, l, g * D_STATE]
    TensorMap states[2];          // [1, b * chunks * h * HEADDIM, D_STATE], of chunks before them, and gradients of those after them
    const float* decays;          // [b, chunks, h, 6, Q], see `decays_kernel`
    const float* first[2];        // [b, h, HEADDIM, D_STATE], where a direction starts, or null
    float* dinitial;              // the same, where the second ends
    int b, h, l, heads_per_group;
};

struct Stage {
    char boxes[BOXES + HEADS][BOX];  // B and x of the heads
    float scales[HEADS][2][Q];       // from the chunk's start; in the direction that is walked
    char padding[1024 - HEADS * 2 * Q * 4 % 1024];

    __device__ __forceinline__ char* B(int i = 0) { return boxes[i]; }
    __device__ __forceinline__ char* x(int head) { return boxes[BOXES + head]; }
};

struct Shared {
    Stage stages[NUM_STAGES];
    char states[NUM_SENT][HEADS][BOXES * BOX];  // on their way out
    u64 full[NUM_STAGES], empty[NUM_STAGES];
};

static_assert(sizeof(Stage) % 1024 == 0 && sizeof(Shared) + 1024 <= SHARED_BYTES);

// What a block works on, one after the other: two heads of a row in one direction.
struct Walk {
    int index, direction, row, head, chunks;

    __device__ __forceinline__ Walk(const Arguments& arguments, int index) : index(index) {
        const int pairs = arguments.h / HEADS;
        direction = index / (arguments.b * pairs);
        row = index / pairs % arguments.b, head = index % pairs * HEADS;
        chunks = (arguments.l + Q - 1) / Q;
    }

    __device__ __forceinline__ bool is_one() const { return direction <= BACKWARDS; }

    __device__ __forceinline__ Walk next(const Arguments& arguments) const { return {arguments, index + (int)gridDim.x}; }

    // The chunk after `num` others.
    __device__ __forceinline__ int chunk(int num) const { return direction == FORWARDS ? num : chunks - 1 - num; }

    // Of a head among those of all chunks.
    __device__ __forceinline__ long long place(const Arguments& arguments, int chunk, int head) const {
        return ((long long)row * chunks + chunk) * arguments.h + head;
    }
};

__device__ void bring(const Arguments& arguments, Shared& shared) {
    constexpr u32 BYTES = (BOXES + HEADS) * BOX + HEADS * 2 * Q * sizeof(float);
    u32 num = 0;
    for (Walk walk(arguments, blockIdx.x); walk.is_one(); walk = walk.next(arguments)) {
        const int group = walk.head / arguments.heads_per_group;
        for (int i_chunk = 0; i_chunk < walk.chunks; i_chunk++, num++) {
            const int chunk = walk.chunk(i_chunk);
            Stage& stage = shared.stages[num % NUM_STAGES];
            u64* full = expect_stage(shared.full, shared.empty, num, BYTES);
            for (int i = 0; i < BOXES; i++) {
                box_copy(stage.B(i), arguments.B[walk.direction], group * D_STATE + 64 * i, chunk * Q, walk.row, full);
            }
            for (int i = 0; i < HEADS; i++) {
                const float* decays = arguments.decays + walk.place(arguments, chunk, walk.head + i) * 6 * Q;
                const float* own = decays + (walk.direction == FORWARDS ? 5 : 3) * Q;
                bulk_copy((char*)stage.scales[i][0], (const char*)(decays + 3 * Q), Q * sizeof(float), full);
                bulk_copy((char*)stage.scales[i][1], (const char*)own, Q * sizeof(float), full);
                box_copy(stage.x(i), arguments.x[walk.direction], (walk.head + i) * HEADDIM, chunk * Q, walk.row, full);
            }
        }
    }
}

__device__ void walk_chunks(const Arguments& arguments, Shared& shared) {
    const int group = threadIdx.x / GROUP, lane = threadIdx.x % 32;
    const bool stores = threadIdx.x % GROUP == 0;
    u32 num = 0;
#pragma unroll 1
    for (Walk walk(arguments, blockIdx.x); walk.is_one(); walk = walk.next(arguments)) {
        const int head = walk.head + group;
        const long long index = ((long long)walk.row * arguments.h + head) * HEADDIM * D_STATE;
        const float* first = arguments.first[walk.direction];
        State state;
        each_pair([&](int i, int place) {
            const float2 two = first ? *(const float2*)(first + index + place) : make_float2(0, 0);
            state[i] = two.x, state[i + 1] = two.y;
        });
#pragma unroll 1
        for (int i_chunk = 0; i_chunk < walk.chunks; i_chunk++, num++) {
            Stage& stage = shared.stages[num % NUM_STAGES];
            char* out = shared.states[num % NUM_SENT][group];
            if (stores) bulk_wait_read<NUM_SENT - 1>();  // what stood there before
            group_sync(group);
            put(state, out);
            visible_to_copies();
            group_sync(group);
            if (stores) {
                const int row = (int)walk.place(arguments, walk.chunk(i_chunk), head) * HEADDIM;
                for (int i = 0; i < BOXES; i++) box_store(arguments.states[walk.direction], 64 * i, row, 0, out + i * BOX);
                bulk_commit();
            }
            barrier_wait(&shared.full[num % NUM_STAGES], num / NUM_STAGES & 1);
            const float* scales = stage.scales[group][1];
            const float decay = stage.scales[group][0][Q - 1];
            float2 own[8];
#pragma unroll
            for (int i = 0; i < 8; i++) own[i] = *(const float2*)(scales + 8 * i + first_column());
            u32 factors[4][4];
            scaled_columns(stage.x(group), own, factors);
#pragma unroll
            for (int i = 0; i < 4 * COLUMNS; i++) state[i] *= decay;
            products_begin();
            add_product(state, factors, tile_at(stage.B()));
            products_end();
            products_wait<0>(state);
            __syncwarp();
            if (lane == 0) barrier_arrive(&shared.empty[num % NUM_STAGES]);
        }
        if (walk.direction == BACKWARDS) {
            each_pair([&](int i, int place) { *(float2*)(arguments.dinitial + index + place) = make_float2(state[i], state[i + 1]); });
        }
    }
    if (stores) bulk_wait_all();
}

extern "C" __global__ void __launch_bounds__(THREADS, 1) scan_states(const __grid_constant__ Arguments arguments) {
    Shared& shared = tiles_of_block<Shared>();
    if (threadIdx.x == 0) {
        init_ring(shared.full, shared.empty, HEADS * WARPS);
        barriers_ready();
    }
    __syncthreads();
    if (warp_index() < HEADS * WARPS) {
        walk_chunks(arguments, shared);
    } else if (threadIdx.x == HEADS * GROUP) {
        bring(arguments, shared);
    }
}
