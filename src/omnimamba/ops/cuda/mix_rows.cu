// One position of everything between a layer's two projections, for a batch of many rows: task LoRA, convolution, state update, gate, and
// the gated norm but for the division by its root mean square, which commutes with the projection that follows.
//
// At many rows the time is that of reading and writing the states. So each of most warps brings tiles of states to its own ring of
// shared memory, updates them there and sends them back (bulk copies both ways): a tile is some channels of a row, one piece of memory,
// and no warp waits for another's. What a channel needs beside its state other warps make, a chunk of channels ahead (`Channel`).
//
// Multiprocessors differ in how fast they reach memory. So a block takes the next chunk of all rows that are not padding whenever it is
// through with one (`Taking`): all go through memory side by side and end together. The first states travel before the kernels
// before this one have ended, whose results only the preparing warps read; not all at once, for those kernels need the memory, too.
//
// The definitions are `Mamba2Backbone.step` and what it calls. Activations are bf16 outside of this kernel and fp32 in it. B and C enter
// the convolution's state in a later kernel, for all blocks of a row read it.
//
// The including code defines D_INNER, NUM_HEADS, D_STATE, RANK, HALF_STATE, NUM_WARPS (that update states), NUM_PREPARING (warps),
// NUM_STAGES (of a warp's ring), PACE (cycles from one of its first tiles to the next), TILE_BYTES and CHUNK (channels that are prepared at
// once).

constexpr int D_IN_PROJ = 2 * D_INNER + 2 * D_STATE + NUM_HEADS;
constexpr int HEADDIM = D_INNER / NUM_HEADS;
constexpr int CHANNEL_BYTES = D_STATE * STATE_BYTES;
constexpr int TILE = TILE_BYTES / CHANNEL_BYTES;  // channels
constexpr int CHUNK_TILES = CHUNK / TILE, ROW_CHUNKS = D_INNER / CHUNK;
constexpr int AT_ONCE = 8;                                          // channels whose states a lane has in registers
constexpr int PREPARING = NUM_PREPARING * WARP;                     // threads
constexpr int OWN = (CHUNK + PREPARING - 1) / PREPARING;            // channels of a chunk that a thread prepares
constexpr int OWN_B_C = (2 * D_STATE + PREPARING - 1) / PREPARING;  // numbers of B and C
constexpr int THREADS = NUM_WARPS * WARP + PREPARING;               // and so many rows at most

// Chunks of a block that are known ahead of the one that is prepared, no more than the rings need, and the places where they stand; the
// last of the preparing warps adds up what those that update states have found of a chunk.
constexpr int AHEAD = (NUM_STAGES * NUM_WARPS - 1) / CHUNK_TILES, PLACES = AHEAD + 3;
constexpr int NONE = -1;
constexpr int FINISHING = NUM_PREPARING - 1;

static_assert(TILE % AT_ONCE == 0 && HEADDIM % TILE == 0 && CHUNK % TILE == 0 && D_INNER % CHUNK == 0 && CHUNK_TILES <= WARP);

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
    float* squares;           // [rows, ROW_CHUNKS]: of y * silu(z), the sums over chunks
    float* newest;            // [rows, 2 * D_STATE]: B and C before the convolution
    u32* counter;             // 0 before and after: chunks that blocks have asked for
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
    Channel channels[2][CHUNK];  // of two chunks in turn
    float B_C[2][2 * D_STATE];   // of their rows
    float squares[2][CHUNK_TILES];
    Row rows[THREADS];  // that are not padding
    int num_live[THREADS / WARP];
    int chunks[PLACES];  // which ones the block takes, in turn; NONE from some time on
    u64 known[PLACES];   // chunks
    u64 full[NUM_WARPS][NUM_STAGES];
    u64 ready[2], consumed[2];  // channels
};

constexpr int RING_BYTES = NUM_WARPS * NUM_STAGES * TILE_BYTES;
static_assert(sizeof(Shared) <= SHARED_BYTES);

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

