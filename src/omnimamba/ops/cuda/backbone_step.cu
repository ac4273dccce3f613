// One position of the whole Mamba-2 backbone and its heads, for a batch of few rows, in one launch: a block per multiprocessor, all of
// them at work at once.
//
// At few rows the time is that of reading the weights. So one warp of a block does nothing but stream the block's rows of all matrices,
// in the order of their use, through a ring of shared memory (bulk copies that complete on mbarriers); it never waits for a result, only
// for a free stage. What the other warps wait for other blocks' numbers, they make up from the ring, which is then full, so the memory
// rests little. (With weights of 8 bits it would rest half of the time, and just while blocks wait for each other it would be so busy that
// they wait for twice as long. So the stream keeps a PACE at which it spreads over the whole layer.) Behind such a stream a load from
// memory takes microseconds. So another warp brings most else that a layer needs to shared memory in time (`Extras`), and the rest is
// loaded into registers before a wait, for after it.
//
// A block has its share of the channels of d_inner: it alone computes their z and x and keeps their states. B, C, dt and LoRA's A u,
// which all blocks need, are shared out, too, and come first, so that they are everywhere when z and x are done. Blocks wait for
// numbers twice a layer: for y, and for the residual stream. No barrier is needed: numbers carry a tag (`publish`), and a block writes
// new ones only after it has received what all others made of the old ones.
//
// The definitions are `Mamba2Backbone.step` and what it calls. Activations are fp32 but for their lowest bit, and int8 weights are
// multiplied with 16 bits of them (`Digits`). Other numbers that are not weights of matrices are bf16 or fp32.
//
// The including code defines D_MODEL, D_INNER, NUM_HEADS, D_STATE, RANK, NUM_ROWS, LAYER_WEIGHTS and HEAD_WEIGHTS (Bf16, Int8 or Fp8),
// HALF_STATE (0 or 1), CHANNELS (of a warp in the state update), SLICES (warps that share a row), NUM_STAGES, STAGE_BYTES, PACE (cycles that
// a stage of a layer's weights takes at least), SHARED_BYTES, NUM_WARPS (that compute), UNIT (channels that no share divides: 16 bytes of
// anything) and SEGMENT (rows of a matrix whose sums are in shared memory at once).

__device__ constexpr int min_of(int a, int b) { return a < b ? a : b; }

constexpr int VECTOR = 8;                          // columns of a matrix that a lane takes at once
constexpr int CHUNK = SLICES * WARP * VECTOR;      // columns that the warps of a group take at once
constexpr int GROUPS = NUM_WARPS / SLICES;         // of SLICES warps, which take the stages of the ring in turn
constexpr int CONSUMERS = NUM_WARPS * WARP;
constexpr int THREADS = CONSUMERS + 2 * WARP;      // and the two warps that copy
constexpr int IN_FLIGHT = min_of(2, NUM_STAGES);   // stages under way at once: enough for the memory; behind more, numbers would wait
constexpr int AT_ONCE = 8;                         // sums that a thread has at once: registers bound them

constexpr int D_IN_PROJ = 2 * D_INNER + 2 * D_STATE + NUM_HEADS;
constexpr int NUM_COMMON = 2 * D_STATE + NUM_HEADS;  // rows of in_proj that all blocks need: B, C, dt
constexpr int D_COMMON = NUM_COMMON + 2 * RANK;
constexpr int HEADDIM = D_INNER / NUM_HEADS;
constexpr int BLOCK_CHANNELS = CHANNELS * NUM_WARPS;
constexpr int CONV_CHANNELS = 2 * D_STATE + BLOCK_CHANNELS;  // that a block computes: B, C and its own of x

static_assert(D_MODEL % CHUNK == 0 && D_INNER % CHUNK == 0);
static_assert(NUM_STAGES % GROUPS == 0);                                        // a stage is always the same group's
static_assert(CONV_CHANNELS <= CONSUMERS && SEGMENT * NUM_ROWS <= CONSUMERS);  // one for each thread
static_assert(D_COMMON % 4 == 0);                                               // received four at a time
static_assert(NUM_HEADS % UNIT == 0 && D_STATE % UNIT == 0 && BLOCK_CHANNELS % UNIT == 0);

// ---- what the host passes

struct Layer {
    const char* in_proj;          // [D_IN_PROJ, D_MODEL]
    const float* in_proj_scale;   // [D_IN_PROJ], null for bf16
    const char* lora_A;           // [2 * RANK, D_MODEL] bf16
    const u16* lora_B;            // [2, D_IN_PROJ, RANK]
    const u16* norm;              // [D_MODEL]
    const u16* conv_weight;       // [CONV_DIM, 4]
    const u16* conv_bias;         // [CONV_DIM]
    const float* A_log;           // [NUM_HEADS]
    const float* D;               // [NUM_HEADS]
    const float* dt_bias;         // [NUM_HEADS]
    const u16* gated_norm;        // [D_INNER]
    const char* out_proj;         // [D_MODEL, D_INNER]
    const float* out_proj_scale;  // [D_MODEL], null for bf16
    u16* conv;                    // [slots, CONV_DIM, 4]
    char* ssm;                    // [slots, NUM_HEADS, HEADDIM, D_STATE]
};

struct Head {
    const char* values;  // [size, D_MODEL]
    const float* scale;  // [size], null for bf16
    float* logits;       // [NUM_ROWS, size]
    long long size;
};

