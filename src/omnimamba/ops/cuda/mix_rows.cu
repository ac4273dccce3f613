// One position of everything between a layer's two projections, for a batch of many rows: task LoRA, convolution, state update, gate, and
// the gated norm but for the division by its root mean square, which commutes with the projection that follows.
//
// At many rows the time is that of reading and writing the states. So each of most warps brings tiles of states to its own ring of
// shared memory, updates them there and sends them back (bulk copies both ways): a tile is some channels of a row, one piece of memory,
// and no warp waits for another's. What a channel needs beside its state other warps make, a chunk of channels ahead (`Channel`).
//
// The tiles of all rows that are not padding are dealt to blocks a chunk at a time where there are many, so that all blocks go through
// memory side by side: 1.5 % faster than a contiguous part for each. The first states travel before the kernels before this one have ended,
// whose results only the preparing warps read.
//
// The definitions are `Mamba2Backbone.step` and what it calls. Activations are bf16 outside of this kernel and fp32 in it. B and C enter
// the convolution's state in a later kernel, for all blocks of a row read it.
//
// The including code defines D_INNER, NUM_HEADS, D_STATE, RANK, HALF_STATE, NUM_WARPS (that update states), NUM_PREPARING (warps),
// NUM_STAGES (of a warp's ring), TILE_BYTES, CHUNK (channels that are prepared at once) and MIN_ROUNDS (in which chunks are dealt).

constexpr int D_IN_PROJ = 2 * D_INNER + 2 * D_STATE + NUM_HEADS;
constexpr int HEADDIM = D_INNER / NUM_HEADS;
constexpr int CHANNEL_BYTES = D_STATE * STATE_BYTES;
constexpr int TILE = TILE_BYTES / CHANNEL_BYTES;  // channels
constexpr int ROW_TILES = D_INNER / TILE, CHUNK_TILES = CHUNK / TILE;
constexpr int AT_ONCE = 8;                             // channels whose states a lane has in registers
constexpr int PREPARING = NUM_PREPARING * WARP;        // threads
constexpr int OWN = CHUNK / PREPARING;                 // channels of a chunk that a thread prepares
constexpr int THREADS = NUM_WARPS * WARP + PREPARING;  // and so many rows at most

static_assert(TILE % AT_ONCE == 0 && HEADDIM % TILE == 0 && CHUNK % TILE == 0 && CHUNK % PREPARING == 0);

// ---- what the host passes

struct Arguments {
    const u16* projected;     // [rows, projected_row]: z, x, B, C, dt, A u of MMU, A u of T2I
    const u16* lora_B;        // [2, D_IN_PROJ, RANK]
    const u16* conv_weight;   // [CONV_DIM, 4]
    const u16* conv_bias;     // [CONV_DIM]
    const float* A_log;       // [NUM_HEADS]
    const float* D;           // [NUM_HEADS]
    const float* dt_bias;     // [NUM_HEADS]
    u16* conv;                // [slots, CONV_DIM, 4]
    char* ssm;                // [slots, NUM_HEADS, HEADDIM, D_STATE]
    const long long* slots;   // [rows], negative: nothing is stored for the row
    const long long* is_t2i;  // [rows]
    const u16* norm;          // [D_INNER], the weight of the gated norm
    u16* gated;               // [rows, D_INNER]: y * silu(z), times the norm's weight
    float* squares;           // [rows, ROW_TILES]: of y * silu(z), the sums over tiles
    float* newest;            // [rows, 2 * D_STATE]: B and C before the convolution
    long long projected_row, conv_slot, ssm_slot;  // numbers from one row, or slot, to the next
    int num_rows;
    float lora_scaling;
};

// ---- what a block has of it

struct Row {
    int index, slot;
};

// What the update of a channel's state needs.
struct Channel {
    float decay, input;  // read together
    float skipped, gate, weight, padding;
};

struct Shared {
    Channel channels[2][CHUNK];     // of two chunks in turn
    float B_C[2][2 * D_STATE];      // of their rows
    Row rows[THREADS];              // that are not padding
    int num_live[THREADS / WARP];
    u64 full[NUM_WARPS][NUM_STAGES];
    u64 ready[2], consumed[2];      // chunks
};

