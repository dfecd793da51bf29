// Decodes row after row. A piece of a row is unpacked, stays in the first-level cache, and is scaled there. If the words of a row
// are far apart, those of several rows are first gathered into rows. The including file names the function (RQ_DECODE).
//
// All loops can be vectorized by compilers.
#include <algorithm>
#include <cstring>

#ifdef RQ_X86
#include <immintrin.h>
#endif

#include "decode.h"

namespace {

constexpr int64_t kColumns = 512;           // of a piece; a multiple of the columns in any word
constexpr int64_t kWordRows = 16;           // consecutive words in a column: a cache line
constexpr int64_t kStride = kColumns + 16;  // such that rows are not all in the same set of the cache
constexpr int64_t kRun = 16;                // columns that get the scale of a group at a time

#define RQ_RESTRICT __restrict__

// Codes of 4 bits: the even column is in the low bits.
void unpack_pairs(const uint8_t* RQ_RESTRICT bytes, uint8_t* RQ_RESTRICT codes, int64_t count) {
  for (int64_t c = 0; c < (count + 1) / 2; ++c) {
    codes[2 * c] = bytes[c] & 15;
    codes[2 * c + 1] = bytes[c] >> 4;
  }
}

// The code that starts at bit `shift` of every word.
template <typename Word>
void unpack_shifted(const uint8_t* RQ_RESTRICT words, uint8_t* RQ_RESTRICT codes, int64_t count, int shift, int bits) {
  const Word mask = static_cast<Word>((1 << bits) - 1);
  for (int64_t c = 0; c < count; ++c) {
    Word word;
    std::memcpy(&word, words + sizeof(Word) * c, sizeof(Word));
    codes[c] = static_cast<uint8_t>(word >> shift & mask);
  }
}

// The number in `table` for each code below 16, in its place.
void look_up(const int8_t* table, uint8_t* codes, int64_t count) {
  int64_t c = 0;
#if defined(__SSSE3__)
  const __m128i numbers = _mm_loadu_si128(reinterpret_cast<const __m128i*>(table));
  for (; c + 16 <= count; c += 16) {
    __m128i* some = reinterpret_cast<__m128i*>(codes + c);
    _mm_storeu_si128(some, _mm_shuffle_epi8(numbers, _mm_loadu_si128(some)));
  }
#endif
  for (; c < count; ++c) codes[c] = static_cast<uint8_t>(table[codes[c]]);
}

void add(uint8_t first, uint8_t* codes, int64_t count) {
  for (int64_t c = 0; c < count; ++c) codes[c] = static_cast<uint8_t>(codes[c] + first);
}

// float8_e4m3fn to floats; a NaN becomes a number.
void floats_of_e4m3(const uint8_t* RQ_RESTRICT codes, float* RQ_RESTRICT floats, int64_t count) {
  for (int64_t c = 0; c < count; ++c) {
    const int32_t magnitude = codes[c] & 0x7f, bits = (magnitude << 20) + (120 << 23);
    float normal;
    std::memcpy(&normal, &bits, 4);
    const float value = magnitude < 8 ? static_cast<float>(magnitude) * 0x1p-9f : normal;
    floats[c] = codes[c] & 0x80 ? -value : value;
  }
}

bool has_nan_e4m3(const uint8_t* codes, int64_t count) {
  uint8_t nan = 0;
  for (int64_t c = 0; c < count; ++c) nan |= (codes[c] & 0x7f) == 0x7f;
  return nan;
}

void floats_of_numbers(const int8_t* RQ_RESTRICT numbers, float* RQ_RESTRICT floats, int64_t count) {
  for (int64_t c = 0; c < count; ++c) floats[c] = static_cast<float>(numbers[c]);
}

// The float in `table [size]` for each of `indices`.
void choose(const float* table, [[maybe_unused]] int64_t size, const int32_t* indices, float* chosen, int64_t count) {
  int64_t c = 0;
#if defined(__AVX2__)
  // A look-up in a vector is one instruction: a few of them are faster than loading one float after the other.
  constexpr int64_t kLanes = 8, kLargest = 8 * kLanes;
  float vectors[kLargest] = {};
  if (size <= kLargest) std::memcpy(vectors, table, size * sizeof(float));
  for (; size <= kLargest && c + kLanes <= count; c += kLanes) {
    const __m256i index = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(indices + c)), vector = _mm256_srli_epi32(index, 3);
    __m256 found = _mm256_setzero_ps();
    for (int64_t i = 0; kLanes * i < size; ++i) {
      const __m256i here = _mm256_cmpeq_epi32(vector, _mm256_set1_epi32(static_cast<int32_t>(i)));
      const __m256 some = _mm256_permutevar8x32_ps(_mm256_loadu_ps(vectors + kLanes * i), index);  // by its lowest 3 bits
      found = _mm256_blendv_ps(found, some, _mm256_castsi256_ps(here));
    }
    _mm256_storeu_ps(chosen + c, found);
  }
#endif
  for (; c < count; ++c) chosen[c] = table[indices[c]];
}

class Matrix {
 public:
  explicit Matrix(const Codes& codes) : codes_(codes), gathers_(codes.column_step != 1) {}

