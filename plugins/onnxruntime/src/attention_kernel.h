// The vector code of attention: products of queries and keys, the exponentials of a softmax, and weighted sums of values. Included
// by kernels_body.h.

// The products of a query and kLanes keys, one in each lane. key(j) is the address of the j-th one.
template <typename Key>
inline Floats dots(const float* query, Key key, int64_t columns) {
  Floats sums[kLanes];
  for (int j = 0; j < kLanes; ++j) sums[j] = set(0.0f);
  int64_t c = 0;
  for (; c + kLanes <= columns; c += kLanes) {
    const Floats q = load(query + c);
    for (int j = 0; j < kLanes; ++j) sums[j] = multiply_add(q, load(key(j) + c), sums[j]);
  }
  Floats sum = sum_each(sums);
  for (; c < columns; ++c) {
    float numbers[kLanes];
    for (int j = 0; j < kLanes; ++j) numbers[j] = key(j)[c];
    sum = multiply_add(set(query[c]), load(numbers), sum);
  }
  return sum;
}

void dot_keys(const float* queries, int64_t rows, const float* keys, int64_t count, int64_t columns, float* scores,
              int64_t stride) {
  for (int64_t k = 0; k < count; k += kLanes) {
    const float* tile = keys + k * columns;
    const int64_t left = count - k;
    if (left >= kLanes) {
      for (int64_t r = 0; r < rows; ++r) {
        store(scores + r * stride + k, dots(queries + r * columns, [=](int64_t j) { return tile + j * columns; }, columns));
      }
    } else {  // the last key again in place of those that do not exist
      const float* key[kLanes];
      for (int64_t j = 0; j < kLanes; ++j) key[j] = tile + (j < left ? j : left - 1) * columns;
      for (int64_t r = 0; r < rows; ++r) {
        store(scores + r * stride + k, dots(queries + r * columns, [&](int64_t j) { return key[j]; }, columns));
      }
    }
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
      const float x = scores[j] - base[j], power = exponential(x);
      scores[j] = x < -87.0f ? 0.0f : power;  // -infinity stands for what is masked
      total[j] += scores[j];
    }
  }
  memcpy(sums, total, sizeof total);
}

constexpr int kSums = kFloatRows * static_cast<int>(kVectors) * float_panels(kFloatRows, false);  // that fit into registers
// Vectors of each of R rows' sums.
constexpr int strip_of(int R) { return kSums / R >= 8 ? 8 : kSums / R >= 4 ? 4 : kSums / R >= 2 ? 2 : 1; }
constexpr int64_t kKeysAtOnce = 32;  // whose values stay in the first cache while one strip after the other is read

struct Weighted {
  const float* weights;
  int64_t row_stride, key_stride;
  const float* values;
  int64_t count, columns;
};

// R rows times P vectors of columns.
template <int R, int P>
RQ_OWN_REGISTERS void weigh_strip(const Weighted& w, const float* factors, float* out) {
  Floats sums[R][P];
  for (int r = 0; r < R; ++r) {
    for (int p = 0; p < P; ++p) sums[r][p] = multiply(set(factors[r]), load(out + r * w.columns + p * kLanes));
  }
  const float *weights = w.weights, *value = w.values;
  for (int64_t k = 0; k < w.count; ++k, weights += w.key_stride, value += w.columns) {
    Floats numbers[P];
    for (int p = 0; p < P; ++p) numbers[p] = load(value + p * kLanes);
    for (int r = 0; r < R; ++r) {
      const Floats weight = set(weights[r * w.row_stride]);
      for (int p = 0; p < P; ++p) sums[r][p] = multiply_add(weight, numbers[p], sums[r][p]);
    }
  }
  for (int r = 0; r < R; ++r) {
    for (int p = 0; p < P; ++p) store(out + r * w.columns + p * kLanes, sums[r][p]);
  }
}

// The columns from `done` on, in strips of P vectors and then of half as many.
template <int R, int P>
inline void weigh_strips(Weighted w, int64_t done, const float* factors, float* out) {
  for (; done + P * kLanes <= w.columns; done += P * kLanes) {
    Weighted strip = w;
    strip.values += done;
    weigh_strip<R, P>(strip, factors, out + done);
  }
  if constexpr (P > 1) return weigh_strips<R, P / 2>(w, done, factors, out);
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
      const Weighted part{weights + row * row_stride + k * key_stride, row_stride, key_stride, values + k * columns, left, columns};
      weigh_strips<R, strip_of(R)>(part, 0, k ? ones : factors + row, out + row * columns);
    });
  }
}
