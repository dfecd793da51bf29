// fp32 rows of x times panels, chunk by chunk. Weights are converted to fp32 in registers. If there are more rows than fit into
// registers, the first of them leave the converted weights in a buffer for the others. Included by kernels_body.h.

constexpr int64_t kChunk = 256;  // columns of a panel per chunk: 16 KiB in fp32

// With more rows than this at once, converting all weights into a buffer first is faster.
constexpr int direct_rows(Storage storage) { return is_quantized(storage) ? kUnpackingRows : kFloatRows; }
// Panels that this number of rows reads side by side; converting weights to fp32 in registers needs some of the registers.
constexpr int panels_of(Storage storage, int rows) {
  const int64_t most = is_quantized(storage) && rows <= direct_rows(storage) ? (rows <= 2 ? 2 : 1) : kSideBySide;
  const int panels = float_panels(rows, storage != Storage::fp32);
  return panels < most ? panels : static_cast<int>(most);
}
// Quantized weights of 4 and 8 bits are converted from the uppermost byte of a word; the result times this is the weight's number,
// which the scale multiplies.
constexpr float unit_of(Storage storage) {
  switch (storage) {
    case Storage::int8: return 0x1p-24f;
    case Storage::int4: return 0x1p-28f;
    case Storage::mxfp4: return 0x1p-24f * kE2m1Unit;
    default: return 1.0f;
  }
}

// The v-th vector of column j of a group.
template <Storage storage>
inline Floats weights_at(const uint8_t* group, int64_t v, int j) {
  const uint8_t* p = group + v * kLanes * (bytes_of(storage) / (kPanel * lines_of(storage)));
  if constexpr (storage == Storage::fp16) return load_half(reinterpret_cast<const uint16_t*>(p));
  if constexpr (storage == Storage::bf16) return load_bfloat(reinterpret_cast<const uint16_t*>(p));
  if constexpr (storage == Storage::fp32) return load(reinterpret_cast<const float*>(p));
  if constexpr (storage == Storage::int8) return to_floats(top_byte(load_ints(p) ^ set_bytes(0x80), j));
  if constexpr (storage == Storage::int4) {  // the low nibbles of four bytes are four columns, the high nibbles the next four
    const Ints numbers = load_ints(p) ^ set_bytes(0x88);
    return to_floats(top_byte((j < 4 ? numbers << 4 : numbers) & set_bytes(0xf0), j % 4));
  }
  if constexpr (storage == Storage::fp8) return from_e4m3(top_byte(load_ints(p), j));
  if constexpr (storage == Storage::mxfp4) {
    const Ints codes = load_ints(p);
    return to_floats(top_byte(look_up(kE2m1, j < 4 ? bits_at<0, 4>(codes) : bits_at<4, 4>(codes)), j % 4));
  }
  if constexpr (storage == Storage::int2) return numbers_in<2>(load_ints(p), 8 * (j % 4) + j / 4 * 2);
  if constexpr (storage == Storage::int3) {
    const int four = j / 4, byte = 8 * (j % 4);
    // Only the line that is needed, because half a group has no third one.
    if (four < 6) return numbers_in<3>(load_ints(p + four / 2 * 4 * kPanel), byte + four % 2 * 3);
    Ints lines[lines_of(storage)];
    load_lines<storage>(group, v, lines);
    return numbers_in<3>(four == 6 ? codes_at<storage, 6>(lines) : codes_at<storage, 7>(lines), byte);
  }
}

template <Storage storage, int j, int end>
__attribute__((always_inline)) inline void unpack_columns(const uint8_t* group, float* out) {
  for (int64_t v = 0; v < kVectors; ++v) store(out + j * kPanel + v * kLanes, weights_at<storage>(group, v, j));
  if constexpr (j + 1 < end) unpack_columns<storage, j + 1, end>(group, out);
}

