// The gradients of the scan inside of its chunks, for heads of 64 channels in bf16: `inputs_kernel` and `weights_kernel` of
// ops/triton/ssd_backward.py, of which this is the faster form on Hopper.
//
// A block has a chunk and some heads of a group at a time. A warpgroup makes the gradient of x and sums up that of B C^T over the heads;
// another sums up those of B and C themselves, to which in the end the first one's sum is added, and finds what the decays inside of the
// chunk contribute, a tile that the first one has made. One thread of a third copies what the next heads need to shared memory.
//
// Matrices of a chunk are [s, t], from position s to position t; rows of tiles of s are dealt to warps (`dealt`). The including code
// defines D_STATE (64 or 128).

constexpr int NUM_STAGES = 3;
constexpr int THREADS = 3 * GROUP;
constexpr int PART = 5 * Q + 2 * HEADDIM;  // numbers for a head of a chunk
enum { INPUTS, WEIGHTS, COPIES };          // what the warpgroups do

struct Arguments {
    TensorMap x, dy;              // [b, l, h * HEADDIM], x in boxes of eight positions
    TensorMap B, C;               // [b, l, g * D_STATE], B too
    TensorMap entering, leaving;  // [1, b * chunks * h * HEADDIM, D_STATE]
    TensorMap dx;                 // as x
    const float* decays;          // [b, chunks, h, 6, Q], see `decays_kernel`
    const float* D;               // [h]
    u16 *dB, *dC;                 // [b, l, g * D_STATE], if splits is 1
    float *part_B, *part_C;       // [b, l, g * splits, D_STATE] otherwise
    float* parts;                 // [b, chunks, h, PART]
    long long dB_row, dB_position, dC_row, dC_position;  // numbers from one to the next
    int b, h, l, groups, splits;  // splits: blocks that share the heads of a group
};

struct Stage {
    char boxes[2 + 2 * BOXES][BOX];  // x, dy, the states that enter and the gradients of those that leave
    float decays[6][Q];
    char padding[1024 - 6 * Q * 4 % 1024];

    __device__ __forceinline__ char* x() { return boxes[0]; }
    __device__ __forceinline__ char* dy() { return boxes[1]; }
    __device__ __forceinline__ char* entering(int i = 0) { return boxes[2 + i]; }
    __device__ __forceinline__ char* leaving(int i = 0) { return boxes[2 + BOXES + i]; }
};

struct Chunk {
    char boxes[2 * BOXES][BOX];

    __device__ __forceinline__ char* B(int i = 0) { return boxes[i]; }
    __device__ __forceinline__ char* C(int i = 0) { return boxes[BOXES + i]; }
};

struct Shared {
    Stage stages[NUM_STAGES];
    Chunk chunk;
    char inside[2][BOX];   // of a head [s, t], what its decays contribute, rounded, and what rounding has left of it
    char earlier[BOX];     // [k, s]: 1 for s < k, columns in the order of dealt rows
    char dBC[BOX];         // [s, t]
    char dx[BOX];          // on its way out
    u64 full[NUM_STAGES], empty[NUM_STAGES], chunk_full, chunk_empty, inside_full, inside_empty, dBC_full, dBC_empty;
};

static_assert(sizeof(Stage) % 1024 == 0 && sizeof(Shared) + 1024 <= SHARED_BYTES);

// What a block works on, one after the other.
struct Task {
    int index, part, row, chunk, group, head, num_heads, chunks;  // part: of a chunk; head: the first

    __device__ __forceinline__ Task(const Arguments& arguments, int index) : index(index) {
        const int parts = arguments.groups * arguments.splits;
        chunks = (arguments.l + Q - 1) / Q;
        part = index % parts, row = index / parts / chunks, chunk = index / parts % chunks;
        num_heads = arguments.h / parts;
        group = part / arguments.splits, head = part * num_heads;
    }

    __device__ __forceinline__ bool is_one(const Arguments& arguments) const {
        return index < arguments.b * chunks * arguments.groups * arguments.splits;
    }

