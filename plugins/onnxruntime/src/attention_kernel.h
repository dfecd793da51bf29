// The vector code of attention: products of queries and keys, the exponentials of a softmax, and weighted sums of values. Included
// by kernels_body.h.

// In one of four places that are read from their first number to their last.
inline Floats load_ahead(const float* p) {
  prefetch<4, 1>(reinterpret_cast<const uint8_t*>(p));
  return load(p);
}

// Sums of the products of a query and kLanes keys, in rounds of four keys, `between` numbers apart. The next round is `apart`
// numbers further. If it is not inlined, the sums are kept in memory.
template <int round>
__attribute__((always_inline)) inline void add_keys(const float* query, const float* keys, int64_t between, int64_t apart,
                                                    int64_t columns, Floats (&sums)[kLanes]) {
  constexpr int kRounds = static_cast<int>(kLanes) / 4;
  const float *a = keys, *b = keys + between, *c = keys + 2 * between, *d = keys + 3 * between;
  Floats of_a = set(0.0f), of_b = of_a, of_c = of_a, of_d = of_a;
  for (int64_t i = 0; i + kLanes <= columns; i += kLanes) {
    const Floats q = load(query + i);
    of_a = multiply_add(q, load_ahead(a + i), of_a);
    of_b = multiply_add(q, load_ahead(b + i), of_b);
    of_c = multiply_add(q, load_ahead(c + i), of_c);
    of_d = multiply_add(q, load_ahead(d + i), of_d);
  }
  sums[round] = of_a, sums[kRounds + round] = of_b, sums[2 * kRounds + round] = of_c, sums[3 * kRounds + round] = of_d;
  if constexpr (round + 1 < kRounds) add_keys<round + 1>(query, keys + apart, between, apart, columns, sums);
}

// Lane f * kLanes / 4 + i: the product of the query and the key at keys + f * between + i * apart; of the columns that are whole
// vectors.
RQ_OWN_REGISTERS Floats dots(const float* query, const float* keys, int64_t between, int64_t apart, int64_t columns) {
  Floats sums[kLanes];
  add_keys<0>(query, keys, between, apart, columns, sums);
  return sum_each(sums);
}

// Adds the products of the remaining columns.
RQ_OWN_REGISTERS void add_rest(const float* query, const float* key, int64_t columns, float* score) {
  for (int64_t c = columns / kLanes * kLanes; c < columns; ++c) *score += query[c] * key[c];
}

// Four stretches of keys are read side by side, each from its first number to its last, because a core keeps more memory reads in
// flight in several places than in one. The last keys are read together with some that were read before, or one by one.
void dot_keys(const float* queries, int64_t rows, const float* keys, int64_t count, int64_t columns, float* scores,
              int64_t stride) {
  constexpr int64_t kOfEach = kLanes / 4;
  const int64_t stretch = count / kLanes * kOfEach;
  const auto several = [&](int64_t k, int64_t between) {
    for (int64_t r = 0; r < rows; ++r) {
      float sums[kLanes];
      store(sums, dots(queries + r * columns, keys + k * columns, between * columns, columns, columns));
      float* out = scores + r * stride + k;
      for (int64_t f = 0; f < 4; ++f) memcpy(out + f * between, sums + f * kOfEach, kOfEach * sizeof(float));
    }
  };
  for (int64_t k = 0; k < stretch; k += kOfEach) several(k, stretch);
  if (stretch > 0 && 4 * stretch < count) several(count - kLanes, kOfEach);
  for (int64_t k = 0; k < count && stretch == 0; ++k) {
    for (int64_t r = 0; r < rows; ++r) {
      float sums[kLanes];
      store(sums, dots(queries + r * columns, keys + k * columns, 0, 0, columns));
      scores[r * stride + k] = sums[0];
    }
  }
  if (columns % kLanes == 0) return;
  for (int64_t k = 0; k < count; ++k) {
    for (int64_t r = 0; r < rows; ++r) add_rest(queries + r * columns, keys + k * columns, columns, scores + r * stride + k);
  }
}

// Plain C++, which the compiler vectorizes; all instruction sets round in the same way.
void raise(const float* scores, int64_t count, float* largest) {
  float most[kPanel];
  memcpy(most, largest, sizeof most);
  for (int64_t i = 0; i < count; ++i, scores += kPanel) {
    for (int64_t j = 0; j < kPanel; ++j) most[j] = scores[j] > most[j] ? scores[j] : most[j];
  }
  memcpy(largest, most, sizeof most);
}