struct Rows {
    const long long* slots;   // [NUM_ROWS], negative: nothing is stored for the row
    const long long* is_t2i;  // [NUM_ROWS]
};

struct Arguments {
    const Layer* layers;
    const Head* heads;
    const u16* final_norm;  // [D_MODEL]
    Rows rows;
    const float* embedded;  // [NUM_ROWS, D_MODEL]
    float* residual;        // [NUM_ROWS, D_MODEL], published, as are the next two; all zero before the first launch
    float* common;          // [NUM_ROWS, D_COMMON]
    float* y;               // [NUM_ROWS, D_INNER]
    u32* counters;          // [3]: the last tags of the residual stream and of all else; blocks that have ended
    long long conv_slot, ssm_slot;  // numbers from one slot to the next
    int num_layers, num_heads;
    float eps, lora_scaling;
};

// ---- what a block has of it

struct Share {
    int first, num;

    // As even a part of n things as can be.
    __device__ explicit Share(int n) {
        const int each = n / gridDim.x, more = n % gridDim.x, block = blockIdx.x;
        first = block * each + min(block, more);
        num = each + (block < more);
    }

    __device__ Share(int first, int num) : first(first), num(num) {}
};

// Whole units of channels; the first blocks have one more.
__device__ __forceinline__ Share channels_of_block() {
    const Share units(D_INNER / UNIT);
    return {units.first * UNIT, units.num * UNIT};
}

// Of the rows that all blocks need, so many that a block has as many rows as any other, counted from the last block. First those of
// in_proj, then LoRA's A.
struct CommonShare {
    int first, num_projected, first_lora, num_lora;

    __device__ CommonShare() {
        const int grid = gridDim.x, each = D_INNER / UNIT / grid, num_large = D_INNER / UNIT % grid;
        const int rows = (2 * D_INNER + D_COMMON + grid - 1) / grid;
        const int room = max(0, rows - 2 * UNIT * each), room_large = max(0, rows - 2 * UNIT * (each + 1));
        const int from_last = grid - 1 - blockIdx.x, num_small = grid - num_large;
        const int begin = min(from_last, num_small) * room + max(0, from_last - num_small) * room_large;
        const int end = min(D_COMMON, begin + (from_last < num_small ? room : room_large));
        first = begin;
        num_projected = max(0, min(end, NUM_COMMON) - begin);
        first_lora = max(0, begin - NUM_COMMON);
        num_lora = max(0, end - max(begin, NUM_COMMON));
    }
};

// What a layer needs beside its matrices, as it is copied.
struct Extras {
    u16 taps[CONV_CHANNELS][4], past[NUM_ROWS][CONV_CHANNELS][4];
    u16 bias[CONV_CHANNELS];
    u16 lora[NUM_ROWS][CONV_CHANNELS][RANK], z_lora[NUM_ROWS][BLOCK_CHANNELS][RANK], dt_lora[NUM_ROWS][NUM_HEADS][RANK];
    float A_log[NUM_HEADS], D[NUM_HEADS], dt_bias[NUM_HEADS];
    char states[NUM_ROWS][BLOCK_CHANNELS][D_STATE * STATE_BYTES];
};

struct Shared {
    Extras extras;                    // of one layer
    float common[NUM_ROWS][D_COMMON];  // B, C, dt before the convolution, and A u
    float vector[NUM_ROWS][D_INNER];  // what is multiplied
    float partial[2][SEGMENT][NUM_ROWS][SLICES];
    float squares[NUM_ROWS][NUM_WARPS], largest[NUM_ROWS][NUM_WARPS];
    float z_x[2][NUM_ROWS][BLOCK_CHANNELS];
    float B_C[NUM_ROWS][2 * D_STATE], newest[NUM_ROWS][2 * D_STATE];  // after the convolution and before
    float decay[NUM_ROWS][BLOCK_CHANNELS], input[NUM_ROWS][BLOCK_CHANNELS];
    float skipped[NUM_ROWS][BLOCK_CHANNELS], gate[NUM_ROWS][BLOCK_CHANNELS];
    u64 full[NUM_STAGES], empty[NUM_STAGES];
    u64 extras_full, extras_empty, common_full, common_wanted;
};

static_assert(sizeof(Shared) <= SHARED_BYTES);

__device__ __forceinline__ void sync_consumers() { named_sync<CONSUMERS>(); }

// ---- the ring

__device__ __forceinline__ char* stage_at(int stage) { return dynamic_shared() + stage * STAGE_BYTES; }

// A place in the ring and how often, modulo 2, it has been gone round.
struct Place {
    int stage = 0;
    u32 lap = 0;

    __device__ __forceinline__ void advance(int num) {
        stage += num;
        if (stage >= NUM_STAGES) stage -= NUM_STAGES, lap ^= 1;
    }
};

// The streaming thread's side: the next stage, and the oldest that may be under way.
struct Source {
    Shared& shared;
    Place place, oldest;
    int in_flight = 0;
    int pace = PACE;  // cycles for a stage
    u64 next = 0;     // when the next one may set out

