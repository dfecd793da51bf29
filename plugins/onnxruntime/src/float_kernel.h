// fp32 rows of x times panels, chunk by chunk. Weights are converted to fp32 in registers or, for many rows, once into a buffer.
// Included by kernels_body.h.

constexpr int64_t kChunk = 256;  // columns of a panel per chunk: 16 KiB in fp32

constexpr bool is_quantized(Storage storage) { return storage == Storage::int8 || storage == Storage::int4; }
// Columns that a panel stores together, and their bytes.
constexpr int columns_of(Storage storage) { return storage == Storage::int8 ? 4 : storage == Storage::int4 ? 8 : 1; }
constexpr int64_t bytes_of(Storage storage) { return kPanel * (storage == Storage::fp16 || storage == Storage::bf16 ? 2 : 4); }
// With more rows than this, a buffer is faster.
constexpr int direct_rows(Storage storage) { return is_quantized(storage) ? 4 : kFloatRows; }
// Panels that this number of rows reads side by side; converting weights to fp32 in registers needs some of the registers.
constexpr int panels_of(Storage storage, int rows) {
  const int64_t most = is_quantized(storage) && rows <= direct_rows(storage) ? (rows <= 2 ? 2 : 1) : kSideBySide;
  const int panels = float_panels(rows, storage != Storage::fp32);
  return panels < most ? panels : static_cast<int>(most);
}
// Quantized weights are converted from the uppermost byte of a word; the result times this is the weight's integer.
constexpr float unit_of(Storage storage) {
  return storage == Storage::int8 ? 0x1p-24f : storage == Storage::int4 ? 0x1p-28f : 1.0f;
}

// The v-th vector of column j of a group.
template <Storage storage>
inline Floats weights_at(const uint8_t* group, int64_t v, int j) {
  const uint8_t* p = group + v * kLanes * (bytes_of(storage) / kPanel);
  if constexpr (storage == Storage::fp16) return load_half(reinterpret_cast<const uint16_t*>(p));
  if constexpr (storage == Storage::bf16) return load_bfloat(reinterpret_cast<const uint16_t*>(p));
  if constexpr (storage == Storage::fp32) return load(reinterpret_cast<const float*>(p));
  if constexpr (storage == Storage::int8) return to_floats(top_byte(load_ints(p) ^ set_bytes(0x80), j));
  if constexpr (storage == Storage::int4) {  // the low nibbles of four bytes are four columns, the high nibbles the next four
    const Ints numbers = load_ints(p) ^ set_bytes(0x88);
    return to_floats(top_byte((j < 4 ? numbers << 4 : numbers) & set_bytes(0xf0), j % 4));
  }
}

// Converts `count` columns, rounded up to complete groups, to out[column][16].
template <Storage storage>
void unpack(const uint8_t* group, int64_t count, float* out) {
  for (int64_t c = 0; c < count; c += columns_of(storage), group += bytes_of(storage)) {
    for (int j = 0; j < columns_of(storage); ++j, out += kPanel) {
      for (int64_t v = 0; v < kVectors; ++v) store(out + v * kLanes, weights_at<storage>(group, v, j));
    }
  }
}

// Columns of P panels, `stride` bytes apart, and of the rows of x, which start at x[i] + begin. An output is its sum times
// unit and, if there are any, scale; those are scales_stride apart.
struct Chunk {
  int64_t begin, count;
  const uint8_t* weights;
  int64_t stride;
  const float* scales;
  int64_t scales_stride;
  float unit;
};

// Adds column j and the following columns of a group, whose x is at x[i] + c. If it is not inlined, its sums are kept in memory.
template <Storage storage, int j, int R, int P>
__attribute__((always_inline)) inline void add_columns(const float* const* x, int64_t c, const uint8_t* group, int64_t stride,
                                                       Floats (&total)[R][P][kVectors]) {
  for (int p = 0; p < P; ++p) {
    Floats w[kVectors];
    for (int v = 0; v < kVectors; ++v) w[v] = weights_at<storage>(group + p * stride, v, j);
    for (int i = 0; i < R; ++i) {
      const Floats value = set(x[i][c + j]);
      for (int v = 0; v < kVectors; ++v) total[i][p][v] = multiply_add(value, w[v], total[i][p][v]);
    }
  }
  if constexpr (j + 1 < columns_of(storage)) add_columns<storage, j + 1>(x, c, group, stride, total);
}

// Multiply-adds per row and panel for 64 bytes of the panel.
constexpr int instructions_of_floats(Storage storage) { return static_cast<int>(64 * columns_of(storage) / bytes_of(storage)); }

