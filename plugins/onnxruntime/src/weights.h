// The weights of ExpertGemm: three groups of inputs, one for each kind of format, and which slot is where.
#pragma once

#include <atomic>

#include "kernels.h"
#include "op.h"

namespace rq {

class SlotWeights {
 public:
  // `formats[s]`: 0 float, 1 int8, 2 int4. `places[s]`: where in that group; slots may share a place. No places: one after
  // another.
  SlotWeights(std::vector<int64_t> formats, std::vector<int64_t> places);

  int64_t slots() const { return static_cast<int64_t>(formats_.size()); }

  // The first weights input of the node, and what of every group lies in one slot.
  struct Bound {
    Matrix groups[3] = {};
    size_t slot_bytes[3] = {};
    int64_t panels = 0;  // of a slot
    int64_t block = 0;   // of the quantized groups; 0: there is none
  };
  // Throws Error unless the inputs from `first` on are `panels` panels of `columns` columns for every slot.
  Bound bind(const Context& context, size_t first, int64_t panels, int64_t columns) const;

  Matrix of(const Bound& bound, int64_t slot) const;
  bool quantized(int64_t slot) const { return formats_[slot] != 0; }
  bool int4(int64_t slot) const { return formats_[slot] == 2; }

 private:
  std::vector<int64_t> formats_, places_;
  int64_t members_[3] = {};  // places of each group
  mutable std::atomic<bool> seen_{false};  // weights are marked for huge pages before they are read
};

}  // namespace rq