constexpr int RING_BYTES = NUM_WARPS * NUM_STAGES * TILE_BYTES;
static_assert(sizeof(Shared) <= SHARED_BYTES);

// The block's tiles, which it counts from 0, and where they are among those of all rows: a chunk of every round, and of what is left, less
// than a round, or of all, if there are few rounds, an equal contiguous part.
struct Deal {
    int in_rounds, last;  // tiles of the block: those of rounds are [0, in_rounds), all are [0, last)
    int rest;             // where its part of the rest begins

    __device__ explicit Deal(int num_rows) {
        const long long tiles = (long long)num_rows * ROW_TILES, full = tiles / CHUNK_TILES / gridDim.x;
        const long long rounds = full < MIN_ROUNDS ? 0 : full;
        const long long before = rounds * CHUNK_TILES * gridDim.x, left = tiles - before;
        in_rounds = (int)rounds * CHUNK_TILES;
        rest = (int)(before + left * blockIdx.x / gridDim.x);
        last = in_rounds + (int)(before + left * (blockIdx.x + 1) / gridDim.x) - rest;
    }

    // Among those of all rows.
    __device__ __forceinline__ int place(int tile) const {
        if (tile >= in_rounds) return rest + tile - in_rounds;
        return (tile / CHUNK_TILES * (int)gridDim.x + (int)blockIdx.x) * CHUNK_TILES + tile % CHUNK_TILES;
    }
};

// The chunks of a block: tiles of one row.
struct Chunks : Deal {
    int first = 0, end;  // tiles of the chunk are [first, end)
    int start;           // the place of the first
    u32 num = 0;         // chunks before this one

    __device__ explicit Chunks(int num_rows) : Deal(num_rows) { cut(); }

    __device__ __forceinline__ void cut() {
        start = place(first);
        const int row_end = first + (row() + 1) * ROW_TILES - start;
        end = min(row_end, first < in_rounds ? first / CHUNK_TILES * CHUNK_TILES + CHUNK_TILES : min(last, first + CHUNK_TILES));
    }

    __device__ __forceinline__ int row() const { return start / ROW_TILES; }

    __device__ __forceinline__ int channel() const { return start % ROW_TILES * TILE; }

    __device__ __forceinline__ void advance() {
        first = end;
        num++;
        cut();
    }
};

// Fills `Shared::rows` and gives their number.
__device__ __forceinline__ int find_rows(const Arguments& arguments, Shared& shared) {
    const int row = threadIdx.x, warp = row / WARP, lane = row % WARP;
    const long long slot = row < arguments.num_rows ? arguments.slots[row] : -1;
    const u32 live = ballot(slot >= 0);
    if (lane == 0) shared.num_live[warp] = __popc(live);
    __syncthreads();
    int before = 0, num = 0;
#pragma unroll
    for (int i = 0; i < THREADS / WARP; i++) {
        if (i < warp) before += shared.num_live[i];
        num += shared.num_live[i];
    }
    if (slot >= 0) shared.rows[before + __popc(live & ((1u << lane) - 1))] = Row{row, (int)slot};
    __syncthreads();
    return num;
}

// ---- the preparing warps