    // The rows [first, first + num) of a matrix of so many columns.
    template <class Weights>
    __device__ __forceinline__ void stream(const char* matrix, int first, int num, int columns) {
        const int row_bytes = columns * Weights::size;
        const char* from = matrix + (long long)first * row_bytes;
#pragma unroll 1
        for (int left = num * row_bytes; left > 0; left -= STAGE_BYTES, from += STAGE_BYTES) {
            const u32 bytes = min(left, STAGE_BYTES);
            u64* full = &shared.full[place.stage];
            barrier_wait(&shared.empty[place.stage], place.lap ^ 1);  // at once in the first lap
            if (in_flight == IN_FLIGHT) {
                barrier_wait(&shared.full[oldest.stage], oldest.lap);
                oldest.advance(1);
            } else {
                in_flight++;
            }
            pause_until(next);
            next = cycles() + bytes * pace / STAGE_BYTES;
            barrier_expect(full, bytes);
            bulk_copy(stage_at(place.stage), from, bytes, full);
            place.advance(1);
        }
    }
};

// The other warps' side: the next stage of this warp's group, and how many stages of other groups come before it.
struct Sink {
    Shared& shared;
    int slice = warp_index() % SLICES, group = warp_index() / SLICES;
    Place place;
    int ahead = group;
    u32 segment = 0;  // of all matrices so far

    __device__ explicit Sink(Shared& shared) : shared(shared) { place.advance(group); }
};

__device__ __forceinline__ float largest_of(float4 n) { return fmaxf(fmaxf(fabsf(n.x), fabsf(n.y)), fmaxf(fabsf(n.z), fabsf(n.w))); }

// ---- matrices: a lane's numbers of a row, VECTOR of every CHUNK, and what they are multiplied with

template <class Number, int NUM>
struct Array {
    Number values[NUM];
};

template <int K>
struct Vector;
template <int K>
struct Digits;

// Those that are widened to fp32: `widen` takes VECTOR numbers.
template <class Weights>
struct Widened {
    static constexpr bool is_fixed_point = false;
    template <int K>
    using Operand = Vector<K>;

    template <int NUM>
    static __device__ __forceinline__ Array<float, NUM> load(const char* row) {
        Array<float, NUM> w;
#pragma unroll
        for (int j = 0; j < NUM; j += VECTOR) Weights::widen(row + j / VECTOR * CHUNK * Weights::size, &w.values[j]);
        return w;
    }
};

struct Bf16 : Widened<Bf16> {
    static constexpr int size = 2;

    static __device__ __forceinline__ void widen(const char* from, float* numbers) {
        const uint4 pairs = *(const uint4*)from;
        const u32 bits[4] = {pairs.x, pairs.y, pairs.z, pairs.w};
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const float2 two = unpack_bf16(bits[i]);
            numbers[2 * i] = two.x, numbers[2 * i + 1] = two.y;
        }
    }
};

struct Fp8 : Widened<Fp8> {
    static constexpr int size = 1;

    static __device__ __forceinline__ void widen(const char* from, float* numbers) {
        const uint2 bytes = *(const uint2*)from;
        widen_fp8((u16)bytes.x, numbers);
        widen_fp8((u16)(bytes.x >> 16), numbers + 2);
        widen_fp8((u16)bytes.y, numbers + 4);
        widen_fp8((u16)(bytes.y >> 16), numbers + 6);
    }
};

struct Int8 {
    static constexpr int size = 1;
    static constexpr bool is_fixed_point = true;
    template <int K>
    using Operand = Digits<K>;

    template <int NUM>
    static __device__ __forceinline__ Array<u32, NUM / 4> load(const char* row) {
        Array<u32, NUM / 4> w;
#pragma unroll
        for (int j = 0; j < NUM; j += VECTOR) {
            const uint2 bytes = *(const uint2*)(row + j / VECTOR * CHUNK * size);
            w.values[j / 4] = bytes.x, w.values[j / 4 + 1] = bytes.y;
        }
        return w;
    }
};

constexpr bool IS_FIXED_POINT = LAYER_WEIGHTS::is_fixed_point || HEAD_WEIGHTS::is_fixed_point;

// ---- normed vectors

// Of the columns that threads receive, four in a row are the same thread's.
constexpr int ROUND = 4 * CONSUMERS;

// A thread's weights of a norm, for the columns that it receives.
template <int K>
struct NormWeights {
    static constexpr int NUM = (K + ROUND - 1) / ROUND;
    uint2 words[NUM] = {};

    __device__ __forceinline__ explicit NormWeights(const u16* norm) {
        const int column = 4 * (int)threadIdx.x;
        if (column >= K) return;
#pragma unroll
        for (int j = 0; j < NUM; j++) words[j] = *(const uint2*)(norm + j * ROUND + column);
    }
};

// What makes the rows of `Shared::vector` normed ones; the largest number of each then, where IS_FIXED_POINT.
struct Normed {
    float scale[NUM_ROWS], largest[NUM_ROWS];
};

