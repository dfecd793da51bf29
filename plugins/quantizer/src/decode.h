// Decodes matrices written by other quantizers: codes of 4 or 8 bits, packed into words, with scales and zero points.
#pragma once

#include <cstdint>

// A word has `word_bytes` bytes (1 or 4). It holds the codes of `rows_in_word` rows or of `columns_in_word` columns; one of these
// numbers is 1. The codes of columns start at the lowest bits; the code of row r of a word starts at bit `shifts[r]`. The index
// of the word for a row and a column is `row / rows_in_word * row_step + column / columns_in_word * column_step`. If column_step
// is not 1, row_step is 1, and words have 4 bytes.
struct Codes {
  const uint8_t* words;
  int64_t word_count, word_bytes, rows_in_word, columns_in_word, row_step, column_step, bits;
  const int32_t* shifts;  // [rows_in_word]
  // With 4 bits, [16]: the number for each code. With 8 bits, [1]: the number for code 0; the numbers for the other codes follow,
  // modulo 256. Null: the codes are float8_e4m3fn.
  const int8_t* numbers;
  int64_t first, rows, columns;  // the rows from `first` on
  int64_t width, groups;         // a group has `width` consecutive columns, or those given by `order`
  const int32_t* order;          // [columns]: the group of each column, or null
  const float* scales;           // [rows, groups]
  const float* zeros;            // [rows, groups]: integers, or null
  // One of these is written: (number - zero) * scale, or number - zero.
  float* values;        // [rows, columns]
  int8_t* differences;  // [rows, columns], not for float8
};

// kNotFinite: a code is NaN. kOutOfRange: a difference does not fit into int8. kOutside: there are too few words or groups.
enum Decoded { kDone = 0, kNotFinite = 1, kOutOfRange = 2, kOutside = 3 };

using Decode = Decoded (*)(const Codes& codes);

Decoded decode_plain(const Codes& codes);
#ifdef RQ_X86
Decoded decode_avx2(const Codes& codes);
Decoded decode_avx512(const Codes& codes);
#endif