// Converts `count` columns, rounded up to complete groups (or the half group at the end of a block), to out[column][16].
template <Storage storage>
void unpack(const uint8_t* group, int64_t count, float* out) {
  for (int64_t c = 0; c < count; c += columns_of(storage), group += bytes_of(storage)) {
    if constexpr (storage == Storage::int3) {
      if (count - c <= kHalfGroup) return unpack_columns<storage, 0, kHalfGroup>(group, out);
    }
    unpack_columns<storage, 0, columns_of(storage)>(group, out);
    out += columns_of(storage) * kPanel;
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
  float* converted;  // for the rows that follow: kChunk columns of each panel
};

// Adds column j and the following columns of a group, whose x is at x[i] + c. If it is not inlined, its sums are kept in memory.
template <Storage storage, bool keeps, int j, int R, int P>
__attribute__((always_inline)) inline void add_columns(const float* const* x, int64_t c, const uint8_t* group, int64_t stride,
                                                       float* converted, Floats (&total)[R][P][kVectors]) {
  for (int p = 0; p < P; ++p) {
    Floats w[kVectors];
    for (int v = 0; v < kVectors; ++v) {
      w[v] = weights_at<storage>(group + p * stride, v, j);
      if (keeps) store(converted + (p * kChunk + j) * kPanel + v * kLanes, w[v]);
    }
    for (int i = 0; i < R; ++i) {
      const Floats value = set(x[i][c + j]);
      for (int v = 0; v < kVectors; ++v) total[i][p][v] = multiply_add(value, w[v], total[i][p][v]);
    }
  }
  if constexpr (j + 1 < columns_of(storage)) add_columns<storage, keeps, j + 1>(x, c, group, stride, converted, total);
}

// Multiply-adds per row and panel for 64 bytes of the panel.
constexpr int instructions_of_floats(Storage storage) { return static_cast<int>(64 * columns_of(storage) / bytes_of(storage)); }

// Adds R rows times P panels to out[row][16] of each panel, which are `out_stride` apart; `keeps`: and fills chunk.converted.
template <Storage storage, bool keeps, int R, int P>
RQ_OWN_REGISTERS void multiply_chunk(const float* const* x, const Chunk& chunk, int64_t out_stride, float* out) {
  const uint8_t* group = chunk.weights;
  const int64_t stride = chunk.stride, end = chunk.begin + chunk.count;
  Floats total[R][P][kVectors];
  for (int i = 0; i < R; ++i) {
    for (int p = 0; p < P; ++p) {
      for (int v = 0; v < kVectors; ++v) total[i][p][v] = set(0.0f);
    }
  }
  float* converted = chunk.converted;
  for (int64_t c = chunk.begin; c < end; c += columns_of(storage), group += bytes_of(storage)) {
    for (int p = 0; p < P; ++p) prefetch<P, R * instructions_of_floats(storage)>(group + p * stride);
    add_columns<storage, keeps, 0>(x, c, group, stride, converted, total);
    if (keeps) converted += columns_of(storage) * kPanel;
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

// All rows, R at a time, times P panels: panel `first`, and further panels at distances of `apart`.
template <Storage storage, int R, int P>
void multiply_chunks(const float* const* x, int64_t rows, const Matrix& weights, int64_t first, int64_t apart, float* out) {
  const int64_t panel_bytes = static_cast<int64_t>(weights.panel_bytes), out_stride = apart * rows * kPanel;
  const int64_t scales_stride = apart * weights.blocks * kPanel;
  constexpr bool has_exponents = is_quantized(storage) && scale_bytes(storage) == 1;
  const uint8_t* data = weights.data + first * panel_bytes;
  Chunk chunk{0, 0, data, apart * panel_bytes, nullptr, has_exponents ? kPanel : scales_stride, unit_of(storage), nullptr};
  const Parts<R> parts(rows);
  alignas(64) float converted[P][kChunk * kPanel], powers[P][kPanel];
  chunk.converted = converted[0];
  for (int p = 0; p < P; ++p) memset(out + p * out_stride, 0, static_cast<size_t>(rows * kPanel) * sizeof(float));
  for (; chunk.begin < weights.columns; chunk.begin += chunk.count) {
    const int64_t left = weights.columns - chunk.begin;
    chunk.count = left < kChunk ? left : kChunk;
    if constexpr (is_quantized(storage)) {  // a chunk has one scale for each row
      const int64_t block_left = weights.block - chunk.begin % weights.block;
      if (block_left < chunk.count) chunk.count = block_left;
      const uint8_t* scales = weights.scales + (first * weights.blocks + chunk.begin / weights.block) * kPanel * scale_bytes(storage);
      chunk.scales = has_exponents ? powers[0] : reinterpret_cast<const float*>(scales);
      for (int p = 0; has_exponents && p < P; ++p) {
        for (int64_t v = 0; v < kPanel; v += kLanes) store(powers[p] + v, load_powers(scales + p * scales_stride + v));
      }
    }
    if constexpr (is_quantized(storage)) {  // blocks begin with a group
      const int64_t column = chunk.begin % weights.block;
      chunk.weights = data + chunk.begin / weights.block * (panel_bytes / weights.blocks);
      chunk.weights += column / columns_of(storage) * bytes_of(storage);
    } else {
      chunk.weights = data + chunk.begin * bytes_of(storage);
    }
    Chunk floats = chunk;
    floats.weights = reinterpret_cast<const uint8_t*>(converted);
    floats.stride = sizeof converted[0];
    // If the last group extends beyond x, that part of x must not be read.
    const bool unpacks = R > direct_rows(storage) || chunk.count % columns_of(storage) != 0;
    if (unpacks) {
      for (int p = 0; p < P; ++p) unpack<storage>(chunk.weights + p * chunk.stride, chunk.count, converted[p]);
    }
    parts.each([&](auto count, int64_t row) {
      float* sums = out + row * kPanel;
      if constexpr (storage == Storage::fp32) multiply_chunk<storage, false, count, P>(x + row, chunk, out_stride, sums);
      else if (unpacks || row > 0) multiply_chunk<Storage::fp32, false, count, P>(x + row, floats, out_stride, sums);
      else if (count == rows) multiply_chunk<storage, false, count, P>(x, chunk, out_stride, sums);
      else multiply_chunk<storage, true, count, P>(x, chunk, out_stride, sums);
    });
  }
}

// As many rows at a time as fit into registers, and as many panels side by side as the remaining registers allow.
template <Storage storage>
void multiply_panels(const float* const* x, int64_t rows, const Matrix& weights, int64_t first, int64_t count, float* out) {
  with_rows<kFloatRows>(rows, [&](auto R) {
    in_stretches<panels_of(storage, R)>(count, [&](auto P, int64_t panel, int64_t apart) {
      multiply_chunks<storage, R, P>(x, rows, weights, first + panel, apart, out + panel * rows * kPanel);
    });
  });
}

void multiply_floats(const float* const* x, int64_t rows, const Matrix& weights, int64_t first, int64_t count, float* out) {
  switch (weights.storage) {
    case Storage::fp32: return multiply_panels<Storage::fp32>(x, rows, weights, first, count, out);
    case Storage::fp16: return multiply_panels<Storage::fp16>(x, rows, weights, first, count, out);
    case Storage::bf16: return multiply_panels<Storage::bf16>(x, rows, weights, first, count, out);
    case Storage::int8: return multiply_panels<Storage::int8>(x, rows, weights, first, count, out);
    case Storage::int4: return multiply_panels<Storage::int4>(x, rows, weights, first, count, out);
    case Storage::mxfp4: return multiply_panels<Storage::mxfp4>(x, rows, weights, first, count, out);
    case Storage::fp8: return multiply_panels<Storage::fp8>(x, rows, weights, first, count, out);
    case Storage::int3: return multiply_panels<Storage::int3>(x, rows, weights, first, count, out);
    case Storage::int2: return multiply_panels<Storage::int2>(x, rows, weights, first, count, out);
  }
}

// `count` panels from `first` on as out[column][count * 16], in fp32.
template <Storage storage>
void convert_panels(const Matrix& weights, int64_t first, int64_t count, float* out) {
  const int64_t block = is_quantized(storage) ? weights.block : kChunk, bytes = static_cast<int64_t>(weights.panel_bytes);
  const int64_t bytes_of_block = is_quantized(storage) ? bytes / weights.blocks : block * bytes_of(storage);
  const Floats unit = set(unit_of(storage));
  alignas(64) float converted[kMaxBlock * kPanel];
  for (int64_t p = 0; p < count; ++p) {
    const uint8_t* panel = weights.data + (first + p) * bytes;
    for (int64_t i = 0; i * block < weights.columns; ++i) {
      const int64_t begin = i * block, left = weights.columns - begin, columns = left < block ? left : block;
      unpack<storage>(panel + i * bytes_of_block, columns, converted);
      Floats factors[kVectors];
      for (int64_t v = 0; v < kVectors; ++v) {
        factors[v] = unit;
        if constexpr (is_quantized(storage)) {
          const uint8_t* scales = weights.scales + (((first + p) * weights.blocks + i) * kPanel + v * kLanes) * scale_bytes(storage);
          if constexpr (scale_bytes(storage) == 1) factors[v] = multiply(load_powers(scales), unit);
          else factors[v] = multiply(load(reinterpret_cast<const float*>(scales)), unit);
        }
      }
      for (int64_t c = 0; c < columns; ++c) {
        float* to = out + ((begin + c) * count + p) * kPanel;
        for (int64_t v = 0; v < kVectors; ++v) store(to + v * kLanes, multiply(load(converted + c * kPanel + v * kLanes), factors[v]));
      }
    }
  }
}

void convert(const Matrix& weights, int64_t first, int64_t count, float* out) {
  switch (weights.storage) {
    case Storage::fp32: return convert_panels<Storage::fp32>(weights, first, count, out);
    case Storage::fp16: return convert_panels<Storage::fp16>(weights, first, count, out);
    case Storage::bf16: return convert_panels<Storage::bf16>(weights, first, count, out);
    case Storage::int8: return convert_panels<Storage::int8>(weights, first, count, out);
    case Storage::int4: return convert_panels<Storage::int4>(weights, first, count, out);
    case Storage::mxfp4: return convert_panels<Storage::mxfp4>(weights, first, count, out);
    case Storage::fp8: return convert_panels<Storage::fp8>(weights, first, count, out);
    case Storage::int3: return convert_panels<Storage::int3>(weights, first, count, out);
    case Storage::int2: return convert_panels<Storage::int2>(weights, first, count, out);
  }
}
