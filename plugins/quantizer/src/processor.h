// The functions compiled for this processor.
#pragma once

#include "decode.h"
#include "factors.h"
#include "gptq.h"
#include "product.h"

struct Code {
  const char* name;
  RoundTile round_tile;
  RoundFactors round_factors;
  PackTile pack_tile;
  MultiplyTile multiply_tile;
  Decode decode;
  bool (*supported)();
};

const Code& code_for_this_processor();
