// The functions compiled for this processor.
#pragma once

#include "decode.h"
#include "gptq.h"

struct Code {
  const char* name;
  RoundTile round_tile;
  Decode decode;
  bool (*supported)();
};

const Code& code_for_this_processor();
