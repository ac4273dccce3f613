// What the kernels that update states compute alike: sums over a warp, LoRA, the numbers of a state.
//
// The including code defines D_STATE, RANK and HALF_STATE (0 or 1: states are fp32 or bf16).

constexpr int WARP = 32;
constexpr int PER_LANE = D_STATE / WARP;         // numbers of a channel's state that a lane has
constexpr int STATE_BYTES = HALF_STATE ? 2 : 4;  // of a number

static_assert(PER_LANE == 2 || PER_LANE == 4);

// ---- sums over the lanes of a warp

__device__ __forceinline__ float sum_lanes(float value) {
#pragma unroll
    for (int mask = WARP / 2; mask; mask /= 2) value += shuffle_xor(value, mask);
    return value;
}

// The sums over lanes of `num` values, a power of two: values[0] becomes that of value lane / (WARP / num).
template <int num>
__device__ __forceinline__ void sum_lanes_of(float (&values)[num], int lane) {
    static_assert(num <= WARP && (num & (num - 1)) == 0);
    int mask = WARP / 2;
#pragma unroll
    for (int half = num / 2; half; half /= 2, mask /= 2) {
        const bool is_upper = lane & mask;
#pragma unroll
        for (int i = 0; i < half; i++) {
            const float given = is_upper ? values[i] : values[i + half];
            const float kept = is_upper ? values[i + half] : values[i];
            values[i] = kept + shuffle_xor(given, mask);
        }
    }
#pragma unroll
    for (int rest = WARP / num / 2; rest; rest /= 2) values[0] += shuffle_xor(values[0], rest);
}

// ---- LoRA, states

// RANK numbers: a row of LoRA's B, or A u.
struct LoraRow {
    static constexpr int WIDTH = RANK % 8 == 0 ? 8 : 1;  // that are loaded at once
    struct alignas(2 * WIDTH) Unit {
        u16 numbers[WIDTH];
    } units[RANK / WIDTH];

    __device__ __forceinline__ void load(const u16* from) {
#pragma unroll
        for (int i = 0; i < RANK / WIDTH; i++) units[i] = ((const Unit*)from)[i];
    }

    __device__ __forceinline__ float operator[](int r) const { return bf16(units[r / WIDTH].numbers[r % WIDTH]); }

    __device__ __forceinline__ float times(const float (&low)[RANK]) const {
        float sum = 0;
#pragma unroll
        for (int r = 0; r < RANK; r++) sum = fmaf((*this)[r], low[r], sum);
        return sum;
    }
};

__device__ __forceinline__ float times(const u16* lora, const float (&low)[RANK]) {
    LoraRow row;
    row.load(lora);
    return row.times(low);
}

// A lane's numbers of a channel's state, all in one access.
__device__ __forceinline__ void load_state(const char* from, float (&state)[PER_LANE]) {
    if constexpr (PER_LANE == 2) {
        const float2 two = HALF_STATE ? unpack_bf16(*(const u32*)from) : *(const float2*)from;
        state[0] = two.x, state[1] = two.y;
    } else {
        const float4 four = HALF_STATE ? four_bf16(*(const uint2*)from) : *(const float4*)from;
        state[0] = four.x, state[1] = four.y, state[2] = four.z, state[3] = four.w;
    }
}

__device__ __forceinline__ void store_state(char* to, const float (&state)[PER_LANE]) {
    if constexpr (PER_LANE == 2) {
        if constexpr (HALF_STATE) {
            *(u32*)to = pack_bf16(state[0], state[1]);
        } else {
            *(float2*)to = make_float2(state[0], state[1]);
        }
    } else {
        if constexpr (HALF_STATE) {
            *(uint2*)to = uint2{pack_bf16(state[0], state[1]), pack_bf16(state[2], state[3])};
        } else {
            *(float4*)to = make_float4(state[0], state[1], state[2], state[3]);
        }
    }
}