    __device__ __forceinline__ Task next(const Arguments& arguments) const { return {arguments, index + (int)gridDim.x}; }

    // Of a head among those of all chunks.
    __device__ __forceinline__ long long place(const Arguments& arguments, int head) const {
        return ((long long)row * chunks + chunk) * arguments.h + head;
    }
};

// Where a matrix of two positions has one side of its diagonal only, warps would have from one to four times as much to do. So the rows of
// some tiles are dealt to them, eight positions from the chunk's start and eight from its end for each.
__device__ __forceinline__ int dealt_eight(int eight) { return eight % 2 ? 7 - eight / 2 : eight / 2; }

__device__ __forceinline__ int dealt(int row) { return 8 * dealt_eight(row / 8) + row % 8; }

// The position of a lane's first or second row.
__device__ __forceinline__ int dealt_row(int half) {
    const int warp = threadIdx.x % GROUP / 32;
    return 8 * (half ? 7 - warp : warp) + threadIdx.x % 32 / 4;
}

// A tile in this order, of a tensor in boxes of eight positions.
__device__ __forceinline__ void dealt_copy(char* to, const TensorMap& from, int column, int position, int batch, u64* barrier) {
    for (int i = 0; i < 8; i++) box_copy(to + 8 * i * ROW, from, column, position + 8 * dealt_eight(i), batch, barrier);
}

__device__ void bring(const Arguments& arguments, Shared& shared) {
    u32 num = 0, num_chunks = 0;
    for (Task task(arguments, blockIdx.x); task.is_one(arguments); task = task.next(arguments), num_chunks++) {
        if (num_chunks > 0) barrier_wait(&shared.chunk_empty, num_chunks - 1 & 1);
        barrier_expect(&shared.chunk_full, sizeof(Chunk));
        for (int i = 0; i < BOXES; i++) {
            dealt_copy(shared.chunk.B(i), arguments.B, task.group * D_STATE + 64 * i, task.chunk * Q, task.row, &shared.chunk_full);
            box_copy(shared.chunk.C(i), arguments.C, task.group * D_STATE + 64 * i, task.chunk * Q, task.row, &shared.chunk_full);
        }
        for (int head = task.head; head < task.head + task.num_heads; head++, num++) {
            Stage& stage = shared.stages[num % NUM_STAGES];
            u64* full = expect_stage(shared.full, shared.empty, num, sizeof(stage.boxes) + sizeof(stage.decays));
            const long long place = task.place(arguments, head);
            bulk_copy((char*)stage.decays, (const char*)(arguments.decays + place * 6 * Q), sizeof(stage.decays), full);
            dealt_copy(stage.x(), arguments.x, head * HEADDIM, task.chunk * Q, task.row, full);
            box_copy(stage.dy(), arguments.dy, head * HEADDIM, task.chunk * Q, task.row, full);
            for (int i = 0; i < BOXES; i++) {
                box_copy(stage.entering(i), arguments.entering, 64 * i, (int)place * HEADDIM, 0, full);
                box_copy(stage.leaving(i), arguments.leaving, 64 * i, (int)place * HEADDIM, 0, full);
            }
        }
    }
}

// ---- the gradient of x

// Of the two rows that a lane has a part of.
struct RowSums {
    float inside[2], to_end[2], dd[2];
};

