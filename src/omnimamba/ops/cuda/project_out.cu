// What a layer adds to the residual stream, the product of a batch's rows and out_proj, and what in_proj of the next layer needs of the
// sum: the rows times the norm's weight in bf16, and their squares, for the division by the root mean square commutes with a product.
//
// A cluster makes N_TILE outputs, each block the products of its part of the columns; then each adds up an equal part of the rows, whose
// products the others have sent it. The order of additions is always the same. See rows_product.cuh.
//
// The including code also defines D_STATE.

constexpr int OWN_ROWS = ROWS / CLUSTER;
constexpr int OF_ROW = SUMMING / OWN_ROWS;  // threads
constexpr int OWN = N_TILE / OF_ROW;        // columns of a thread
constexpr int UNIT = OWN % 4 == 0 ? 4 : 1;  // columns that are neighbours

static_assert(OF_ROW == 2 * CLUSTER && N_TILE % OF_ROW == 0);

// Of the tile: where the i-th of a thread's columns is.
__device__ __forceinline__ int column_of(int i) { return (i / UNIT * OF_ROW + (int)threadIdx.x % OF_ROW) * UNIT + i % UNIT; }

// UNIT neighbours at once.

__device__ __forceinline__ void read_unit(float* to, const float* from) {
    if constexpr (UNIT == 4) {
        const float4 four = *(const float4*)from;
        to[0] = four.x, to[1] = four.y, to[2] = four.z, to[3] = four.w;
    } else {
        *to = *from;
    }
}

__device__ __forceinline__ void read_unit(float* to, const u16* from) {
    if constexpr (UNIT == 4) {
        const float4 four = four_bf16(*(const uint2*)from);
        to[0] = four.x, to[1] = four.y, to[2] = four.z, to[3] = four.w;
    } else {
        *to = bf16_at(from);
    }
}

__device__ __forceinline__ void write_unit(float* to, const float* from) {
    if constexpr (UNIT == 4) {
        *(float4*)to = make_float4(from[0], from[1], from[2], from[3]);
    } else {
        *to = *from;
    }
}

__device__ __forceinline__ void write_unit(u16* to, const float* from) {
    if constexpr (UNIT == 4) {
        *(uint2*)to = uint2{pack_bf16(from[0], from[1]), pack_bf16(from[2], from[3])};
    } else {
        *to = to_bf16(*from);
    }
}

// ---- what the host passes

struct Arguments {
    TensorMap u;                 // [1, rows, k]
    TensorMap weights;           // [1, n, k]
    const float* squares;        // [rows, num_squares], whose sum is that of the squares of a row of u
    float* residual;             // [rows, n]
    const u16* norm;             // [n], the next norm's weight
    u16* next;                   // [rows, n]: the new residual, times that
    float* next_squares;         // [rows, tiles]: the sums of its squares over tiles of N_TILE columns
    u16* conv;                   // [slots, conv_slot]: states of the convolution, whose last channels are B and C
    const long long* slots;      // [rows], negative: nothing is stored for the row
    const float* newest;         // [rows, 2 * D_STATE]: inputs of B and C
    long long conv_slot, first;  // numbers to the next slot, and to B
    int rows, n, k, num_squares;
    float eps;
};

struct Shared {
    Rings rings;
    float parts[CLUSTER][OWN_ROWS][N_TILE];  // of the own rows, from all blocks
    float scales[OWN_ROWS];
    u64 all_parts, scaled;
};

constexpr int SENT_BYTES = ROWS * N_TILE * 4;  // in place of tiles
static_assert(sizeof(Shared) + 1024 <= SHARED_BYTES && SENT_BYTES <= sizeof(Rings::weight_tiles) + sizeof(Rings::row_tiles));
static_assert(K_GROUPS == 1 || SENT_BYTES <= sizeof(Rings::weight_tiles));  // `add_groups` reads those of rows

