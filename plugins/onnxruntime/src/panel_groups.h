// How panels store quantized weights: a group of columns, of each four columns one in every byte of a word, in some lines of 64
// bytes (a word for each of the panel's rows). Included by kernels_body.h.

// The same byte four times in every word.
inline Ints set_bytes(uint32_t byte) { return set(static_cast<int32_t>(byte * 0x01010101u)); }

constexpr bool is_quantized(Storage storage) { return storage >= Storage::int8; }
// Of a group: how often it has four columns, and its lines.
constexpr int fours_of(Storage storage) {
  return bits_of(storage) == 8 ? 1 : bits_of(storage) == 4 ? 2 : bits_of(storage) == 2 ? 4 : 8;
}
constexpr int lines_of(Storage storage) { return storage == Storage::int3 ? 3 : 1; }
// Columns that a panel stores together, and their bytes.
constexpr int columns_of(Storage storage) { return is_quantized(storage) ? 4 * fours_of(storage) : 1; }
constexpr int64_t bytes_of(Storage storage) { return kPanel * columns_of(storage) * bits_of(storage) / 8; }
// The last group of a block of int3 may be half a group: its first two lines, with as many bits unused.
constexpr int kHalfGroup = columns_of(Storage::int3) / 2;

template <int first, int count>
inline Ints bits_at(Ints bytes) {
  const Ints low = first ? shift_right<first>(bytes) : bytes;
  if constexpr (first + count == 8 && kShiftsBytes) return low;
  else return low & set_bytes((1u << count) - 1);
}

// The codes of the k-th four columns of a group, a byte each.
template <Storage storage, int k>
inline Ints codes_at(const Ints* lines) {
  constexpr int bits = bits_of(storage);
  if constexpr (storage != Storage::int3) return bits == 8 ? lines[0] : bits_at<bits * k % 8, bits>(lines[0]);
  else if constexpr (k < 6) return bits_at<bits * (k % 2), bits>(lines[k / 2]);
  else {  // two bits above the others in the first or the last line, and one in the second
    return bits_at<6, 2>(lines[k == 6 ? 0 : 2]) | (shift_right<k == 6 ? 4 : 5>(lines[1]) & set_bytes(4));
  }
}

template <Storage storage>
inline void load_lines(const uint8_t* group, int64_t v, Ints (&lines)[lines_of(storage)]) {
  for (int i = 0; i < lines_of(storage); ++i) lines[i] = load_ints(group + (i * kPanel + v * kLanes) * 4);
}