// The published rows x [NUM_ROWS, K] to `Shared::vector`, which has yet to be scaled.
template <int K>
__device__ __forceinline__ Normed receive_normed(const float* x, u32 tag, const NormWeights<K>& norm, float eps, Shared& shared) {
    constexpr int NUM = NormWeights<K>::NUM;
    const int column = 4 * (int)threadIdx.x;
#pragma unroll
    for (int b = 0; b < NUM_ROWS; b++) {
        float squares = 0, largest = 0;
        if (column < K) {
            const float* from = x + b * K + column;
            if (threadIdx.x % WARP == 0) receive(peek(from), from, tag);  // while words are awaited, few ask for them
            __syncwarp();
            uint4 words[NUM];
#pragma unroll
            for (int j = 0; j < NUM; j++) words[j] = peek4(from + j * ROUND);
#pragma unroll
            for (int j = 0; j < NUM; j++) {
                const float4 n = receive4(words[j], from + j * ROUND, tag), weights = four_bf16(norm.words[j]);
                squares += n.x * n.x + n.y * n.y + n.z * n.z + n.w * n.w;
                const float4 out = make_float4(n.x * weights.x, n.y * weights.y, n.z * weights.z, n.w * weights.w);
                *(float4*)&shared.vector[b][j * ROUND + column] = out;
                if (IS_FIXED_POINT) largest = fmaxf(largest, largest_of(out));
            }
        }
        squares = sum_lanes(squares);
        if (IS_FIXED_POINT) largest = largest_of_lanes(largest);
        if (threadIdx.x % WARP == 0) {
            shared.squares[b][threadIdx.x / WARP] = squares;
            shared.largest[b][threadIdx.x / WARP] = largest;
        }
    }
    sync_consumers();
    Normed result;
#pragma unroll
    for (int b = 0; b < NUM_ROWS; b++) {
        float squares = 0, largest = 0;
#pragma unroll
        for (int warp = 0; warp < NUM_WARPS; warp += 4) {
            const float4 four = *(const float4*)&shared.squares[b][warp];
            squares += four.x + four.y + four.z + four.w;
            if (IS_FIXED_POINT) largest = fmaxf(largest, largest_of(*(const float4*)&shared.largest[b][warp]));
        }
        result.scale[b] = rsqrtf(squares * (1.0f / K) + eps);
        result.largest[b] = largest * result.scale[b];
    }
    return result;
}

// ---- the vectors that are multiplied, spread over the threads of a group: number [j * VECTOR + i] of a lane is that of column
// j * CHUNK + (slice * WARP + lane) * VECTOR + i

__device__ __forceinline__ int first_column() { return threadIdx.x % (SLICES * WARP) * VECTOR; }

template <int K>
struct Vector {
    static constexpr int SIZE = K, NUM = K / (SLICES * WARP);
    float values[NUM_ROWS][NUM];

    __device__ __forceinline__ Vector(const Shared& shared, const Normed& normed) {
#pragma unroll
        for (int b = 0; b < NUM_ROWS; b++) {
#pragma unroll
            for (int i = 0; i < NUM; i += 4) {
                const float4 n = four_of(shared.vector[b], i);
                values[b][i] = n.x * normed.scale[b], values[b][i + 1] = n.y * normed.scale[b];
                values[b][i + 2] = n.z * normed.scale[b], values[b][i + 3] = n.w * normed.scale[b];
            }
        }
    }

    // The numbers [i, i + 4) of a lane.
    static __device__ __forceinline__ float4 four_of(const float* vector, int i) {
        return *(const float4*)&vector[i / VECTOR * CHUNK + first_column() + i % VECTOR];
    }

    // A lane's part of the product of a matrix's row with row b.
    __device__ __forceinline__ float times(const Array<float, NUM>& weights, int b) const {
        float sum = 0;
#pragma unroll
        for (int i = 0; i < NUM; i++) sum = fmaf(weights.values[i], values[b][i], sum);
        return sum;
    }
};

// A vector as integers of 16 bits, of which the largest is LARGEST: 256 * high + low, each of eight bits with a sign, four to a word.
// Products with int8 are exact; the rounding is at most sqrt(K / 12) / LARGEST of the vector's norm, less than bf16's.
template <int K>
struct Digits {
    static constexpr int SIZE = K, NUM = K / (SLICES * WARP), LARGEST = 127 * 256 + 127;
    static_assert(NUM < 0x7fffffff / (127 * LARGEST));
    u32 high[NUM_ROWS][NUM / 4], low[NUM_ROWS][NUM / 4];
    float unit[NUM_ROWS];

    __device__ __forceinline__ Digits(const Shared& shared, const Normed& normed) {
#pragma unroll
        for (int b = 0; b < NUM_ROWS; b++) {
            const float largest = normed.largest[b] + 1e-30f, per_unit = normed.scale[b] * LARGEST * reciprocal(largest);
            unit[b] = largest * (1.0f / LARGEST);
#pragma unroll
            for (int i = 0; i < NUM / 4; i++) {
                // The lowest 16 bits of each are the integer plus 128: the upper byte is the high digit, the lower one the low digit plus 128.
                const float4 n = Vector<K>::four_of(shared.vector[b], 4 * i);
                const u32 first = __byte_perm(integer_bits(n.x * per_unit + 128), integer_bits(n.y * per_unit + 128), 0x5140);
                const u32 second = __byte_perm(integer_bits(n.z * per_unit + 128), integer_bits(n.w * per_unit + 128), 0x5140);
                high[b][i] = __byte_perm(first, second, 0x7632);
                low[b][i] = __byte_perm(first, second, 0x5410) ^ 0x80808080u;
            }
        }
    }

    // Of the nearest integer, below 2**22, in the lowest 22.
    static __device__ __forceinline__ u32 integer_bits(float value) { return bits_of(value + (3 << 22)); }

