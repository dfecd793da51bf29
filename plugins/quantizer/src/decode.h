// Matrices that other quantizers wrote: codes of 4 or 8 bits, packed into words, with scales and zero points.
#pragma once

#include <cstdint>

// A word has `word_bytes` (1 or 4) and holds the codes of `rows_in_word` rows or of `columns_in_word` columns, one of which is 1.
// Codes of columns follow each other from the lowest bits on; that of row r of a word is `shifts[r]` bits up. The word of a row and
// a column is number `row / rows_in_word * row_step + column / columns_in_word * column_step`. Where column_step is not 1, row_step
// is, and words have 4 bytes.
struct Codes {
  const uint8_t* words;
  int64_t word_count, word_bytes, rows_in_word, columns_in_word, row_step, column_step, bits;
  const int32_t* shifts;  // [rows_in_word]
  // Of 4 bits, [16]: the number that each code stands for. Of 8 bits, [1]: that of code 0, which the others follow, modulo 256; null:
  // they are float8_e4m3fn.
  const int8_t* numbers;
  int64_t first, rows, columns;  // the rows from `first` on
  int64_t width, groups;         // `width` columns follow each other in a group, or as `order` says
  const int32_t* order;          // [columns]: the group of each, or null
  const float* scales;           // [rows, groups]
  const float* zeros;            // [rows, groups]: whole numbers, or null
  // One of the two is written: (number - zero) * scale, or number - zero.
  float* values;        // [rows, columns]
  int8_t* differences;  // [rows, columns], not of float8
};

// kNotFinite: a code is NaN; kOutOfRange: a difference does not fit into int8; kOutside: there are too few words or groups.
enum Decoded { kDone = 0, kNotFinite = 1, kOutOfRange = 2, kOutside = 3 };

using Decode = Decoded (*)(const Codes& codes);

Decoded decode_plain(const Codes& codes);
#ifdef RQ_X86
Decoded decode_avx2(const Codes& codes);
Decoded decode_avx512(const Codes& codes);
#endif
