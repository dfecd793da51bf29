// fp32 rows of x times one panel: a chunk of the panel is unpacked to fp32, if it is not stored so, and multiplied with all
// rows while it is in the first-level cache. Included by kernels_body.h.

constexpr int64_t kChunk = 256;  // columns of a panel at once: 16 KiB in fp32

constexpr int64_t bytes_of(Storage storage) { return storage == Storage::fp32 ? 4 : 2; }

template <Storage storage>
inline Floats weights_at(const uint8_t* chunk, int64_t i) {
  if constexpr (storage == Storage::fp16) return load_half(reinterpret_cast<const uint16_t*>(chunk) + i);
  if constexpr (storage == Storage::bf16) return load_bfloat(reinterpret_cast<const uint16_t*>(chunk) + i);
  return load(reinterpret_cast<const float*>(chunk) + i);
}

// Columns [begin, begin + count), rounded up to a whole group, to out[column][16].
template <Storage storage>
void unpack(const uint8_t* panel, const Matrix& weights, const float* scales, int64_t begin, int64_t count, float* out) {
  if constexpr (storage != Storage::int8 && storage != Storage::int4) {
    const uint8_t* chunk = panel + begin * kPanel * bytes_of(storage);
    for (int64_t i = 0; i < count * kPanel; i += kLanes) store(out + i, weights_at<storage>(chunk, i));
  } else {
    constexpr int kBits = storage == Storage::int8 ? 8 : 4, kColumns = 32 / kBits;  // columns in a lane of Ints
    constexpr float kZeroPoint = storage == Storage::int8 ? 128.0f : 8.0f;
    const uint8_t* p = panel + begin * kPanel * kBits / 8;
    for (int64_t c = 0; c < count; c += kColumns, p += kPanel * 4) {
      const float* scale = scales + (begin + c) / weights.block * kPanel;
      for (int v = 0; v < kVectors; ++v) {
        const Ints word = load_ints(p + v * kLanes * 4);
        const Floats s = load(scale + v * kLanes);
        for (int j = 0; j < kColumns; ++j) {
          // int4: the low nibbles of four bytes are four columns, the high nibbles the next four.
          const int shift = kBits == 8 ? 8 * j : 8 * (j % 4) + 4 * (j / 4);
          store(out + (c + j) * kPanel + v * kLanes, multiply(to_floats(field<kBits>(word, shift)) - set(kZeroPoint), s));
        }
      }
    }
  }
}

template <Storage storage, int R>
void multiply_chunk(const float* const* x, int64_t begin, const uint8_t* chunk, int64_t count, float* out) {
  Floats total[R][kVectors];
  for (int i = 0; i < R; ++i) {
    for (int v = 0; v < kVectors; ++v) total[i][v] = set(0.0f);
  }
  for (int64_t c = 0; c < count; ++c) {
    __builtin_prefetch(chunk + c * kPanel * bytes_of(storage) + kAhead);
    Floats w[kVectors];
    for (int v = 0; v < kVectors; ++v) w[v] = weights_at<storage>(chunk, c * kPanel + v * kLanes);
    for (int i = 0; i < R; ++i) {
      const Floats value = set(x[i][begin + c]);
      for (int v = 0; v < kVectors; ++v) total[i][v] = multiply_add(value, w[v], total[i][v]);
    }
  }
  for (int i = 0; i < R; ++i) {
    for (int v = 0; v < kVectors; ++v) {
      float* sum = out + i * kPanel + v * kLanes;
      store(sum, add(load(sum), total[i][v]));
    }
  }
}

template <Storage storage, int R>
void multiply_rows(const float* const* x, int64_t rows, int64_t begin, const uint8_t* chunk, int64_t count, float* out) {
  for (; rows >= R; rows -= R, x += R, out += R * kPanel) multiply_chunk<storage, R>(x, begin, chunk, count, out);
  if constexpr (R > 1) multiply_rows<storage, R - 1>(x, rows, begin, chunk, count, out);
}

template <Storage storage>
void multiply_stored(const float* const* x, int64_t rows, const Matrix& weights, int64_t panel, float* out) {
  constexpr bool kQuantized = storage == Storage::int8 || storage == Storage::int4;
  const uint8_t* data = weights.data + static_cast<size_t>(panel) * weights.panel_bytes;
  memset(out, 0, static_cast<size_t>(rows * kPanel) * sizeof(float));
  alignas(64) float unpacked[kChunk * kPanel];
  for (int64_t begin = 0; begin < weights.columns; begin += kChunk) {
    const int64_t count = weights.columns - begin < kChunk ? weights.columns - begin : kChunk;
    // Quantized weights are unpacked whatever the number of rows; others only where the rows outweigh it.
    if (kQuantized || (storage != Storage::fp32 && rows > kFloatRows)) {
      unpack<storage>(data, weights, weights.scales + panel * weights.blocks * kPanel, begin, count, unpacked);
      multiply_rows<Storage::fp32, kFloatRows>(x, rows, begin, reinterpret_cast<const uint8_t*>(unpacked), count, out);
    } else if constexpr (!kQuantized) {
      multiply_rows<storage, kFloatRows>(x, rows, begin, data + begin * kPanel * bytes_of(storage), count, out);
    }
  }
}

void multiply_floats(const float* const* x, int64_t rows, const Matrix& weights, int64_t panel, float* out) {
  switch (weights.storage) {
    case Storage::fp32: return multiply_stored<Storage::fp32>(x, rows, weights, panel, out);
    case Storage::fp16: return multiply_stored<Storage::fp16>(x, rows, weights, panel, out);
    case Storage::bf16: return multiply_stored<Storage::bf16>(x, rows, weights, panel, out);
    case Storage::int8: return multiply_stored<Storage::int8>(x, rows, weights, panel, out);
    case Storage::int4: return multiply_stored<Storage::int4>(x, rows, weights, panel, out);
  }
}