void exponentials(float* scores, int64_t count, const float* largest, float* sums) {
  float base[kPanel], total[kPanel];
  for (int64_t j = 0; j < kPanel; ++j) {
    base[j] = largest[j] == -__builtin_inff() ? 0.0f : largest[j];
    total[j] = 0.0f;
  }
  for (int64_t i = 0; i < count; ++i, scores += kPanel) {
    for (int64_t j = 0; j < kPanel; ++j) {
      const float x = scores[j] - base[j], power = exponential_within(x);
      scores[j] = x < -87.0f ? 0.0f : power;  // -infinity stands for what is masked
      total[j] += scores[j];
    }
  }
  memcpy(sums, total, sizeof total);
}

// The weighted sums of values: some rows of weights times a strip of columns at a time, for a few keys, whose values stay in the
// first cache from strip to strip.
constexpr int kSums = kFloatRows * static_cast<int>(kVectors) * float_panels(kFloatRows, false);  // that fit into registers
// Vectors of each of R rows' sums.
constexpr int strip_of(int R) { return kSums / R >= 8 ? 8 : kSums / R >= 4 ? 4 : kSums / R >= 2 ? 2 : 1; }
constexpr int64_t kKeysAtOnce = 32;

struct Weighted {
  const float* weights;
  int64_t row_stride, key_stride;  // of a panel: 1 and kPanel
  const float *values, *next;  // next: what will be read after them, prefetched as fast as they are read
  int64_t count, columns;
};

// R rows times P vectors of columns.
template <bool panel, int R, int P>
RQ_OWN_REGISTERS void weigh_strip(const Weighted& w, const float* factors, float* out) {
  Floats sums[R][P];
  for (int r = 0; r < R; ++r) {
    for (int p = 0; p < P; ++p) sums[r][p] = multiply(set(factors[r]), load(out + r * w.columns + p * kLanes));
  }
  const float *weights = w.weights, *value = w.values, *next = w.next;
  const int64_t row_stride = panel ? 1 : w.row_stride, key_stride = panel ? kPanel : w.key_stride;
  for (int64_t k = 0; k < w.count; ++k, weights += key_stride, value += w.columns) {
    Floats numbers[P];
    for (int p = 0; p < P; ++p) numbers[p] = load(value + p * kLanes);
    for (int p = 0; p < P; ++p) {
      if (R == 1) prefetch<4, 1>(reinterpret_cast<const uint8_t*>(value + p * kLanes));
      else __builtin_prefetch(next + p * kLanes, 0, 2);
    }
    next += P * kLanes;
    for (int r = 0; r < R; ++r) {
      const Floats weight = set(weights[r * row_stride]);
      for (int p = 0; p < P; ++p) sums[r][p] = multiply_add(weight, numbers[p], sums[r][p]);
    }
  }
  for (int r = 0; r < R; ++r) {
    for (int p = 0; p < P; ++p) store(out + r * w.columns + p * kLanes, sums[r][p]);
  }
}

// The columns from `done` on, in strips of P vectors and then of half as many.
template <bool panel, int R, int P>
inline void weigh_strips(Weighted w, int64_t done, const float* factors, float* out) {
  for (; done + P * kLanes <= w.columns; done += P * kLanes) {
    Weighted strip = w;
    strip.values += done;
    strip.next += done * w.count;
    weigh_strip<panel, R, P>(strip, factors, out + done);
  }
  if constexpr (P > 1) return weigh_strips<panel, R, P / 2>(w, done, factors, out);
  for (; done < w.columns; ++done) {
    for (int r = 0; r < R; ++r) {
      float sum = factors[r] * out[r * w.columns + done];
      for (int64_t k = 0; k < w.count; ++k) {
        sum += w.weights[r * w.row_stride + k * w.key_stride] * w.values[k * w.columns + done];
      }
      out[r * w.columns + done] = sum;
    }
  }
}

void weigh_values(const float* weights, int64_t row_stride, int64_t key_stride, int64_t rows, const float* values, int64_t count,
                  int64_t columns, const float* factors, float* out) {
  float ones[kFloatRows];
  for (float& one : ones) one = 1.0f;
  const Parts<kFloatRows> parts(rows);
  for (int64_t k = 0; k < count; k += kKeysAtOnce) {
    const int64_t left = count - k < kKeysAtOnce ? count - k : kKeysAtOnce;
    parts.each([&](auto R, int64_t row) {
      const float *first = values + k * columns, *next = first + kKeysAtOnce * columns;
      const Weighted part{weights + row * row_stride + k * key_stride, row_stride, key_stride, first, next, left, columns};
      const float* scaled = k ? ones : factors + row;
      if (row_stride == 1 && key_stride == kPanel) weigh_strips<true, R, strip_of(R)>(part, 0, scaled, out + row * columns);
      else weigh_strips<false, R, strip_of(R)>(part, 0, scaled, out + row * columns);
    });
  }
}