// The block's chunk of this number.
__device__ __forceinline__ int chunk_at(Shared& shared, int num) {
    barrier_wait(&shared.known[num % PLACES], num / PLACES & 1);
    return shared.chunks[num % PLACES];
}

// Takes chunks for the block, in one thread. The first ones are the block's by its number, for nobody has to be asked about them; the
// others go to whoever asks. Whoever asks last sets the counter back.
struct Taking {
    const Arguments& arguments;
    Shared& shared;
    int total;    // chunks of all rows
    int num = 0;  // chunks that are known
    bool is_over = false;
    u32 asked = 0;  // before this block, on its way

    __device__ __forceinline__ void take() {
        const int blocks = gridDim.x;
        int chunk = (int)blockIdx.x + num * blocks;
        if (num > AHEAD && !is_over) {
            const int asking = min(total - AHEAD * blocks, blocks), given = max(total - (AHEAD + 1) * blocks, 0);
            if ((int)asked == asking + given - 1) *arguments.counter = 0;  // each block asks until it is too late
            chunk = (AHEAD + 1) * blocks + (int)asked;
        }
        if (chunk >= total) is_over = true;
        shared.chunks[num % PLACES] = is_over ? NONE : chunk;
        barrier_arrive(&shared.known[num % PLACES]);
        if (num >= AHEAD && !is_over) asked = count_up(arguments.counter);
        num++;
    }
};

// ---- the preparing warps

// What a channel of the convolution needs that no other kernel of the step writes.
struct Known {
    uint2 past, taps;
    u16 bias;
    LoraRow lora;

    __device__ __forceinline__ void load(const Arguments& arguments, const u16* lora_B, const u16* conv, int channel) {
        past = *(const uint2*)(conv + 4 * channel);
        taps = *(const uint2*)(arguments.conv_weight + 4 * channel);
        bias = arguments.conv_bias[channel];
        lora.load(lora_B + (D_INNER + channel) * RANK);
    }

    __device__ __forceinline__ float convolved(float newest) const { return convolve(past, newest, taps, bf16(bias)); }
};

// What a thread prepares of a chunk: all is loaded before anything is computed, for the next chunk while this one waits for its place.
struct Preparation {
    const Arguments& arguments;
    int thread;
    Row row;
    int first;  // channel
    Known own[OWN], B_C[OWN_B_C];
    LoraRow z_lora[OWN], dt_lora[OWN];
    float rate[OWN], dt_bias[OWN], D[OWN];
    u16 norm[OWN];
    const u16 *projected, *low_at;
    u16 z[OWN], x[OWN], dt[OWN], newest[OWN_B_C];
    LoraRow low;  // A u

    __device__ __forceinline__ int channel(int i) const { return first + min(i * PREPARING + thread, CHUNK - 1); }

    __device__ __forceinline__ int B_or_C(int i) const { return min(i * PREPARING + thread, 2 * D_STATE - 1); }

    __device__ __forceinline__ void load_known(const Shared& shared, int chunk) {
        row = shared.rows[chunk / ROW_CHUNKS], first = chunk % ROW_CHUNKS * CHUNK;
        const int task = arguments.is_t2i[row.index] != 0;
        const u16 *lora = arguments.lora_B + task * D_IN_PROJ * RANK, *conv = arguments.conv + row.slot * arguments.conv_slot;
        projected = arguments.projected + row.index * arguments.projected_row;
#pragma unroll
        for (int i = 0; i < OWN; i++) {
            const int head = channel(i) / HEADDIM;
            own[i].load(arguments, lora, conv, channel(i));
            z_lora[i].load(lora + channel(i) * RANK);
            dt_lora[i].load(lora + (2 * D_INNER + 2 * D_STATE + head) * RANK);
            rate[i] = arguments.A_log[head], dt_bias[i] = arguments.dt_bias[head], D[i] = arguments.D[head];
            norm[i] = arguments.norm[channel(i)];
        }
#pragma unroll
        for (int i = 0; i < OWN_B_C; i++) B_C[i].load(arguments, lora, conv, D_INNER + B_or_C(i));
        low_at = projected + D_IN_PROJ + task * RANK;
    }