    __device__ __forceinline__ float times(const Array<u32, NUM / 4>& weights, int b) const {
        int sum = 0;
#pragma unroll
        for (int i = 0; i < NUM / 4; i++) sum = dot4(weights.values[i], high[b][i], sum);
        sum *= 256;
#pragma unroll
        for (int i = 0; i < NUM / 4; i++) sum = dot4(weights.values[i], low[b][i], sum);
        return sum * unit[b];
    }
};

// ---- products of the streamed matrices with vectors

// Of a product's segment of `num` rows, a thread emits one at most.
struct Emitted {
    int row = threadIdx.x / NUM_ROWS, b = threadIdx.x % NUM_ROWS;
};

// prepare(row, b) of this thread's row of a product's first segment. Called before a wait, it loads what is used after the wait.
template <class Prepare>
__device__ __forceinline__ auto prepared(int num_rows, Prepare prepare) {
    const Emitted emitted;
    return emitted.row < min(num_rows, SEGMENT) ? prepare(emitted.row, emitted.b) : decltype(prepare(0, 0)){};
}

// Calls emit(row, b, product, prepare(row, b)) for the next `num_rows` rows in the ring, `row` counted from 0; each in one thread.
// early: what `prepared` gave.
template <class Weights, class Operand, class Prepare, class Early, class Emit>
__device__ __forceinline__ void multiply(Sink& sink, const Operand& x, int num_rows, Prepare prepare, Early early, Emit emit) {
    constexpr int K = Operand::SIZE;
    constexpr int TILE = STAGE_BYTES / (K * Weights::size);          // rows of a stage
    constexpr int PASS = min_of(TILE, AT_ONCE / NUM_ROWS);            // of those, at once
    constexpr int STAGES = AT_ONCE / NUM_ROWS / PASS;                 // of the group, at once
    constexpr int NUM = STAGES * PASS * NUM_ROWS;
    static_assert(TILE >= 1 && TILE % PASS == 0 && SEGMENT % TILE == 0 && (STAGES == 1 || PASS == TILE));
    const int lane = threadIdx.x % WARP;
    const Emitted emitted;
    Shared& shared = sink.shared;
#pragma unroll 1
    for (int first = 0; first < num_rows; first += SEGMENT, sink.segment++) {
        const int num = min(SEGMENT, num_rows - first), num_tiles = (num + TILE - 1) / TILE;
        if (first > 0 && emitted.row < num) early = prepare(first + emitted.row, emitted.b);
        auto& partial = shared.partial[sink.segment % 2];
        int tile = sink.ahead;
#pragma unroll 1
        while (tile < num_tiles) {
#pragma unroll 1
            for (int pass = 0; pass < TILE; pass += PASS) {
                float sums[NUM] = {};
#pragma unroll
                for (int s = 0; s < STAGES; s++) {
                    if (tile + s * GROUPS >= num_tiles) break;
                    barrier_wait(&shared.full[sink.place.stage], sink.place.lap);
                    const char* rows = stage_at(sink.place.stage) + (pass * K + first_column()) * Weights::size;
#pragma unroll
                    for (int r = 0; r < PASS; r++) {
                        const auto weights = Weights::template load<Operand::NUM>(rows + r * K * Weights::size);
#pragma unroll
                        for (int b = 0; b < NUM_ROWS; b++) sums[(s * PASS + r) * NUM_ROWS + b] = x.times(weights, b);
                    }
                    if (pass + PASS < TILE) continue;
                    __syncwarp();
                    if (lane == 0) barrier_arrive(&shared.empty[sink.place.stage]);
                    sink.place.advance(GROUPS);
                }
                sum_lanes_of<NUM>(sums, lane);
                const int which = lane / (WARP / NUM), row = which / NUM_ROWS;
                const int to = (tile + row / PASS * GROUPS) * TILE + pass + row % PASS;
                if (lane % (WARP / NUM) == 0 && to < num) partial[to][which % NUM_ROWS][sink.slice] = sums[0];
            }
            tile += min(STAGES, (num_tiles - tile + GROUPS - 1) / GROUPS) * GROUPS;
        }
        sink.ahead = tile - num_tiles;
        sync_consumers();
        if (emitted.row < num) {
            float sum = 0;
#pragma unroll
            for (int s = 0; s < SLICES; s++) sum += partial[emitted.row][emitted.b][s];
            emit(first + emitted.row, emitted.b, sum, early);
        }
    }
}

// ---- convolution and state update

struct Update {
    const Arguments& arguments;
    Shared& shared;
    Share channels = channels_of_block();
    int warp = warp_index();
    long long slots[NUM_ROWS];
    int tasks[NUM_ROWS];

    __device__ Update(const Arguments& arguments, Shared& shared) : arguments(arguments), shared(shared) {
        for (int b = 0; b < NUM_ROWS; b++) {
            slots[b] = arguments.rows.slots[b];
            tasks[b] = arguments.rows.is_t2i[b] != 0;
        }
    }

    __device__ __forceinline__ u16* conv_at(const Layer& layer, int b, int channel) const {
        return layer.conv + slots[b] * arguments.conv_slot + channel * 4;
    }

    __device__ __forceinline__ char* state_at(const Layer& layer, int b, int channel) const {
        return layer.ssm + (slots[b] * arguments.ssm_slot + (long long)(channels.first + channel) * D_STATE) * STATE_BYTES;
    }

