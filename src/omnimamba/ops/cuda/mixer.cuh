// What all kernels of decoding compute alike: sums over a warp, the convolution of a channel, LoRA, the numbers of a state.
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

// ---- convolution, LoRA, states

__device__ __forceinline__ float4 four_bf16(uint2 bits) {
    const float2 first = unpack_bf16(bits.x), second = unpack_bf16(bits.y);
    return make_float4(first.x, first.y, second.x, second.y);
}

__device__ __forceinline__ float silu(float x) { return x / (1 + expf(-x)); }

__device__ __forceinline__ float softplus(float x) { return x > 20 ? x : log1pf(expf(x)); }  // as in torch

__device__ __forceinline__ float bf16_at(const u16* from) { return float_of((u32)*from << 16); }

// Inputs of a channel and its taps are four bf16, oldest first.
__device__ __forceinline__ float convolve(uint2 past, float newest, uint2 weights, float bias) {
    const float4 x = four_bf16(past), taps = four_bf16(weights);
    return silu(fmaf(newest, taps.w, fmaf(x.w, taps.z, fmaf(x.z, taps.y, fmaf(x.y, taps.x, bias)))));
}

// The inputs without the oldest and with the newest.
__device__ __forceinline__ uint2 shifted(uint2 past, float newest) {
    uint2 result;
    result.x = past.x >> 16 | past.y << 16;
    result.y = past.y >> 16 | (u32)to_bf16(newest) << 16;
    return result;
}

// A row of LoRA's B times A u.
__device__ __forceinline__ float times(const u16* lora, const float (&low)[RANK]) {
    float sum = 0;
    if constexpr (RANK % 8 == 0) {
#pragma unroll
        for (int r = 0; r < RANK; r += 8) {
            const uint4 pairs = *(const uint4*)(lora + r);
            const float4 first = four_bf16({pairs.x, pairs.y}), second = four_bf16({pairs.z, pairs.w});
            sum = fmaf(first.w, low[r + 3], fmaf(first.z, low[r + 2], fmaf(first.y, low[r + 1], fmaf(first.x, low[r], sum))));
            sum = fmaf(second.w, low[r + 7], fmaf(second.z, low[r + 6], fmaf(second.y, low[r + 5], fmaf(second.x, low[r + 4], sum))));
        }
    } else {
#pragma unroll
        for (int r = 0; r < RANK; r++) sum = fmaf(bf16_at(lora + r), low[r], sum);
    }
    return sum;
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