    __device__ __forceinline__ void load_projected() {
        low.load(low_at);
#pragma unroll
        for (int i = 0; i < OWN; i++) {
            z[i] = projected[channel(i)];
            x[i] = projected[D_INNER + channel(i)];
            dt[i] = projected[2 * D_INNER + 2 * D_STATE + channel(i) / HEADDIM];
        }
#pragma unroll
        for (int i = 0; i < OWN_B_C; i++) newest[i] = projected[2 * D_INNER + B_or_C(i)];
    }

    __device__ __forceinline__ void compute(Shared& shared, int half) {
        float scaled[RANK];
#pragma unroll
        for (int r = 0; r < RANK; r++) scaled[r] = low[r] * arguments.lora_scaling;
#pragma unroll
        for (int i = 0; i < OWN_B_C; i++) {
            const int n = i * PREPARING + thread;
            const float value = bf16(newest[i]) + B_C[i].lora.times(scaled);
            if (n >= 2 * D_STATE) break;
            shared.B_C[half][n] = B_C[i].convolved(value);
            if (first == 0) arguments.newest[row.index * 2 * D_STATE + n] = value;
        }
#pragma unroll
        for (int i = 0; i < OWN; i++) {
            const int n = i * PREPARING + thread;
            if (n >= CHUNK) break;
            const float input = bf16(x[i]) + own[i].lora.times(scaled), value = own[i].convolved(input);
            const float step = softplus(bf16(dt[i]) + dt_lora[i].times(scaled) + dt_bias[i]);
            u16* conv = arguments.conv + row.slot * arguments.conv_slot;
            *(uint2*)(conv + 4 * (first + n)) = shifted(own[i].past, input);
            shared.channels[half][n] = {expf(-step * expf(rate[i])), step * value, value * D[i],
                                        silu(bf16(z[i]) + z_lora[i].times(scaled)), bf16(norm[i]), 0};
        }
    }
};

__device__ void prepare(const Arguments& arguments, Shared& shared, int total) {
    const int thread = threadIdx.x - NUM_WARPS * WARP;
    Taking taking{arguments, shared, total};
    if (thread == 0) {
        for (int i = 0; i <= AHEAD; i++) taking.take();
    }
    Preparation own{arguments, thread};
    int chunk = chunk_at(shared, 0), in_half[2] = {NONE, NONE};
    const auto finish = [&](int num) {  // the chunk that has been in the half where this one will be
        const int before = in_half[num % 2];
        if (before == NONE) return;
        barrier_wait(&shared.consumed[num % 2], num / 2 - 1 & 1);
        if (thread / WARP != FINISHING) return;
        const float squares = sum_lanes(thread % WARP < CHUNK_TILES ? shared.squares[num % 2][thread % WARP] : 0);
        if (thread % WARP == 0) arguments.squares[shared.rows[before / ROW_CHUNKS].index * ROW_CHUNKS + before % ROW_CHUNKS] = squares;
    };
    if (chunk != NONE) own.load_known(shared, chunk);
    wait_for_earlier_kernels();  // a kernel that ended before the one ahead of it would let the next one in too early
    int num = 0;
#pragma unroll 1
    for (; chunk != NONE; num++) {
        own.load_projected();
        finish(num);
        if (thread == 0) taking.take();
        own.compute(shared, num % 2);
        barrier_arrive(&shared.ready[num % 2]);
        in_half[num % 2] = chunk;
        chunk = chunk_at(shared, num + 1);
        if (chunk != NONE) own.load_known(shared, chunk);
    }
    finish(num);
    finish(num + 1);
}

// ---- the warps that update states

// A warp's tiles, those of the block that are its turn, on their way through its ring.
struct Ring {
    const Arguments& arguments;
    Shared& shared;
    int warp = warp_index(), lane = threadIdx.x % WARP;
    int next;       // tile of the block to bring
    int stage = 0;  // of the tile that is updated
    u32 lap = 0;