__device__ void prepare(const Arguments& arguments, Shared& shared, Chunks chunks) {
    const int thread = threadIdx.x - NUM_WARPS * WARP;
    wait_for_earlier_kernels();  // a kernel that ended before the one ahead of it would let the next one in too early
#pragma unroll 1
    for (; chunks.first < chunks.last; chunks.advance()) {
        const int half = chunks.num % 2;
        if (chunks.num >= 2) barrier_wait(&shared.consumed[half], chunks.num / 2 - 1 & 1);
        const Row row = shared.rows[chunks.row()];
        const u16* projected = arguments.projected + row.index * arguments.projected_row;
        const int task = arguments.is_t2i[row.index] != 0;
        const u16* lora = arguments.lora_B + task * D_IN_PROJ * RANK;
        u16* conv = arguments.conv + row.slot * arguments.conv_slot;
        float low[RANK];  // A u, scaled
#pragma unroll
        for (int r = 0; r < RANK; r++) low[r] = bf16_at(projected + D_IN_PROJ + task * RANK + r) * arguments.lora_scaling;
        const auto value_at = [&](int n) { return bf16_at(projected + n) + times(lora + n * RANK, low); };
        const auto convolved = [&](int channel, uint2 past, float newest) {
            return convolve(past, newest, *(const uint2*)(arguments.conv_weight + 4 * channel), bf16_at(arguments.conv_bias + channel));
        };
        for (int n = thread; n < 2 * D_STATE; n += PREPARING) {
            const float newest = value_at(2 * D_INNER + n);
            shared.B_C[half][n] = convolved(D_INNER + n, *(const uint2*)(conv + 4 * (D_INNER + n)), newest);
            if (chunks.channel() == 0) arguments.newest[row.index * 2 * D_STATE + n] = newest;
        }
        const int first = chunks.channel(), num = (chunks.end - chunks.first) * TILE;
        uint2 inputs[OWN];
        float z[OWN], newest[OWN], dt[OWN];
#pragma unroll
        for (int j = 0; j < OWN; j++) {  // all loads before the first store
            const int channel = first + min(j * PREPARING + thread, num - 1), head = channel / HEADDIM;
            inputs[j] = *(const uint2*)(conv + 4 * channel);
            z[j] = value_at(channel);
            newest[j] = value_at(D_INNER + channel);
            dt[j] = value_at(2 * D_INNER + 2 * D_STATE + head) + arguments.dt_bias[head];
        }
#pragma unroll
        for (int j = 0; j < OWN; j++) {
            const int i = j * PREPARING + thread, channel = first + i, head = channel / HEADDIM;
            if (i >= num) break;
            const float x = convolved(channel, inputs[j], newest[j]), step = softplus(dt[j]);
            *(uint2*)(conv + 4 * channel) = shifted(inputs[j], newest[j]);
            shared.channels[half][i] = {expf(-step * expf(arguments.A_log[head])), step * x, x * arguments.D[head], silu(z[j]),
                                       bf16_at(arguments.norm + channel), 0};
        }
        barrier_arrive(&shared.ready[half]);
    }
}

// ---- the warps that update states

// A warp's tiles, those of the block that are its turn, on their way through its ring.
struct Ring {
    const Arguments& arguments;
    Shared& shared;
    int warp = warp_index(), lane = threadIdx.x % WARP;
    Deal deal;
    int next;       // tile to bring
    int stage = 0;  // of the tile that is updated
    u32 lap = 0;

    __device__ Ring(const Arguments& arguments, Shared& shared, const Chunks& chunks)
        : arguments(arguments), shared(shared), deal(chunks), next(warp) {
        for (int i = 0; i < NUM_STAGES; i++) bring(i);
    }

    __device__ __forceinline__ char* at(int stage) const { return dynamic_shared() + (warp * NUM_STAGES + stage) * TILE_BYTES; }

    __device__ __forceinline__ char* home(int place) const {
        const long long slot = shared.rows[place / ROW_TILES].slot;
        return arguments.ssm + slot * arguments.ssm_slot * STATE_BYTES + place % ROW_TILES * TILE_BYTES;
    }

    __device__ __forceinline__ void bring(int to) {
        if (next < deal.last && lane == 0) {
            barrier_expect(&shared.full[warp][to], TILE_BYTES);
            bulk_copy(at(to), home(deal.place(next)), TILE_BYTES, &shared.full[warp][to]);
        }
        next += NUM_WARPS;
    }

    __device__ __forceinline__ char* wait() const {
        barrier_wait(&shared.full[warp][stage], lap);
        return at(stage);
    }

