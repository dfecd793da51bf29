// Rounds rows of x to int8. Plain C++, so that all instruction sets round in the same way. Included by kernels_body.h.

void quantize(const float* x, int64_t columns, const QuantizedLayout& layout, uint8_t* out) {
  for (int64_t b = 0; b < layout.blocks; ++b, x += layout.block, columns -= layout.block, out += layout.block_bytes) {
    const int64_t count = columns < layout.block ? columns : layout.block;
    int32_t largest = 0;  // the bits of the largest magnitude; bits have the order of the numbers, with NaN above all
    for (int64_t c = 0; c < count; ++c) {
      int32_t bits;
      memcpy(&bits, x + c, sizeof bits);
      bits &= 0x7fffffff;
      largest = bits > largest ? bits : largest;
    }
    float magnitude;
    memcpy(&magnitude, &largest, sizeof magnitude);
    // Below the threshold, and for zeros, the inverse would be infinite. NaN and infinity make the whole block NaN.
    const bool finite = largest < 0x7f800000;
    const float inverse = finite && magnitude > 1e-36f ? 127.0f / magnitude : 0.0f;
    int8_t* q = reinterpret_cast<int8_t*>(out + sizeof(QuantizedBlock));
    for (int64_t c = 0; c < count; ++c) {
      const float shifted = x[c] * inverse + 12582912.0f;  // 1.5 * 2^23: the sum is rounded to an integer
      int32_t bits;
      memcpy(&bits, &shifted, sizeof bits);
      q[c] = static_cast<int8_t>(bits - 0x4b400000);
    }
    if (!finite) memset(q, 0, static_cast<size_t>(count));
    if (count < layout.block) memset(q + count, 0, static_cast<size_t>(layout.block - count));
    int32_t sum = 0;
    for (int64_t c = 0; c < layout.block; ++c) sum += q[c];
    const QuantizedBlock header{finite ? magnitude / 127.0f : __builtin_nanf(""), sum};
    memcpy(out, &header, sizeof header);
  }
}