    __device__ Ring(const Arguments& arguments, Shared& shared) : arguments(arguments), shared(shared), next(warp) {
        const u64 start = cycles();
        for (int i = 0; i < NUM_STAGES; i++) {
            pause_until(start + i * PACE);
            bring(i);
        }
    }

    __device__ __forceinline__ char* at(int stage) const { return dynamic_shared() + (warp * NUM_STAGES + stage) * TILE_BYTES; }

    __device__ __forceinline__ char* home(int chunk, int tile) const {
        const long long slot = shared.rows[chunk / ROW_CHUNKS].slot;
        return arguments.ssm + slot * arguments.ssm_slot * STATE_BYTES + (chunk % ROW_CHUNKS * CHUNK_TILES + tile) * TILE_BYTES;
    }

    __device__ __forceinline__ void bring(int to) {
        if (lane != 0 || next == NONE) return;
        const int chunk = chunk_at(shared, next / CHUNK_TILES);
        if (chunk == NONE) {
            next = NONE;
            return;
        }
        barrier_expect(&shared.full[warp][to], TILE_BYTES);
        bulk_copy(at(to), home(chunk, next % CHUNK_TILES), TILE_BYTES, &shared.full[warp][to]);
        next += NUM_WARPS;
    }

    __device__ __forceinline__ char* wait() const {
        barrier_wait(&shared.full[warp][stage], lap);
        return at(stage);
    }

    // Sends the tile back, and brings one into the stage of the tile before it, which is on its way by now.
    __device__ __forceinline__ void send(char* home, bool is_first) {
        visible_to_copies();
        __syncwarp();
        if (lane == 0) {
            bulk_store(home, at(stage), TILE_BYTES);
            bulk_commit();
            bulk_wait_read<1>();
        }
        if (!is_first) bring(stage == 0 ? NUM_STAGES - 1 : stage - 1);
        if (++stage == NUM_STAGES) stage = 0, lap ^= 1;
    }
};

__device__ void update_states(const Arguments& arguments, Shared& shared) {
    Ring ring(arguments, shared);
    const int lane = ring.lane;
    bool is_first = true;
    int tile = ring.warp;  // of the chunk
#pragma unroll 1
    for (int num = 0;; num++) {
        const int chunk = chunk_at(shared, num);
        if (chunk == NONE) break;
        const int half = num % 2, row = shared.rows[chunk / ROW_CHUNKS].index;
        barrier_wait(&shared.ready[half], num / 2 & 1);
        float B[PER_LANE], C[PER_LANE];
#pragma unroll
        for (int k = 0; k < PER_LANE; k++) {
            B[k] = shared.B_C[half][lane * PER_LANE + k];
            C[k] = shared.B_C[half][D_STATE + lane * PER_LANE + k];
        }
#pragma unroll 1
        for (; tile < CHUNK_TILES; tile += NUM_WARPS, is_first = false) {
            char* states = ring.wait() + lane * PER_LANE * STATE_BYTES;
            const int place = chunk % ROW_CHUNKS * CHUNK_TILES + tile;  // in the row
            const Channel* channels = &shared.channels[half][tile * TILE];
            u16* gated = arguments.gated + row * D_INNER + place * TILE;
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
            if (lane == 0) shared.squares[half][tile] = squares;
            ring.send(ring.home(chunk, tile), is_first);
        }
        tile -= CHUNK_TILES;
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
        for (int i = 0; i < PLACES; i++) barrier_init(&shared.known[i], 1);
        for (int i = 0; i < 2; i++) {
            barrier_init(&shared.ready[i], PREPARING);
            barrier_init(&shared.consumed[i], NUM_WARPS);
        }
        barriers_ready();
    }
    const int total = find_rows(arguments, shared) * ROW_CHUNKS;
    if (warp_index() < NUM_WARPS) {
        update_states(arguments, shared);
    } else {
        prepare(arguments, shared, total);
    }
}