// What needs the decay from s to t, of a warp's rows.
template <int warp>
__device__ __forceinline__ void inside_chunk(
    const float (&xdy)[32], const float (&BC)[32], const float* log, const float (&dt)[2], float (&dBC)[32], u32 (&factors)[4][4],
    u32 (&inside)[8][2], u32 (&rests)[8][2], RowSums& sums) {
    const float logs[2] = {log[dealt_row(0)], log[dealt_row(1)]};
#pragma unroll
    for (int i = 0; i < 8; i++) {
        const float2 later = *(const float2*)(log + 8 * i + first_column());
#pragma unroll
        for (int half = 0; half < 2; half++) {
            u32& factor = factors[i / 2][i % 2 * 2 + half];
            const int diagonal = half ? 7 - warp : warp;
            if (i < diagonal) {
                factor = inside[i][half] = rests[i][half] = 0;
                continue;
            }
            const int at = 4 * i + 2 * half;
            float2 decay = make_float2(exp2_of(later.x - logs[half]), exp2_of(later.y - logs[half]));
            if (i == diagonal) {
                const int distance = first_column() - (int)threadIdx.x % 32 / 4;
                decay.x = distance < 0 ? 0 : decay.x;
                decay.y = distance < -1 ? 0 : decay.y;
                sums.dd[half] = (distance == 0 ? xdy[at] : 0) + (distance == -1 ? xdy[at + 1] : 0);
            }
            const float2 product = make_float2(xdy[at] * decay.x, xdy[at + 1] * decay.y);
            dBC[at] = fmaf(product.x, dt[half], dBC[at]);
            dBC[at + 1] = fmaf(product.y, dt[half], dBC[at + 1]);
            const float2 dlog = make_float2(product.x * BC[at], product.y * BC[at + 1]);
            sums.inside[half] += dlog.x + dlog.y;
            const float2 contribution = make_float2(dlog.x * dt[half], dlog.y * dt[half]);
            inside[i][half] = pack_bf16(contribution.x, contribution.y);
            const float2 rounded = unpack_bf16(inside[i][half]);
            rests[i][half] = pack_bf16(contribution.x - rounded.x, contribution.y - rounded.y);
            factor = pack_bf16(BC[at] * decay.x, BC[at + 1] * decay.y);
        }
    }
}

