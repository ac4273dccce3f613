// The Mamba-2 scan forwards, for heads of 64 channels in bf16: `forward_kernel` of ops/triton/ssd.py, of which this is the faster form on
// Hopper. The definition is `plain_ssd_chunk_scan` in ops/ssd.py.
//
// A block has two heads at a time, one for each of two warpgroups, which share B and C, and goes through their chunks with the state in
// registers. One thread of a third warpgroup copies tiles of the chunks ahead to shared memory. With a gate, y is multiplied by silu(z) and
// the norm's weight on its way out, and the sums of its squares are kept.
//
// The including code defines D_STATE (64 or 128) and GATED.

constexpr int HEADS = 2;  // of a block, one for each warpgroup
constexpr int NUM_STAGES = 2;
constexpr int THREADS = (HEADS + 1) * GROUP;

struct Arguments {
    TensorMap x, B, C, z, y;  // x, z, y: [b, l, h * HEADDIM], y in boxes of 16 positions; B, C: [b, l, g * D_STATE]
    const float* log_decay;   // [b, h, padded], see `chunk_decays`
    const float* log_input;   // the same
    const float* D;           // [h]
    const float* initial;     // [b, h, HEADDIM, D_STATE], or null
    const float* added;       // [spans - 1, b, h, HEADDIM, D_STATE], what all spans but the last add to the state
    const float* decays;      // [spans - 1, b, h]
    const u16* weight;        // [h * HEADDIM], of the gated norm
    float* squares;           // [b, l, h]
    float* final;             // [b, h, HEADDIM, D_STATE]
    int b, h, l, span, spans, padded, heads_per_group;
};

struct Stage {
    char boxes[2 * BOXES + (1 + GATED) * HEADS][BOX];  // C, B, x and z of the heads
    float decay[HEADS][Q], input[HEADS][Q];

    __device__ __forceinline__ char* C(int i = 0) { return boxes[i]; }
    __device__ __forceinline__ char* B(int i = 0) { return boxes[BOXES + i]; }
    __device__ __forceinline__ char* x(int head) { return boxes[2 * BOXES + head]; }
    __device__ __forceinline__ char* z(int head) { return boxes[2 * BOXES + HEADS + head]; }
};

struct Shared {
    Stage stages[NUM_STAGES];
    char y[HEADS][BOX];                  // on its way out
    char states[2][HEADS][BOXES * BOX];  // of two chunks in turn, [p, n] in bf16
    u64 full[NUM_STAGES], empty[NUM_STAGES];
};

static_assert(sizeof(Stage) % 1024 == 0 && sizeof(Shared) + 1024 <= SHARED_BYTES);

// What a block works on, one after the other: two heads of a row, and a span of positions.
struct Walk {
    int index, row, head, span, first, chunks;

    __device__ __forceinline__ Walk(const Arguments& arguments, int index) : index(index) {
        const int pairs = arguments.h / HEADS, pair = index / arguments.spans;
        span = index % arguments.spans;
        row = pair / pairs, head = pair % pairs * HEADS;
        first = span * arguments.span;
        chunks = (min(arguments.l - first, arguments.span) + Q - 1) / Q;
    }

    __device__ __forceinline__ bool is_one(const Arguments& arguments) const {
        return index < arguments.b * (arguments.h / HEADS) * arguments.spans;
    }

    __device__ __forceinline__ Walk next(const Arguments& arguments) const { return {arguments, index + (int)gridDim.x}; }
};

__device__ void bring(const Arguments& arguments, Shared& shared) {
    u32 num = 0;
    for (Walk walk(arguments, blockIdx.x); walk.is_one(arguments); walk = walk.next(arguments)) {
        const int group = walk.head / arguments.heads_per_group;
        for (int chunk = 0; chunk < walk.chunks; chunk++, num++) {
            const int position = walk.first + chunk * Q;
            Stage& stage = shared.stages[num % NUM_STAGES];
            u64* full = expect_stage(shared.full, shared.empty, num, sizeof(Stage));
            for (int i = 0; i < BOXES; i++) {
                box_copy(stage.C(i), arguments.C, group * D_STATE + i * 64, position, walk.row, full);
                box_copy(stage.B(i), arguments.B, group * D_STATE + i * 64, position, walk.row, full);
            }
            for (int i = 0; i < HEADS; i++) {
                const long long logs = ((long long)walk.row * arguments.h + walk.head + i) * arguments.padded + position;
                bulk_copy((char*)stage.decay[i], (const char*)(arguments.log_decay + logs), Q * sizeof(float), full);
                bulk_copy((char*)stage.input[i], (const char*)(arguments.log_input + logs), Q * sizeof(float), full);
                box_copy(stage.x(i), arguments.x, (walk.head + i) * HEADDIM, position, walk.row, full);
                if (GATED) box_copy(stage.z(i), arguments.z, (walk.head + i) * HEADDIM, position, walk.row, full);
            }
        }
    }
}