    // Everything about one channel of the convolution, which is B's or C's, or the block's own; x's part of its state.
    __device__ __forceinline__ void convolve_channel(const Layer& layer) const {
        const Extras& extras = shared.extras;
        const int n = threadIdx.x, own = n - 2 * D_STATE, channel = channels.first + own, head = channel / HEADDIM;
        if (own >= channels.num) return;
#pragma unroll
        for (int b = 0; b < NUM_ROWS; b++) {
            if (slots[b] < 0) continue;
            const float* common = shared.common[b];
            float low[RANK];  // A u, scaled
#pragma unroll
            for (int r = 0; r < RANK; r++) low[r] = common[NUM_COMMON + tasks[b] * RANK + r] * arguments.lora_scaling;
            const float newest = (own < 0 ? common[n] : shared.z_x[1][b][own]) + times(extras.lora[b][n], low);
            const uint2 past = *(const uint2*)extras.past[b][n];
            const float value = convolve(past, newest, *(const uint2*)extras.taps[n], bf16_at(&extras.bias[n]));
            if (own < 0) {
                shared.B_C[b][n] = value;
                shared.newest[b][n] = newest;
                continue;
            }
            const float z = shared.z_x[0][b][own] + times(extras.z_lora[b][own], low);
            const float dt = softplus(common[2 * D_STATE + head] + times(extras.dt_lora[b][head], low) + extras.dt_bias[head]);
            *(uint2*)conv_at(layer, b, channel) = shifted(past, newest);
            shared.decay[b][own] = expf(-dt * expf(extras.A_log[head]));
            shared.input[b][own] = dt * value;
            shared.skipped[b][own] = value * extras.D[head];
            shared.gate[b][own] = silu(z);
        }
    }

    // B's and C's part of the convolution's state, once all blocks have read it.
    __device__ __forceinline__ void shift_B_C(const Layer& layer) const {
        const int n = threadIdx.x;
        if (n >= 2 * D_STATE) return;
        for (int b = 0; b < NUM_ROWS; b++) {
            if (slots[b] < 0) continue;
            *(uint2*)conv_at(layer, b, D_INNER + n) = shifted(*(const uint2*)shared.extras.past[b][n], shared.newest[b][n]);
        }
    }

    // New states, and y * silu(z) [NUM_ROWS, D_INNER]. The states are written last: nobody waits for them.
    __device__ __forceinline__ void update_states(const Layer& layer, u32 tag) const {
        const int lane = threadIdx.x % WARP;
        float states[NUM_ROWS][CHANNELS][PER_LANE];
#pragma unroll
        for (int b = 0; b < NUM_ROWS; b++) {
            float y[CHANNELS] = {};
            if (slots[b] >= 0) {
                const int last = max(0, channels.num - 1);  // what is not the block's is computed in vain: branches would keep sums apart
#pragma unroll
                for (int i = 0; i < CHANNELS; i++) y[i] = update_state(b, min(warp * CHANNELS + i, last), states[b][i]);
            }
#pragma unroll
            for (int i = 0; i < CHANNELS; i++) {
                const int channel = warp * CHANNELS + i;
                if (lane == 0 && channel < channels.num) publish(arguments.y + b * D_INNER + channels.first + channel, y[i], tag);
            }
        }
#pragma unroll
        for (int b = 0; b < NUM_ROWS; b++) {
#pragma unroll
            for (int i = 0; i < CHANNELS; i++) {
                const int channel = warp * CHANNELS + i;
                if (slots[b] < 0 || channel >= channels.num) continue;
                store_state(state_at(layer, b, channel) + lane * PER_LANE * STATE_BYTES, states[b][i]);
            }
        }
    }

    // A lane's part of a channel's new state, and the channel's y * silu(z).
    __device__ __forceinline__ float update_state(int b, int channel, float (&state)[PER_LANE]) const {
        const int first = threadIdx.x % WARP * PER_LANE;
        const float decay = shared.decay[b][channel], input = shared.input[b][channel];
        float y = 0;
        load_state(shared.extras.states[b][channel] + first * STATE_BYTES, state);
#pragma unroll
        for (int k = 0; k < PER_LANE; k++) {
            state[k] = fmaf(state[k], decay, input * shared.B_C[b][first + k]);
            y = fmaf(state[k], shared.B_C[b][D_STATE + first + k], y);
        }
        return (sum_lanes(y) + shared.skipped[b][channel]) * shared.gate[b][channel];
    }
};

// ---- the three kinds of warps

__device__ void stream_weights(const Arguments& arguments, Shared& shared) {
    Source source{shared};
    const CommonShare common;
    const Share channels = channels_of_block(), out_rows(D_MODEL);
#pragma unroll 1
    for (int i = 0; i < arguments.num_layers; i++) {
        const Layer& layer = arguments.layers[i];
        source.stream<Bf16>(layer.lora_A, common.first_lora, common.num_lora, D_MODEL);
        source.stream<LAYER_WEIGHTS>(layer.in_proj, 2 * D_INNER + common.first, common.num_projected, D_MODEL);
        source.stream<LAYER_WEIGHTS>(layer.in_proj, channels.first, channels.num, D_MODEL);             // z
        source.stream<LAYER_WEIGHTS>(layer.in_proj, D_INNER + channels.first, channels.num, D_MODEL);  // x
        source.stream<LAYER_WEIGHTS>(layer.out_proj, out_rows.first, out_rows.num, D_INNER);
    }
    source.pace = 0;
#pragma unroll 1
    for (int i = 0; i < arguments.num_heads; i++) {
        const Share rows((int)arguments.heads[i].size);
        source.stream<HEAD_WEIGHTS>(arguments.heads[i].values, rows.first, rows.num, D_MODEL);
    }
}

