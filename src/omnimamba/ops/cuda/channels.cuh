// Numbers in bf16, and what becomes of a channel of the convolution.

__device__ __forceinline__ float4 four_bf16(uint2 bits) {
    const float2 first = unpack_bf16(bits.x), second = unpack_bf16(bits.y);
    return make_float4(first.x, first.y, second.x, second.y);
}

__device__ __forceinline__ float silu(float x) { return x / (1 + expf(-x)); }

__device__ __forceinline__ float softplus(float x) { return x > 20 ? x : log1pf(expf(x)); }  // as in torch

__device__ __forceinline__ float bf16(u16 bits) { return float_of((u32)bits << 16); }

__device__ __forceinline__ float bf16_at(const u16* from) { return bf16(*from); }

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
