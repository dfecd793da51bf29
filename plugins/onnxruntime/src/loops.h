// Loops over rows and panels, whose numbers the kernels know at compile time. Included by kernels_body.h.

// For a function whose sums fill the registers: inlined into another one, some of them would be in memory.
#define RQ_OWN_REGISTERS __attribute__((noinline))

template <int number>
struct Number {
  constexpr operator int() const { return number; }
};

// work(Number<n>) for n = min(rows, most).
template <int most, typename Work>
inline void with_rows(int64_t rows, Work work) {
  if constexpr (most > 1) {
    if (rows < most) return with_rows<most - 1>(rows, work);
  }
  work(Number<most>{});
}

// Rows in parts of at most `most`. The parts are nearly equal, because a single row takes almost as long as several. Made once
// for all blocks of columns, because it divides.
template <int most>
struct Parts {
  int64_t count, size, larger;  // parts; rows of each; how many parts have one more
  explicit Parts(int64_t rows) : count((rows + most - 1) / most), size(rows / count), larger(rows % count) {}

  // work(Number<n>, first row) for one part of n rows after the other.
  template <typename Work>
  void each(Work work) const {
    int64_t first = 0;
    for (int64_t part = 0; part < count; ++part) {
      const int64_t rows = part < larger ? size + 1 : size;
      with_rows<most>(rows, [&](auto number) { work(number, first); });
      first += rows;
    }
  }
};

// work(Number<n>, panel, distance) for n panels that are read side by side: `panel`, and further ones at that distance. `count`
// panels are divided into P stretches of equal length, each read from its first panel to its last; the rest is read one by one.
template <int P, typename Work>
inline void in_stretches(int64_t count, Work work) {
  const int64_t stretch = count / P;
  for (int64_t i = 0; i < stretch; ++i) work(Number<P>{}, i, stretch);
  for (int64_t i = P * stretch; i < count; ++i) work(Number<1>{}, i, int64_t{1});
}