// Announces copies to a barrier, or makes them.
struct Copies {
    u64* barrier;
    u32 bytes = 0;
    bool is_rehearsal = true;

    __device__ __forceinline__ void add(void* to, const void* from, int size) {
        if (is_rehearsal) {
            bytes += size;
        } else if (size) {
            bulk_copy((char*)to, (const char*)from, size, barrier);
        }
    }
};

__device__ void copy_extras(const Arguments& arguments, const Layer& layer, const Update& update, Shared& shared) {
    Extras& extras = shared.extras;
    const int own = 2 * D_STATE, num = update.channels.num, first = update.channels.first;
    Copies copies{&shared.extras_full};
#pragma unroll 1
    for (int pass = 0; pass < 2; pass++) {
        copies.add(extras.taps[0], layer.conv_weight + D_INNER * 4, own * 8);
        copies.add(extras.taps[own], layer.conv_weight + first * 4, num * 8);
        copies.add(&extras.bias[0], layer.conv_bias + D_INNER, own * 2);
        copies.add(&extras.bias[own], layer.conv_bias + first, num * 2);
        copies.add(extras.A_log, layer.A_log, sizeof(extras.A_log));
        copies.add(extras.D, layer.D, sizeof(extras.D));
        copies.add(extras.dt_bias, layer.dt_bias, sizeof(extras.dt_bias));
#pragma unroll
        for (int b = 0; b < NUM_ROWS; b++) {
            if (update.slots[b] < 0) continue;
            const u16* lora = layer.lora_B + (long long)update.tasks[b] * D_IN_PROJ * RANK;
            copies.add(extras.past[b][0], update.conv_at(layer, b, D_INNER), own * 8);
            copies.add(extras.past[b][own], update.conv_at(layer, b, first), num * 8);
            copies.add(extras.lora[b][0], lora + 2 * D_INNER * RANK, own * RANK * 2);
            copies.add(extras.lora[b][own], lora + (D_INNER + first) * RANK, num * RANK * 2);
            copies.add(extras.z_lora[b], lora + first * RANK, num * RANK * 2);
            copies.add(extras.dt_lora[b], lora + (2 * D_INNER + own) * RANK, sizeof(extras.dt_lora[b]));
            copies.add(extras.states[b], update.state_at(layer, b, 0), num * D_STATE * STATE_BYTES);
        }
        if (pass == 0) barrier_expect(copies.barrier, copies.bytes);
        copies.is_rehearsal = false;
    }
}

// What all blocks share of a layer, once it is published, by one warp.
__device__ __forceinline__ void receive_common(const float* from, u32 tag, Shared& shared) {
    constexpr int TURN = 4 * WARP, NUM = (NUM_ROWS * D_COMMON + TURN - 1) / TURN;
    const int first = threadIdx.x % WARP * 4;
    uint4 words[NUM];
#pragma unroll
    for (int j = 0; j < NUM; j++) {
        if (first + j * TURN < NUM_ROWS * D_COMMON) words[j] = peek4(from + first + j * TURN);
    }
#pragma unroll
    for (int j = 0; j < NUM; j++) {
        const int n = first + j * TURN;
        if (n < NUM_ROWS * D_COMMON) *(float4*)(&shared.common[0][0] + n) = receive4(words[j], from + n, tag);
    }
}

// A warp's part of a layer: copies of its extras, ahead of their use, then what all blocks share, as it is published.
__device__ void bring_extras(const Arguments& arguments, Shared& shared) {
    const Update update(arguments, shared);
    const int lane = threadIdx.x % WARP;
    u32 tag = arguments.counters[1];
#pragma unroll 1
    for (int i = 0; i < arguments.num_layers; i++) {
        tag ^= 1;
        if (i > 0) barrier_wait(&shared.extras_empty, (i - 1) & 1);
        if (lane == 0) copy_extras(arguments, arguments.layers[i], update, shared);
        __syncwarp();
        barrier_wait(&shared.common_wanted, i & 1);
        receive_common(arguments.common, tag, shared);
        __syncwarp();
        if (lane == 0) barrier_arrive(&shared.common_full);
    }
}

template <class Weights>
__device__ __forceinline__ float scale_at(const float* scale, int row) {
    return Weights::size == 1 ? scale[row] : 1.0f;
}

struct Scaled {
    float scale, addend;
};