__device__ void differentiate_inputs(const Arguments& arguments, Shared& shared) {
    const int lane = threadIdx.x % 32, warp = warp_index() % WARPS;
    u32 num = 0, num_chunks = 0;
#pragma unroll 1
    for (Task task(arguments, blockIdx.x); task.is_one(arguments); task = task.next(arguments), num_chunks++) {
        const u64 B = tile_at(shared.chunk.B()), C = tile_at(shared.chunk.C());
        barrier_wait(&shared.chunk_full, num_chunks & 1);
        float BC[32], dBC[32];
        products_begin();
        multiply_rows<D_STATE>(BC, B, C);
        products_end();
#pragma unroll
        for (int i = 0; i < 32; i++) dBC[i] = 0;
        products_wait<0>(BC);
#pragma unroll 1
        for (int head = task.head; head < task.head + task.num_heads; head++, num++) {
            Stage& stage = shared.stages[num % NUM_STAGES];
            barrier_wait(&shared.full[num % NUM_STAGES], num / NUM_STAGES & 1);
            const u64 x = tile_at(stage.x()), dy = tile_at(stage.dy()), leaving = tile_at(stage.leaving());
            const float skip = arguments.D[head];
            float xdy[32], dxdt[32];
            products_begin();
            multiply_rows<HEADDIM>(xdy, x, dy);
            products_end();
            multiply_rows<D_STATE>(dxdt, B, leaving);
            products_end();

            RowSums sums = {};
            const float dt[2] = {stage.decays[0][dealt_row(0)], stage.decays[0][dealt_row(1)]};
            const float to_end[2] = {stage.decays[4][dealt_row(0)], stage.decays[4][dealt_row(1)]};
            u32 factors[4][4], inside[8][2], rests[8][2];
            products_wait<1>(xdy);
            if (warp == 0) inside_chunk<0>(xdy, BC, stage.decays[1], dt, dBC, factors, inside, rests, sums);
            if (warp == 1) inside_chunk<1>(xdy, BC, stage.decays[1], dt, dBC, factors, inside, rests, sums);
            if (warp == 2) inside_chunk<2>(xdy, BC, stage.decays[1], dt, dBC, factors, inside, rests, sums);
            if (warp == 3) inside_chunk<3>(xdy, BC, stage.decays[1], dt, dBC, factors, inside, rests, sums);
            if (num > 0) barrier_wait(&shared.inside_empty, num - 1 & 1);
            put(inside, shared.inside[0]);
            put(rests, shared.inside[1]);
            visible_to_copies();
            __syncwarp();
            if (lane == 0) barrier_arrive(&shared.inside_full);
            products_wait<0>(dxdt);
            // the state that leaves = decay of the chunk * entering + (to_end * dt x)^T B
#pragma unroll
            for (int i = 0; i < 16; i++) {
                const int half = i % 2;
                const float2 two = unpack_bf16(*pair_at(stage.x(), i / 2, half));
                dxdt[2 * i] *= to_end[half], dxdt[2 * i + 1] *= to_end[half];
                sums.to_end[half] = fmaf(dxdt[2 * i], two.x, fmaf(dxdt[2 * i + 1], two.y, sums.to_end[half]));
            }
            // y = (C B^T * decay) (dt x), inside the chunk
            products_begin();
            add_product(dxdt, factors, dy);
            products_end();
            products_wait<0>(dxdt);
            if (lane == 0) bulk_wait_read<0>();  // the warp's rows of the head before
            __syncwarp();
#pragma unroll
            for (int i = 0; i < 16; i++) {
                const int half = i % 2;
                const float2 two = unpack_bf16(*(const u32*)(stage.dy() + swizzled(dealt_row(half), i / 2) + 2 * first_column()));
                const float first = fmaf(dxdt[2 * i], dt[half], two.x * skip), second = fmaf(dxdt[2 * i + 1], dt[half], two.y * skip);
                *pair_at(shared.dx, i / 2, half) = pack_bf16(first, second);
            }
            visible_to_copies();
            __syncwarp();
            if (lane == 0) {
                for (int half = 0; half < 2; half++) {
                    const int eight = 2 * warp + half, position = task.chunk * Q + 8 * dealt_eight(eight);
                    box_store(arguments.dx, head * HEADDIM, position, task.row, shared.dx + 8 * eight * ROW);
                }
                bulk_commit();
            }
            float* part = arguments.parts + task.place(arguments, head) * PART;
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const float dd = sum_of_row(sums.dd[half]);
                const float4 four = make_float4(sum_of_row(sums.inside[half]), dd, sum_of_row(sums.to_end[half]), dd);
                if (lane % 4 == 0) *(float4*)(part + 4 * dealt_row(half)) = four;
            }
            __syncwarp();
            if (lane == 0) barrier_arrive(&shared.empty[num % NUM_STAGES]);
        }
        if (num_chunks > 0) barrier_wait(&shared.dBC_empty, num_chunks - 1 & 1);
        put(dBC, shared.dBC);
        visible_to_copies();
        __syncwarp();
        if (lane == 0) {
            barrier_arrive(&shared.dBC_full);
            barrier_arrive(&shared.chunk_empty);
        }
    }
    if (lane == 0) bulk_wait_all();
}

// ---- the gradients of B and C

// Rows of a tile times a number of each, as a factor.
__device__ __forceinline__ void scaled_rows(const char* tile, const float (&scale)[2], u32 (&factors)[4][4]) {
    const int lane = threadIdx.x % 32, row = threadIdx.x % GROUP / 32 * 16 + lane % 16;
#pragma unroll
    for (int k = 0; k < 4; k++) {
        load_matrices(factors[k], tile + swizzled(row, 2 * k + lane / 16));
#pragma unroll
        for (int i = 0; i < 4; i++) factors[k][i] = times(factors[k][i], scale[i % 2], scale[i % 2]);
    }
}

