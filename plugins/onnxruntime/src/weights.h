// The weights of ExpertGemm: the tensors of each format group, and which slot is where.
#pragma once

#include <atomic>

#include "../../format_groups.h"
#include "kernels.h"
#include "op.h"

namespace rq {

class SlotWeights {
 public:
  // `formats[s]`: a place in kFormatGroups. `places[s]`: where in that group; slots may share a place. No places: one after
  // another.
  SlotWeights(std::vector<int64_t> formats, std::vector<int64_t> places);

  int64_t slots() const { return static_cast<int64_t>(formats_.size()); }

  // What of every group lies in one slot, and the bias.
  struct Bound {
    Matrix groups[kGroups] = {};
    size_t slot_bytes[kGroups] = {};
    int64_t panels = 0;  // of a slot
    int64_t block = 0;   // of the quantized groups; 0: there is none
    Tensor bias;
  };
  // Throws Error unless the inputs from `first` on are `panels` panels of `columns` columns for every slot, and a bias or none.
  Bound bind(const Context& context, size_t first, int64_t panels, int64_t columns) const;

  Matrix of(const Bound& bound, int64_t slot) const;
  bool quantized(int64_t slot) const { return kFormatGroups[formats_[slot]].scales != nullptr; }

 private:
  std::vector<int64_t> formats_, places_;
  int64_t members_[kGroups] = {};          // places of each group
  mutable std::atomic<bool> seen_{false};  // weights are marked for huge pages before they are read
};

}  // namespace rq