    // Sends the tile back, and brings one into the stage of the tile before it, which is on its way by now.
    __device__ __forceinline__ void send(int place, bool is_first) {
        visible_to_copies();
        __syncwarp();
        if (lane == 0) {
            bulk_store(home(place), at(stage), TILE_BYTES);
            bulk_commit();
            bulk_wait_read<1>();
        }
        if (!is_first) bring(stage == 0 ? NUM_STAGES - 1 : stage - 1);
        if (++stage == NUM_STAGES) stage = 0, lap ^= 1;
    }
};

__device__ void update_states(const Arguments& arguments, Shared& shared, Chunks chunks) {
    Ring ring(arguments, shared, chunks);
    const int lane = ring.lane;
    bool is_first = true;
    int tile = ring.warp;
#pragma unroll 1
    for (; chunks.first < chunks.last; chunks.advance()) {
        const int half = chunks.num % 2, row = shared.rows[chunks.row()].index;
        barrier_wait(&shared.ready[half], chunks.num / 2 & 1);
        float B[PER_LANE], C[PER_LANE];
#pragma unroll
        for (int k = 0; k < PER_LANE; k++) {
            B[k] = shared.B_C[half][lane * PER_LANE + k];
            C[k] = shared.B_C[half][D_STATE + lane * PER_LANE + k];
        }
#pragma unroll 1
        for (; tile < chunks.end; tile += NUM_WARPS, is_first = false) {
            char* states = ring.wait() + lane * PER_LANE * STATE_BYTES;
            const int place = chunks.start + tile - chunks.first;
            const Channel* channels = &shared.channels[half][(tile - chunks.first) * TILE];
            u16* gated = arguments.gated + row * D_INNER + place % ROW_TILES * TILE;
            float squares = 0;
#pragma unroll
            for (int first = 0; first < TILE; first += AT_ONCE) {
                float state[AT_ONCE][PER_LANE], sums[AT_ONCE];
#pragma unroll
                for (int i = 0; i < AT_ONCE; i++) load_state(states + (first + i) * CHANNEL_BYTES, state[i]);
#pragma unroll
                for (int i = 0; i < AT_ONCE; i++) {
                    const float2 two = *(const float2*)&channels[first + i].decay;  // and input
                    sums[i] = 0;
#pragma unroll
                    for (int k = 0; k < PER_LANE; k++) {
                        state[i][k] = fmaf(state[i][k], two.x, two.y * B[k]);
                        sums[i] = fmaf(state[i][k], C[k], sums[i]);
                    }
                    store_state(states + (first + i) * CHANNEL_BYTES, state[i]);
                }
                sum_lanes_of<AT_ONCE>(sums, lane);
                const int own = first + lane / (WARP / AT_ONCE);
                const float y = (sums[0] + channels[own].skipped) * channels[own].gate;
                if (lane % (WARP / AT_ONCE) == 0) gated[own] = to_bf16(y * channels[own].weight);
                squares = fmaf(y, y, squares);
            }
#pragma unroll
            for (int mask = WARP / 2; mask >= WARP / AT_ONCE; mask /= 2) squares += shuffle_xor(squares, mask);
            if (lane == 0) arguments.squares[row * ROW_TILES + place % ROW_TILES] = squares;
            ring.send(place, is_first);
        }
        __syncwarp();
        if (lane == 0) barrier_arrive(&shared.consumed[half]);
    }
    if (lane == 0) bulk_wait_all();
}

extern "C" __global__ void __launch_bounds__(THREADS, 1) mix_rows(const __grid_constant__ Arguments arguments) {
    Shared& shared = *(Shared*)(dynamic_shared() + RING_BYTES);
    start_next_kernel();
    if (threadIdx.x == 0) {
        for (int i = 0; i < NUM_WARPS * NUM_STAGES; i++) barrier_init(&shared.full[0][0] + i, 1);
        for (int i = 0; i < 2; i++) {
            barrier_init(&shared.ready[i], PREPARING);
            barrier_init(&shared.consumed[i], NUM_WARPS);
        }
        barriers_ready();
    }
    const Chunks chunks(find_rows(arguments, shared));
    if (warp_index() < NUM_WARPS) {
        update_states(arguments, shared, chunks);
    } else {
        prepare(arguments, shared, chunks);
    }
}
