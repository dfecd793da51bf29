// fp32 rows of x times panels, chunk by chunk. Weights become fp32 in registers or, where many rows share them, once in a buffer.
// Included by kernels_body.h.

constexpr int64_t kChunk = 256;  // columns of a panel at once: 16 KiB in fp32

constexpr bool is_quantized(Storage storage) { return storage == Storage::int8 || storage == Storage::int4; }
// Columns that a panel keeps together, and their bytes.
constexpr int columns_of(Storage storage) { return storage == Storage::int8 ? 4 : storage == Storage::int4 ? 8 : 1; }
constexpr int64_t bytes_of(Storage storage) { return kPanel * (storage == Storage::fp16 || storage == Storage::bf16 ? 2 : 4); }
// More rows than these are worth a buffer.
constexpr int direct_rows(Storage storage) { return is_quantized(storage) ? 4 : kFloatRows; }
// Panels that so many rows read side by side; turning weights into fp32 in registers takes some of these.
constexpr int panels_of(Storage storage, int rows) {
  const int64_t most = is_quantized(storage) && rows <= direct_rows(storage) ? (rows <= 2 ? 2 : 1) : kSideBySide;
  const int panels = float_panels(rows, storage != Storage::fp32);
  return panels < most ? panels : static_cast<int>(most);
}
// Quantized weights come as whole numbers over this: what is converted is the uppermost byte of a word.
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

// `count` columns, rounded up to whole groups, to out[column][16].
template <Storage storage>
void unpack(const uint8_t* group, int64_t count, float* out) {
  for (int64_t c = 0; c < count; c += columns_of(storage), group += bytes_of(storage)) {
    for (int j = 0; j < columns_of(storage); ++j, out += kPanel) {
      for (int64_t v = 0; v < kVectors; ++v) store(out + v * kLanes, weights_at<storage>(group, v, j));
    }
  }
}

// Columns of P panels, `stride` bytes apart, and of the rows of x, which start at x[i] + begin. An output gets its sum times
// unit and, if there are any, scale; those are scales_stride apart.
struct Chunk {
  int64_t begin, count;
  const uint8_t* weights;
  size_t stride;
  const float* scales;
  int64_t scales_stride;
  float unit;
};