// ---- what a warpgroup computes

// The state at the start of a walk: the recurrence over the spans before it.
__device__ void start(const Arguments& arguments, const Walk& walk, int head, State& state) {
    const long long index = (long long)walk.row * arguments.h + head, all = (long long)arguments.b * arguments.h;
    each_pair([&](int i, int place) {
        const float2 two = arguments.initial ? *(const float2*)(arguments.initial + index * HEADDIM * D_STATE + place) : make_float2(0, 0);
        state[i] = two.x, state[i + 1] = two.y;
    });
    for (int span = 0; span < walk.span; span++) {
        const float decay = arguments.decays[span * all + index];
        each_pair([&](int i, int place) {
            const float2 two = *(const float2*)(arguments.added + (span * all + index) * HEADDIM * D_STATE + place);
            state[i] = fmaf(state[i], decay, two.x), state[i + 1] = fmaf(state[i + 1], decay, two.y);
        });
    }
}

__device__ __forceinline__ float silu(float x) { return x * reciprocal(1 + exp2_of(-1.44269504f * x)); }

// What a lane needs of the logarithms: of its rows of scores and of its columns.
struct Logs {
    float total, decays[2];
    float2 inputs[8];

    __device__ __forceinline__ Logs(const float* decay, const float* input) : total(decay[Q - 1]) {
        decays[0] = decay[first_row()], decays[1] = decay[first_row() + 8];
#pragma unroll
        for (int i = 0; i < 8; i++) inputs[i] = *(const float2*)(input + 8 * i + first_column());
    }
};

// The scores of a warp's rows, times what each input is worth at each later position; D x comes with the product.
template <int warp>
__device__ __forceinline__ void make_factors(const float (&scores)[32], const Logs& logs, float skip, u32 (&factors)[4][4]) {
#pragma unroll
    for (int i = 0; i < 8; i++) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            u32& factor = factors[i / 2][i % 2 * 2 + half];
            const int diagonal = 2 * warp + half;
            if (i > diagonal) {
                factor = 0;
                continue;
            }
            float first = scores[4 * i + 2 * half] * exp2_of(logs.decays[half] + logs.inputs[i].x);
            float second = scores[4 * i + 2 * half + 1] * exp2_of(logs.decays[half] + logs.inputs[i].y);
            if (i == diagonal) {
                const int later = (int)threadIdx.x % 32 / 4 - first_column();
                first = later < 0 ? 0 : later == 0 ? first + skip : first;
                second = later < 1 ? 0 : later == 1 ? second + skip : second;
            }
            factor = pack_bf16(first, second);
        }
    }
}

