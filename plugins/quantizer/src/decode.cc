// Checks that all words and groups exist before a matrix is decoded.
#include <algorithm>

#include "processor.h"

namespace {

bool inside(const Codes& codes) {
  const int64_t word_row = (codes.first + codes.rows - 1) / codes.rows_in_word,
                word_column = (codes.columns - 1) / codes.columns_in_word;
  if (codes.first < 0 || word_row * codes.row_step + word_column * codes.column_step >= codes.word_count) return false;
  if (!codes.order) return codes.width > 0 && (codes.columns - 1) / codes.width < codes.groups;
  return std::all_of(codes.order, codes.order + codes.columns, [&](int32_t group) { return group >= 0 && group < codes.groups; });
}

}  // namespace

extern "C" __attribute__((visibility("default"))) int rq_decode(const Codes* codes) {
  if (!codes->rows || !codes->columns) return kDone;
  return inside(*codes) ? code_for_this_processor().decode(*codes) : kOutside;
}