// The thread's part of the sum of all products of two states' numbers, of which four at a time are added up in bf16.
__device__ __forceinline__ float inner_product(const char* one, const char* other) {
    float2 sums = make_float2(0, 0);
#pragma unroll
    for (int i = 0; i < BOXES * BOX / 16 / GROUP; i++) {
        const int at = (i * GROUP + threadIdx.x % GROUP) * 16;
        const uint4 a = *(const uint4*)(one + at), b = *(const uint4*)(other + at);
        u32 pair = multiply_add_bf16(a.w, b.w, 0);
        pair = multiply_add_bf16(a.z, b.z, pair);
        pair = multiply_add_bf16(a.y, b.y, pair);
        pair = multiply_add_bf16(a.x, b.x, pair);
        sums.x += unpack_bf16(pair).x, sums.y += unpack_bf16(pair).y;
    }
    return sums.x + sums.y;
}

template <bool is_dealt>
__device__ __forceinline__ void store(const State& sums, u16* whole, long long position, float* part, long long part_position, int left) {
#pragma unroll
    for (int i = 0; i < 2 * COLUMNS; i++) {
        const int row = is_dealt ? dealt_row(i % 2) : first_row() + 8 * (i % 2), column = 8 * (i / 2) + first_column();
        if (row >= left) continue;
        if (part) {
            *(float2*)(part + row * part_position + column) = make_float2(sums[2 * i], sums[2 * i + 1]);
        } else {
            *(u32*)(whole + row * position + column) = pack_bf16(sums[2 * i], sums[2 * i + 1]);
        }
    }
}

__device__ void differentiate_weights(const Arguments& arguments, Shared& shared) {
    const int lane = threadIdx.x % 32, row = first_row();
    u32 num = 0, num_chunks = 0;
#pragma unroll 1
    for (Task task(arguments, blockIdx.x); task.is_one(arguments); task = task.next(arguments), num_chunks++) {
        const u64 B = tile_at(shared.chunk.B()), C = tile_at(shared.chunk.C());
        barrier_wait(&shared.chunk_full, num_chunks & 1);
        State dB, dC;
#pragma unroll
        for (int i = 0; i < 4 * COLUMNS; i++) dB[i] = dC[i] = 0;
#pragma unroll 1
        for (int head = task.head; head < task.head + task.num_heads; head++, num++) {
            Stage& stage = shared.stages[num % NUM_STAGES];
            barrier_wait(&shared.full[num % NUM_STAGES], num / NUM_STAGES & 1);
            const u64 entering = tile_at(stage.entering()), leaving = tile_at(stage.leaving());
            float y[32];
            products_begin();
            multiply_rows<D_STATE>(y, C, entering);
            products_end();
            u32 of_y[4][4], of_x[4][4];
            const float from_start[2] = {stage.decays[3][row], stage.decays[3][row + 8]};
            const float to_end[2] = {stage.decays[5][dealt_row(0)], stage.decays[5][dealt_row(1)]};  // times dt
            scaled_rows(stage.dy(), from_start, of_y);
            scaled_rows(stage.x(), to_end, of_x);
            products_begin();
            add_product(dC, of_y, entering);
            add_product(dB, of_x, leaving);
            products_end();
            float through = inner_product(stage.entering(), stage.leaving());
#pragma unroll
            for (int mask = 1; mask < 32; mask *= 2) through += shuffle_xor(through, mask);
            products_wait<1>(y);
            float sums[2] = {0, 0};
#pragma unroll
            for (int i = 0; i < 16; i++) {
                const float2 two = unpack_bf16(*pair_at(stage.dy(), i / 2, i % 2));
                sums[i % 2] = fmaf(y[2 * i], two.x, fmaf(y[2 * i + 1], two.y, sums[i % 2]));
            }
            float* part = arguments.parts + task.place(arguments, head) * PART;
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const float sum = sum_of_row(sums[half]) * from_start[half];
                // each warp's part of what goes through the chunk stands at the first of its rows
                if (lane % 4 == 0) *(float2*)(part + 5 * Q + 2 * (row + 8 * half)) = make_float2(sum, lane + half == 0 ? through : 0);
            }
            products_wait<0>(dB);
            products_wait<0>(dC);
            __syncwarp();
            if (lane == 0) barrier_arrive(&shared.empty[num % NUM_STAGES]);
            // the decay of step k is in every segment across it, those with s < k <= t
            float across[32];
            const u64 earlier = tile_at(shared.earlier), inside = tile_at(shared.inside[0]), rests = tile_at(shared.inside[1]);
            barrier_wait(&shared.inside_full, num & 1);
            products_begin();
#pragma unroll
            for (int k = 0; k < Q; k += 16) multiply_tiles<false>(across, along_rows(earlier, k), along_columns(inside, k), k > 0);
#pragma unroll
            for (int k = 0; k < Q; k += 16) multiply_tiles<false>(across, along_rows(earlier, k), along_columns(rests, k));
            products_end();
            products_wait<0>(across);
            __syncwarp();
            if (lane == 0) barrier_arrive(&shared.inside_empty);
            float steps[2] = {0, 0};
#pragma unroll
            for (int i = 0; i < 32; i++) steps[i / 2 % 2] += 8 * (i / 4) + first_column() + i % 2 < row + i / 2 % 2 * 8 ? 0 : across[i];
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const float sum = sum_of_row(steps[half]);
                if (lane % 4 == 0) part[4 * Q + row + 8 * half] = sum;
            }
        }
        barrier_wait(&shared.dBC_full, num_chunks & 1);
        const u64 dBC = tile_at(shared.dBC);
        products_begin();