  Decoded decode() {
    const int64_t end = codes_.first + codes_.rows, last = (end - 1) / codes_.rows_in_word + 1, step = gathers_ ? kWordRows : 1;
    Decoded worst = kDone;
    for (int64_t start = codes_.first / codes_.rows_in_word; start < last; start += step)
      for (int64_t column = 0; column < codes_.columns; column += kColumns) {
        const int64_t count = std::min(kColumns, codes_.columns - column), stop = std::min(start + step, last);
        if (gathers_) gather(start, stop, column, count);
        for (int64_t word_row = start; word_row < stop; ++word_row) {
          const int64_t before = word_row * codes_.rows_in_word, after = before + codes_.rows_in_word;
          const uint8_t* words = gathers_ ? reinterpret_cast<uint8_t*>(gathered_[word_row - start]) : word(word_row, column);
          for (int64_t row = std::max(codes_.first, before); row < std::min(end, after); ++row)
            worst = std::max(worst, piece(words, row - before, row - codes_.first, column, count));
        }
      }
    return worst;
  }

 private:
  const uint8_t* word(int64_t word_row, int64_t column) const {
    return codes_.words + codes_.word_bytes * (word_row * codes_.row_step + column / codes_.columns_in_word * codes_.column_step);
  }

  void gather(int64_t start, int64_t stop, int64_t column, int64_t count) {
    for (int64_t c = 0, place = 0; c < count; c += codes_.columns_in_word, ++place) {
      const uint8_t* from = word(start, column + c);
      for (int64_t row = 0; row < stop - start; ++row) std::memcpy(&gathered_[row][place], from + 4 * row, 4);
    }
  }

  Decoded piece(const uint8_t* words, int64_t row_in_word, int64_t row, int64_t column, int64_t count) {
    float* to = codes_.values + row * codes_.columns + column;
    if (!codes_.numbers) {
      floats_of_e4m3(words, to, count);
      scale(to, row, column, count);
      return has_nan_e4m3(words, count) ? kNotFinite : kDone;
    }
    unpack(words, row_in_word, count);
    const int8_t* numbers = reinterpret_cast<const int8_t*>(numbers_);
    if (!codes_.values) return subtract(numbers, row, column, count);
    floats_of_numbers(numbers, to, count);
    scale(to, row, column, count);
    return kDone;
  }

  void unpack(const uint8_t* words, int64_t row_in_word, int64_t count) {
    const int bits = static_cast<int>(codes_.bits);
    if (codes_.rows_in_word > 1) {
      const int shift = codes_.shifts[row_in_word];
      (codes_.word_bytes == 1 ? unpack_shifted<uint8_t> : unpack_shifted<uint32_t>)(words, numbers_, count, shift, bits);
    } else if (bits == 4) {
      unpack_pairs(words, numbers_, count);
    } else {
      std::memcpy(numbers_, words, count);
    }
    if (bits == 4) look_up(codes_.numbers, numbers_, count);
    else add(static_cast<uint8_t>(codes_.numbers[0]), numbers_, count);
  }

  // Copies the value of each column's group to the column.
  void spread(const float* RQ_RESTRICT of_group, float* RQ_RESTRICT of_column, int64_t column, int64_t count) {
    if (codes_.order) return choose(of_group, codes_.groups, codes_.order + column, of_column, count);
    int64_t group = column / codes_.width, end = (group + 1) * codes_.width - column;
    for (int64_t c = 0; c < count; c = end, end += codes_.width, ++group)
      for (; c < std::min(end, count); c += kRun)  // may write beyond the end, where the next group is written afterwards
        for (int64_t i = 0; i < kRun; ++i) of_column[c + i] = of_group[group];
  }

  void scale(float* RQ_RESTRICT values, int64_t row, int64_t column, int64_t count) {
    const float* of_group = codes_.scales + row * codes_.groups;
    const float* zero_of_group = codes_.zeros ? codes_.zeros + row * codes_.groups : nullptr;
    spread(of_group, scales_, column, count);
    const float* RQ_RESTRICT scales = scales_;
    if (!zero_of_group) {
      for (int64_t c = 0; c < count; ++c) values[c] *= scales[c];
      return;
    }
    spread(zero_of_group, zeros_, column, count);
    const float* RQ_RESTRICT zeros = zeros_;
    for (int64_t c = 0; c < count; ++c) values[c] = (values[c] - zeros[c]) * scales[c];
  }

  Decoded subtract(const int8_t* numbers, int64_t row, int64_t column, int64_t count) {
    int8_t* RQ_RESTRICT to = codes_.differences + row * codes_.columns + column;
    if (!codes_.zeros) {
      std::memcpy(to, numbers, count);
      return kDone;
    }
    spread(codes_.zeros + row * codes_.groups, zeros_, column, count);
    const float* RQ_RESTRICT zeros = zeros_;
    int least = 0, greatest = 0;
    for (int64_t c = 0; c < count; ++c) {
      const int difference = numbers[c] - static_cast<int>(zeros[c]);
      least = std::min(least, difference);
      greatest = std::max(greatest, difference);
      to[c] = static_cast<int8_t>(difference);
    }
    return least >= -128 && greatest <= 127 ? kDone : kOutOfRange;
  }

  const Codes& codes_;
  const bool gathers_;
  uint8_t numbers_[kColumns];  // int8, first written as codes
  float scales_[kColumns + kRun], zeros_[kColumns + kRun];
  uint32_t gathered_[kWordRows][kStride];
};

}  // namespace

Decoded RQ_DECODE(const Codes& codes) { return Matrix(codes).decode(); }