__device__ void walk_chunks(const Arguments& arguments, Shared& shared) {
    const int group = threadIdx.x / GROUP, lane = threadIdx.x % 32, warp = warp_index() % WARPS;
    char* out = shared.y[group];
    u32 num = 0;
#pragma unroll 1
    for (Walk walk(arguments, blockIdx.x); walk.is_one(arguments); walk = walk.next(arguments)) {
        const int head = walk.head + group;
        const float skip = arguments.D[head];
        u32 weights[8];
#pragma unroll
        for (int i = 0; i < 8; i++) weights[i] = GATED ? *(const u32*)(arguments.weight + head * HEADDIM + 8 * i + first_column()) : 0;
        float* squares_at = arguments.squares + ((long long)walk.row * arguments.l + walk.first) * arguments.h + head;
        int left = arguments.l - walk.first;
        State state;
        start(arguments, walk, head, state);
#pragma unroll 1
        for (int chunk = 0; chunk < walk.chunks; chunk++, num++, left -= Q) {
            Stage& stage = shared.stages[num % NUM_STAGES];
            char* entering = shared.states[num % 2][group];
            put(state, entering);
            visible_to_copies();
            group_sync(group);
            barrier_wait(&shared.full[num % NUM_STAGES], num / NUM_STAGES & 1);

            float scores[32], y[32];
            const u64 C = tile_at(stage.C()), B = tile_at(stage.B()), x = tile_at(stage.x(group)), before = tile_at(entering);
            products_begin();
            multiply_rows<D_STATE>(scores, C, B);
            products_end();
            multiply_rows<D_STATE>(y, C, before);
            products_end();

            const Logs logs(stage.decay[group], stage.input[group]);
            u32 added[4][4], factors[4][4], z[8][2];
            float2 worth[8];  // of each input at the chunk's end
#pragma unroll
            for (int i = 0; i < 8; i++) {
                worth[i] = make_float2(exp2_of(logs.total + logs.inputs[i].x), exp2_of(logs.total + logs.inputs[i].y));
            }
            scaled_columns(stage.x(group), worth, added);
#pragma unroll
            for (int i = 0; i < 8; i++) {
#pragma unroll
                for (int half = 0; half < 2; half++) z[i][half] = GATED ? *pair_at(stage.z(group), i, half) : 0;
            }
            products_wait<1>(scores);
            if (warp == 0) make_factors<0>(scores, logs, skip, factors);
            if (warp == 1) make_factors<1>(scores, logs, skip, factors);
            if (warp == 2) make_factors<2>(scores, logs, skip, factors);
            if (warp == 3) make_factors<3>(scores, logs, skip, factors);
            products_wait<0>(y);
            const float from_start[2] = {exp2_of(logs.decays[0]), exp2_of(logs.decays[1])}, through = exp2_of(logs.total);
#pragma unroll
            for (int i = 0; i < 32; i++) y[i] *= from_start[i / 2 % 2];
            products_begin();
            add_product(y, factors, x);
            products_end();
#pragma unroll
            for (int i = 0; i < 4 * COLUMNS; i++) state[i] *= through;
            products_begin();
            add_product(state, added, B);
            products_end();

            float gates[32];
            if (GATED) {
#pragma unroll
                for (int i = 0; i < 16; i++) {
                    const float2 two = unpack_bf16(z[i / 2][i % 2]);
                    gates[2 * i] = silu(two.x), gates[2 * i + 1] = silu(two.y);
                }
            }
            products_wait<1>(y);
            if (lane == 0) bulk_wait_read<0>();  // the warp's rows of the chunk before
            __syncwarp();
            float squares[2] = {0, 0};
#pragma unroll
            for (int i = 0; i < 8; i++) {
#pragma unroll
                for (int half = 0; half < 2; half++) {
                    float2 two = make_float2(y[4 * i + 2 * half], y[4 * i + 2 * half + 1]);
                    if (GATED) {
                        const float2 weight = unpack_bf16(weights[i]);
                        two.x *= gates[4 * i + 2 * half], two.y *= gates[4 * i + 2 * half + 1];
                        squares[half] = fmaf(two.x, two.x, fmaf(two.y, two.y, squares[half]));
                        two.x *= weight.x, two.y *= weight.y;
                    }
                    *pair_at(out, i, half) = pack_bf16(two.x, two.y);
                }
            }
            if (GATED) {
#pragma unroll
                for (int half = 0; half < 2; half++) {
                    const float sum = sum_of_row(squares[half]);
                    if (lane % 4 == 0 && first_row() + 8 * half < left) squares_at[(first_row() + 8 * half) * arguments.h] = sum;
                }
                squares_at += Q * arguments.h;
            }
            visible_to_copies();
            __syncwarp();
            if (lane == 0) {
                box_store(arguments.y, head * HEADDIM, walk.first + chunk * Q + 16 * warp, walk.row, out + 16 * warp * ROW);
                bulk_commit();
            }
            products_wait<0>(state);
            if (lane == 0) barrier_arrive(&shared.empty[num % NUM_STAGES]);
        }
        if (walk.span == arguments.spans - 1) {
            float* final = arguments.final + ((long long)walk.row * arguments.h + head) * HEADDIM * D_STATE;
            each_pair([&](int i, int place) { *(float2*)(final + place) = make_float2(state[i], state[i + 1]); });
        }
    }
    if (lane == 0) bulk_wait_all();
}

extern "C" __global__ void __launch_bounds__(THREADS, 1) scan(const __grid_constant__ Arguments arguments) {
    Shared& shared = tiles_of_block<Shared>();
    if (threadIdx.x == 0) {
        init_ring(shared.full, shared.empty, HEADS * WARPS);
        barriers_ready();
    }
    __syncthreads();
    if (warp_index() < HEADS * WARPS) {
        take_registers<232>();
        walk_chunks(arguments, shared);
    } else {
        leave_registers<40>();
        if (threadIdx.x == HEADS * GROUP) bring(arguments, shared);
    }
}
