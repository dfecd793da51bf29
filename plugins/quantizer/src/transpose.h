// Square matrices in vectors, whose rows become columns.
#pragma once

#include <utility>

// The lower (upper) halves of a and b, in which elements of a and b alternate.
template <typename Vector, int... I>
inline Vector alternate(Vector a, Vector b, bool upper, std::integer_sequence<int, I...>) {
  constexpr int kLanes = sizeof...(I);
  return upper ? __builtin_shufflevector(a, b, (I % 2 * kLanes + kLanes / 2 + I / 2)...)
               : __builtin_shufflevector(a, b, (I % 2 * kLanes + I / 2)...);
}

template <int kLanes, typename Vector>
inline void transpose(Vector (&rows)[kLanes]) {
  constexpr auto kAll = std::make_integer_sequence<int, kLanes>();
  for (int step = 1; step < kLanes; step *= 2) {
    Vector next[kLanes];
    for (int i = 0; i < kLanes / 2; ++i) {
      next[2 * i] = alternate(rows[i], rows[i + kLanes / 2], false, kAll);
      next[2 * i + 1] = alternate(rows[i], rows[i + kLanes / 2], true, kAll);
    }
    for (int i = 0; i < kLanes; ++i) rows[i] = next[i];
  }
}