// Adds column j and those after it of a group, whose x is at x[i] + c. Not inlined, it would keep its sums in memory.
template <Storage storage, int j, int R, int P>
__attribute__((always_inline)) inline void add_columns(const float* const* x, int64_t c, const uint8_t* group, size_t stride,
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

// Whether nothing is prefetched for weights in huge pages, with which the processor's own prefetcher keeps up: for so few
// multiply-adds a line of 64 bytes.
constexpr bool reads_unaided(Storage storage, int rows) {
  return kReadsHugePagesInOrder && !is_quantized(storage) && rows * (storage == Storage::fp32 ? 1 : 2) <= 4;
}

// Adds R rows times P panels to out[panel][row][16], of which there are `rows` rows.
template <Storage storage, int R, int P, bool unaided>
void multiply_chunk(const float* const* x, const Chunk& chunk, int64_t rows, float* out) {
  const uint8_t* group = chunk.weights;
  const size_t stride = chunk.stride;
  const int64_t end = chunk.begin + chunk.count;
  Floats total[R][P][kVectors];
  for (int i = 0; i < R; ++i) {
    for (int p = 0; p < P; ++p) {
      for (int v = 0; v < kVectors; ++v) total[i][p][v] = set(0.0f);
    }
  }
  for (int64_t c = chunk.begin; c < end; c += columns_of(storage), group += bytes_of(storage)) {
    if constexpr (!unaided) {
      for (int p = 0; p < P; ++p) prefetch<P>(group + p * stride, prefetch_distance(P));
    }
    add_columns<storage, 0>(x, c, group, stride, total);
  }
  for (int p = 0; p < P; ++p) {
    for (int i = 0; i < R; ++i) {
      for (int v = 0; v < kVectors; ++v) {
        float* sum = out + (p * rows + i) * kPanel + v * kLanes;
        const Floats unit = set(chunk.unit);
        const Floats scale = chunk.scales ? multiply(load(chunk.scales + p * chunk.scales_stride + v * kLanes), unit) : unit;
        store(sum, multiply_add(total[i][p][v], scale, load(sum)));
      }
    }
  }
}

// The first `count` rows, R at once.
template <Storage storage, int R, int P, bool unaided>
void multiply_rows(const float* const* x, int64_t count, const Chunk& chunk, int64_t rows, float* out) {
  for (; count >= R; count -= R, x += R, out += R * kPanel) multiply_chunk<storage, R, P, unaided>(x, chunk, rows, out);
  if constexpr (R > 1) {
    if (count > 0) multiply_rows<storage, R - 1, P, unaided>(x, count, chunk, rows, out);
  }
}

// All rows, R at once, times P panels from `first` on.
template <Storage storage, int R, int P, bool unaided>
void multiply_chunks(const float* const* x, int64_t rows, const Matrix& weights, int64_t first, float* out) {
  const uint8_t* data = weights.data + static_cast<size_t>(first) * weights.panel_bytes;
  Chunk chunk{0, 0, data, weights.panel_bytes, nullptr, weights.blocks * kPanel, unit_of(storage)};
  alignas(64) float unpacked[P][kChunk * kPanel];
  memset(out, 0, static_cast<size_t>(P * rows * kPanel) * sizeof(float));
  for (; chunk.begin < weights.columns; chunk.begin += chunk.count) {
    const int64_t left = weights.columns - chunk.begin;
    chunk.count = left < kChunk ? left : kChunk;
    if constexpr (is_quantized(storage)) {  // a chunk has one scale for each row
      const int64_t block_left = weights.block - chunk.begin % weights.block;
      if (block_left < chunk.count) chunk.count = block_left;
      chunk.scales = weights.scales + first * chunk.scales_stride + chunk.begin / weights.block * kPanel;
    }
    chunk.weights = data + chunk.begin / columns_of(storage) * bytes_of(storage);
    // What x lacks of the last group must not be read.
    if (storage != Storage::fp32 && (rows > direct_rows(storage) || chunk.count % columns_of(storage) != 0)) {
      for (int p = 0; p < P; ++p) unpack<storage>(chunk.weights + p * weights.panel_bytes, chunk.count, unpacked[p]);
      Chunk floats = chunk;
      floats.weights = reinterpret_cast<const uint8_t*>(unpacked);
      floats.stride = sizeof unpacked[0];
      multiply_rows<Storage::fp32, R, P, unaided>(x, rows, floats, rows, out);
    } else {
      multiply_rows<storage, R, P, unaided>(x, rows, chunk, rows, out);
    }
  }
}

// `count` panels, P side by side.
template <Storage storage, int R, int P, bool unaided>
void multiply_panels_by(const float* const* x, int64_t rows, const Matrix& weights, int64_t first, int64_t count, float* out) {
  for (; count >= P; count -= P, first += P, out += P * rows * kPanel) {
    multiply_chunks<storage, R, P, unaided>(x, rows, weights, first, out);
  }
  if constexpr (P > 1) multiply_panels_by<storage, R, 1, unaided>(x, rows, weights, first, count, out);
}

// As many rows at once as registers hold, and side by side the panels that these leave room for.
template <Storage storage, int R = 1>
void multiply_panels(const float* const* x, int64_t rows, const Matrix& weights, int64_t first, int64_t count, float* out) {
  if constexpr (R < kFloatRows) {
    if (rows > R) return multiply_panels<storage, R + 1>(x, rows, weights, first, count, out);
  }
  constexpr int P = panels_of(storage, R);
  if constexpr (reads_unaided(storage, R)) {
    if (weights.huge_pages) return multiply_panels_by<storage, R, P, true>(x, rows, weights, first, count, out);
  }
  multiply_panels_by<storage, R, P, false>(x, rows, weights, first, count, out);
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
