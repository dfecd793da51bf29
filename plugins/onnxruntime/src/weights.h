// The weights of ExpertGemm: the tensors of each format group, and the place of each slot in them.
#pragma once

#include <algorithm>
#include <atomic>
#include <iterator>

#include "../../format_groups.h"
#include "kernels.h"
#include "op.h"

namespace rq {

class SlotWeights {
 public:
  // `formats[s]`: an index into kFormatGroups. `places[s]`: the index of the slot's matrix in that group; slots may share a
  // matrix. If `places` is empty, the matrices are in the order of the slots.
  SlotWeights(std::vector<int64_t> formats, std::vector<int64_t> places);

  int64_t slots() const { return static_cast<int64_t>(formats_.size()); }

  // The checked inputs: for each group its first matrix and the bytes of a slot, and the bias.
  struct Bound {
    Matrix groups[kGroups] = {};
    size_t slot_bytes[kGroups] = {};
    int64_t panels = 0;  // in each slot
    int64_t block = 0;   // of the quantized groups; 0 if there are none
    Tensor bias;

    bool holds(Storage storage) const {
      return std::any_of(std::begin(groups), std::end(groups), [=](const Matrix& g) { return g.data && g.storage == storage; });
    }
  };
  // Throws Error unless the inputs from `first` on hold `panels` panels of `columns` columns for every slot, optionally with a
  // bias.
  Bound bind(const Context& context, size_t first, int64_t panels, int64_t columns) const;

  Matrix of(const Bound& bound, int64_t slot) const;
  bool takes_int8(int64_t slot) const;

 private:
  std::vector<int64_t> formats_, places_;
  int64_t members_[kGroups] = {};          // the number of matrices of each group
  mutable std::atomic<bool> seen_{false};  // weights are marked for huge pages before they are read
};

}  // namespace rq
