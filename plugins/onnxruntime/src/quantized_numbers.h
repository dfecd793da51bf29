// Quantized weights as the whole numbers that stand for them. Included by kernels_body.h and kernels_amx.cc.

// Twice the 16 numbers of float4_e2m1 (mxfp4), which are whole numbers, and the same plus the largest, which are not negative.
constexpr float kE2m1Unit = 0.5f;
constexpr int32_t kE2m1Largest = 12;
alignas(16) constexpr int8_t kE2m1[16] = {0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12};
alignas(16) constexpr int8_t kE2m1Offset[16] = {12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0};

// What a dot product multiplies for the k-th four columns of a group: not negative, and more than the numbers by offset_of. The
// sign of int8 is left to dot_int8.
template <Storage storage, int k>
inline Ints numbers_at(const Ints* lines) {
  const Ints codes = codes_at<storage, k>(lines);
  if constexpr (storage == Storage::mxfp4) return look_up(kE2m1Offset, codes);
  else return codes;
}
constexpr int32_t offset_of(Storage storage) {
  return storage == Storage::int8 ? kInt8Offset : storage == Storage::mxfp4 ? kE2m1Largest : 1 << (bits_of(storage) - 1);
}

// The scales of kLanes rows, times that of a row of x.
template <Storage storage>
inline Floats scales_with(const uint8_t* scales, int64_t lane, float scale) {
  if constexpr (scale_bytes(storage) == 1) return multiply(load_powers(scales + lane), set(scale * kE2m1Unit));
  else return multiply(load(reinterpret_cast<const float*>(scales) + lane), set(scale));
}