__device__ void compute(const Arguments& arguments, Shared& shared) {
    Sink sink(shared);
    const Update update(arguments, shared);
    const float eps = arguments.eps;
    const CommonShare common;
    const Share& channels = update.channels;
    const Share out_rows(D_MODEL);
    const bool speaks = threadIdx.x % WARP == 0;
    u32 residual_tag = arguments.counters[0] ^ 1, tag = arguments.counters[1];
    if (threadIdx.x < NUM_ROWS * out_rows.num) {
        const int at = threadIdx.x / out_rows.num * D_MODEL + out_rows.first + threadIdx.x % out_rows.num;
        publish(arguments.residual + at, arguments.embedded[at], residual_tag);
    }
    NormWeights<D_MODEL> norm(arguments.layers[0].norm);
#pragma unroll 1
    for (int i = 0; i < arguments.num_layers; i++) {
        const Layer& layer = arguments.layers[i];
        const auto common_scale = [&](int row, int) {
            return scale_at<LAYER_WEIGHTS>(layer.in_proj_scale, 2 * D_INNER + common.first + row);
        };
        const auto z_x_scale = [&](int row, int) {
            const int part = row >= channels.num;
            return scale_at<LAYER_WEIGHTS>(layer.in_proj_scale, channels.first + row + part * (D_INNER - channels.num));
        };
        const auto out_scale = [&](int row, int b) {
            row += out_rows.first;
            return Scaled{scale_at<LAYER_WEIGHTS>(layer.out_proj_scale, row), arguments.residual[b * D_MODEL + row]};
        };
        const auto early_common = prepared(common.num_projected, common_scale);
        const auto early_z_x = prepared(2 * channels.num, z_x_scale);
        const Normed normed_x = receive_normed<D_MODEL>(arguments.residual, residual_tag, norm, eps, shared);
        residual_tag ^= 1;
        tag ^= 1;
        if (speaks) barrier_arrive(&shared.common_wanted);
        if (common.num_lora) {
            multiply<Bf16>(
                sink, Vector<D_MODEL>(shared, normed_x), common.num_lora, [](int, int) { return 0; }, 0,
                [&](int row, int b, float sum, int) {
                    publish(arguments.common + b * D_COMMON + NUM_COMMON + common.first_lora + row, sum, tag);
                });
        }
        const LAYER_WEIGHTS::Operand<D_MODEL> x(shared, normed_x);
        multiply<LAYER_WEIGHTS>(sink, x, common.num_projected, common_scale, early_common, [&](int row, int b, float sum, float scale) {
            publish(arguments.common + b * D_COMMON + common.first + row, sum * scale, tag);
        });
        const NormWeights<D_INNER> gated_norm(layer.gated_norm);
        const auto early_out = prepared(out_rows.num, out_scale);
        multiply<LAYER_WEIGHTS>(sink, x, 2 * channels.num, z_x_scale, early_z_x, [&](int row, int b, float sum, float scale) {
            const int part = row >= channels.num;
            shared.z_x[part][b][row - part * channels.num] = sum * scale;
        });
        barrier_wait(&shared.extras_full, i & 1);
        barrier_wait(&shared.common_full, i & 1);
        sync_consumers();
        update.convolve_channel(layer);
        sync_consumers();
        update.update_states(layer, tag);
        norm = NormWeights<D_MODEL>(i + 1 < arguments.num_layers ? arguments.layers[i + 1].norm : arguments.final_norm);
        const Normed normed_y = receive_normed<D_INNER>(arguments.y, tag, gated_norm, eps, shared);
        if (i % gridDim.x == blockIdx.x) update.shift_B_C(layer);
        __syncwarp();
        if (speaks) barrier_arrive(&shared.extras_empty);
        const LAYER_WEIGHTS::Operand<D_INNER> y(shared, normed_y);
        multiply<LAYER_WEIGHTS>(sink, y, out_rows.num, out_scale, early_out, [&](int row, int b, float sum, Scaled early) {
            publish(arguments.residual + b * D_MODEL + out_rows.first + row, early.addend + sum * early.scale, residual_tag);
        });
    }
    const HEAD_WEIGHTS::Operand<D_MODEL> x(shared, receive_normed<D_MODEL>(arguments.residual, residual_tag, norm, eps, shared));
#pragma unroll 1
    for (int j = 0; j < arguments.num_heads; j++) {
        const Head& head = arguments.heads[j];
        const Share rows((int)head.size);
        const auto scale_of = [&](int row, int) { return scale_at<HEAD_WEIGHTS>(head.scale, rows.first + row); };
        multiply<HEAD_WEIGHTS>(sink, x, rows.num, scale_of, prepared(rows.num, scale_of), [&](int row, int b, float sum, float scale) {
            head.logits[b * head.size + rows.first + row] = sum * scale;
        });
    }
    if (threadIdx.x == 0 && last_of_grid(arguments.counters + 2)) {
        arguments.counters[0] = residual_tag;
        arguments.counters[1] = tag;
        arguments.counters[2] = 0;
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, 1) backbone_step(const __grid_constant__ Arguments arguments) {
    Shared& shared = *(Shared*)(dynamic_shared() + NUM_STAGES * STAGE_BYTES);
    bool is_idle = true;  // as all blocks find: then the step is over
    for (int b = 0; b < NUM_ROWS; b++) is_idle = is_idle && arguments.rows.slots[b] < 0;
    if (threadIdx.x == 0) {
        for (int i = 0; i < NUM_STAGES; i++) {
            barrier_init(&shared.full[i], 1);
            barrier_init(&shared.empty[i], SLICES);
        }
        barrier_init(&shared.extras_full, 1);
        barrier_init(&shared.extras_empty, NUM_WARPS);
        barrier_init(&shared.common_wanted, NUM_WARPS);
        barrier_init(&shared.common_full, 1);
        barriers_ready();
    }
    __syncthreads();
    if (is_idle) return;
    if (warp_index() < NUM_WARPS) {
        compute(arguments, shared);
    } else if (threadIdx.x == CONSUMERS) {
        stream_weights(arguments, shared);
    } else if (threadIdx.x >= CONSUMERS + WARP) {
        bring_extras(arguments, shared);
    }
}