#pragma unroll
        for (int k = 0; k < Q; k += 16) multiply_tiles<false>(dB, along_rows(dBC, k), along_columns(C, k));
#pragma unroll
        for (int k = 0; k < Q; k += 16) multiply_tiles<true>(dC, along_columns(dBC, k), along_columns(B, k));
        products_end();
        products_wait<0>(dB);
        products_wait<0>(dC);
        __syncwarp();
        if (lane == 0) {
            barrier_arrive(&shared.dBC_empty);
            barrier_arrive(&shared.chunk_empty);
        }
        const int left = arguments.l - task.chunk * Q, parts = arguments.groups * arguments.splits;
        const long long part = (((long long)task.row * arguments.l + task.chunk * Q) * parts + task.part) * D_STATE;
        const bool is_part = arguments.splits > 1;
        store<true>(dB, arguments.dB + task.row * arguments.dB_row + task.chunk * Q * arguments.dB_position + task.group * D_STATE,
                    arguments.dB_position, is_part ? arguments.part_B + part : nullptr, parts * D_STATE, left);
        store<false>(dC, arguments.dC + task.row * arguments.dC_row + task.chunk * Q * arguments.dC_position + task.group * D_STATE,
                     arguments.dC_position, is_part ? arguments.part_C + part : nullptr, parts * D_STATE, left);
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, 1) scan_gradients(const __grid_constant__ Arguments arguments) {
    Shared& shared = tiles_of_block<Shared>();
    for (int i = threadIdx.x; i < Q * Q; i += THREADS) {
        const int k = i / Q, s = i % Q;
        *(u16*)(shared.earlier + swizzled(k, s / 8) + s % 8 * 2) = dealt(s) < k ? 0x3f80 : 0;  // 1 in bf16
    }
    visible_to_copies();
    if (threadIdx.x == 0) {
        barrier_init(&shared.chunk_full, 1);
        barrier_init(&shared.chunk_empty, 2 * WARPS);
        barrier_init(&shared.inside_full, WARPS);
        barrier_init(&shared.inside_empty, WARPS);
        barrier_init(&shared.dBC_full, WARPS);
        barrier_init(&shared.dBC_empty, WARPS);
        init_ring(shared.full, shared.empty, 2 * WARPS);
        barriers_ready();
    }
    __syncthreads();
    if (warp_index() / WARPS == INPUTS) {
        take_registers<232>();
        differentiate_inputs(arguments, shared);
    } else if (warp_index() / WARPS == WEIGHTS) {
        take_registers<232>();
        differentiate_weights(arguments, shared);
    } else {
        leave_registers<40>();
        if (threadIdx.x == COPIES * GROUP) bring(arguments, shared);
    }
}