__device__ void compute(const Arguments& arguments, Shared& shared, int row_block, int tile, int rank) {
    const int thread = threadIdx.x;
    float sums[NUM_SUMS];
    multiply_rows(shared.rings, arguments.k / CLUSTER, sums);
    add_groups(shared.rings, sums);
    if (thread >= SUMMING) return;
    float(*sent)[N_TILE] = (float(*)[N_TILE])&shared.rings;  // [ROWS]
    const int product_row = thread / GROUP * 64 + first_row();
#pragma unroll
    for (int i = 0; i < NUM_SUMS / 2; i++) {
        *(float2*)&sent[product_row + 8 * (i % 2)][8 * (i / 2) + first_column()] = make_float2(sums[2 * i], sums[2 * i + 1]);
    }
    visible_to_copies();
    __syncwarp();
    if (thread % 32 == 0) {  // the warp's rows, all of them one block's
        float* to = shared.parts[rank][product_row % OWN_ROWS];
        copy_to_block<CLUSTER>((char*)to, (const char*)sent[product_row], 16 * N_TILE * 4, &shared.all_parts, product_row / OWN_ROWS);
    }
    const int own_row = thread / OF_ROW, row = row_block * ROWS + rank * OWN_ROWS + own_row, first = tile * N_TILE;
    wait_for_earlier_kernels();
    float residual[OWN], norm[OWN];  // on their way while the parts are
#pragma unroll
    for (int i = 0; i < OWN; i += UNIT) {
        const int column = min(first + column_of(i), arguments.n - UNIT), at = min(row, arguments.rows - 1) * arguments.n + column;
        read_unit(residual + i, arguments.residual + at);
        read_unit(norm + i, arguments.norm + column);
    }
    barrier_wait(&shared.scaled, 0);
    barrier_wait(&shared.all_parts, 0);
    const float scale = shared.scales[own_row];
    float squares = 0;
#pragma unroll
    for (int i = 0; i < OWN; i += UNIT) {
        const int column = column_of(i), at = row * arguments.n + first + column;
        float values[UNIT] = {};
#pragma unroll
        for (int part = 0; part < CLUSTER; part++) {
            float products[UNIT];
            read_unit(products, &shared.parts[part][own_row][column]);
#pragma unroll
            for (int j = 0; j < UNIT; j++) values[j] += products[j];
        }
        if (row >= arguments.rows || first + column >= arguments.n) continue;
        float next[UNIT];
#pragma unroll
        for (int j = 0; j < UNIT; j++) {
            values[j] = fmaf(values[j], scale, residual[i + j]);
            squares = fmaf(values[j], values[j], squares);
            next[j] = values[j] * norm[i + j];
        }
        write_unit(arguments.residual + at, values);
        write_unit(arguments.next + at, next);
    }
#pragma unroll
    for (int mask = OF_ROW / 2; mask; mask /= 2) squares += shuffle_xor(squares, mask);
    const int tiles = gridDim.x / (CLUSTER * ROW_BLOCKS);
    if (row < arguments.rows && thread % OF_ROW == 0) arguments.next_squares[row * tiles + tile] = squares;
}

// The newest inputs of B and C enter the states of some rows' convolutions.
__device__ void shift_convolutions(const Arguments& arguments, int helper) {
    for (int row = (int)blockIdx.x * HELPERS + helper; row < arguments.rows; row += (int)gridDim.x * HELPERS) {
        const long long slot = arguments.slots[row];
        if (slot < 0) continue;
        uint2* conv = (uint2*)(arguments.conv + slot * arguments.conv_slot + arguments.first);
        const float* newest = arguments.newest + row * 2 * D_STATE;
#pragma unroll
        for (int i = threadIdx.x % 32; i < 2 * D_STATE; i += 32) conv[i] = shifted(conv[i], newest[i]);
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, 1) project_out(const __grid_constant__ Arguments arguments) {
    Shared& shared = tiles_of_block<Shared>();
    start_next_kernel();
    const int warp = warp_index(), lane = threadIdx.x % 32;
    const int rank = (int)rank_in_cluster<CLUSTER>(), cluster = (int)blockIdx.x / CLUSTER;
    const int row_block = cluster % ROW_BLOCKS, tile = cluster / ROW_BLOCKS;
    const int part = arguments.k / CLUSTER, first = rank * part;
    if (warp == BRINGS_WEIGHTS && lane == 0) {
        shared.rings.init();
        barrier_init(&shared.all_parts, 1);
        barrier_init(&shared.scaled, 32 * HELPERS);
        barriers_ready();
        barrier_expect(&shared.all_parts, sizeof(shared.parts));
    }
    __syncwarp();
    cluster_sync<CLUSTER>();
    if (warp == BRINGS_WEIGHTS) {
        if (lane == 0) shared.rings.weights.bring(shared.rings.weight_tiles, arguments.weights, tile * N_TILE, first, first + part, PACE);
    } else if (warp == BRINGS_ROWS) {
        wait_for_earlier_kernels();
        if (lane == 0) shared.rings.rows.bring(shared.rings.row_tiles, arguments.u, row_block * ROWS, first, first + part);
    } else if (warp >= HELPS) {
        wait_for_earlier_kernels();
        const int helper = warp - HELPS, row = helper * OWN_ROWS / HELPERS, from = row_block * ROWS + rank * OWN_ROWS + row;
        find_scales<OWN_ROWS / HELPERS>(
            shared.scales + row, arguments.squares, from, arguments.rows, arguments.num_squares, arguments.k, arguments.eps);
        barrier_arrive(&shared.scaled);
        shift_convolutions(arguments, helper);
    } else {
        compute(arguments, shared, row_block, tile, rank);
    }
    __syncwarp();
    cluster_sync<CLUSTER>();  // no block leaves while others send to it
}