// Adds R rows times P panels to out[row][16] of each panel, which are `out_stride` apart.
template <Storage storage, int R, int P>
void multiply_chunk(const float* const* x, const Chunk& chunk, int64_t out_stride, float* out) {
  const uint8_t* group = chunk.weights;
  const int64_t stride = chunk.stride, end = chunk.begin + chunk.count;
  Floats total[R][P][kVectors];
  for (int i = 0; i < R; ++i) {
    for (int p = 0; p < P; ++p) {
      for (int v = 0; v < kVectors; ++v) total[i][p][v] = set(0.0f);
    }
  }
  for (int64_t c = chunk.begin; c < end; c += columns_of(storage), group += bytes_of(storage)) {
    for (int p = 0; p < P; ++p) prefetch<P, R * instructions_of_floats(storage)>(group + p * stride);
    add_columns<storage, 0>(x, c, group, stride, total);
  }
  for (int p = 0; p < P; ++p) {
    for (int i = 0; i < R; ++i) {
      for (int v = 0; v < kVectors; ++v) {
        float* sum = out + p * out_stride + i * kPanel + v * kLanes;
        const Floats unit = set(chunk.unit);
        const Floats scale = chunk.scales ? multiply(load(chunk.scales + p * chunk.scales_stride + v * kLanes), unit) : unit;
        store(sum, multiply_add(total[i][p][v], scale, load(sum)));
      }
    }
  }
}

// The first `count` rows, R at a time.
template <Storage storage, int R, int P>
void multiply_rows(const float* const* x, int64_t count, const Chunk& chunk, int64_t out_stride, float* out) {
  for (; count >= R; count -= R, x += R, out += R * kPanel) multiply_chunk<storage, R, P>(x, chunk, out_stride, out);
  if constexpr (R > 1) {
    if (count > 0) multiply_rows<storage, R - 1, P>(x, count, chunk, out_stride, out);
  }
}

// All rows, R at a time, times P panels: panel `first`, and further panels at distances of `apart`.
template <Storage storage, int R, int P>
void multiply_chunks(const float* const* x, int64_t rows, const Matrix& weights, int64_t first, int64_t apart, float* out) {
  const int64_t panel_bytes = static_cast<int64_t>(weights.panel_bytes), out_stride = apart * rows * kPanel;
  const uint8_t* data = weights.data + first * panel_bytes;
  Chunk chunk{0, 0, data, apart * panel_bytes, nullptr, apart * weights.blocks * kPanel, unit_of(storage)};
  alignas(64) float unpacked[P][kChunk * kPanel];
  for (int p = 0; p < P; ++p) memset(out + p * out_stride, 0, static_cast<size_t>(rows * kPanel) * sizeof(float));
  for (; chunk.begin < weights.columns; chunk.begin += chunk.count) {
    const int64_t left = weights.columns - chunk.begin;
    chunk.count = left < kChunk ? left : kChunk;
    if constexpr (is_quantized(storage)) {  // a chunk has one scale for each row
      const int64_t block_left = weights.block - chunk.begin % weights.block;
      if (block_left < chunk.count) chunk.count = block_left;
      chunk.scales = weights.scales + (first * weights.blocks + chunk.begin / weights.block) * kPanel;
    }
    chunk.weights = data + chunk.begin / columns_of(storage) * bytes_of(storage);
    // If the last group extends beyond x, that part of x must not be read.
    if (storage != Storage::fp32 && (rows > direct_rows(storage) || chunk.count % columns_of(storage) != 0)) {
      for (int p = 0; p < P; ++p) unpack<storage>(chunk.weights + p * chunk.stride, chunk.count, unpacked[p]);
      Chunk floats = chunk;
      floats.weights = reinterpret_cast<const uint8_t*>(unpacked);
      floats.stride = sizeof unpacked[0];
      multiply_rows<Storage::fp32, R, P>(x, rows, floats, out_stride, out);
    } else {
      multiply_rows<storage, R, P>(x, rows, chunk, out_stride, out);
    }
  }
}

// `count` panels in P stretches of equal length, side by side, each read from its first panel to its last; the rest one by one.
template <Storage storage, int R, int P>
void multiply_stretches(const float* const* x, int64_t rows, const Matrix& weights, int64_t first, int64_t count, float* out) {
  const int64_t stretch = count / P, size = rows * kPanel;
  for (int64_t i = 0; i < stretch; ++i) multiply_chunks<storage, R, P>(x, rows, weights, first + i, stretch, out + i * size);
  if constexpr (P > 1) {
    const int64_t done = P * stretch;
    multiply_stretches<storage, R, 1>(x, rows, weights, first + done, count - done, out + done * size);
  }
}

// As many rows at a time as fit into registers, and as many panels side by side as the remaining registers allow.
template <Storage storage, int R = 1>
void multiply_panels(const float* const* x, int64_t rows, const Matrix& weights, int64_t first, int64_t count, float* out) {
  if constexpr (R < kFloatRows) {
    if (rows > R) return multiply_panels<storage, R + 1>(x, rows, weights, first, count, out);
  }
  multiply_stretches<storage, R, panels_of(storage, R)>(x, rows, weights, first, count, out);
}

void multiply_floats(const float* const* x, int64_t rows, const Matrix& weights, int64_t first, int64_t count, float* out) {
  switch (weights.storage) {
    case Storage::fp32: return multiply_panels<Storage::fp32>(x, rows, weights, first, count, out);
    case Storage::fp16: return multiply_panels<Storage::fp16>(x, rows, weights, first, count, out);
    case Storage::bf16: return multiply_panels<Storage::bf16>(x, rows, weights, first, count, out);
    case Storage::int8: return multiply_panels<Storage::int8>(x, rows, weights, first, count, out);
    case Storage::int4: return multiply_panels<Storage::int4>(x, rows, weights, first, count, out);
  }
}
