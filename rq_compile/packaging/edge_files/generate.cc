// Continue token ids with the engine in this folder, given first: ./generate FOLDER TOKENS ID ID ...
//
// It prints up to TOKENS greedy tokens, one a line, and needs ONNX Runtime's headers and library alone:
//
//   g++ -std=c++17 -O2 generate.cc -I ONNXRUNTIME/include -L ONNXRUNTIME/lib -lonnxruntime -o generate
#include <onnxruntime_cxx_api.h>

#include <algorithm>
#include <cstdint>
#include <exception>
#include <functional>
#include <iostream>
#include <numeric>
#include <set>
#include <string>
#include <utility>
#include <vector>

namespace {

const std::string kEngine = "$engine";
const std::string kOpLibrary = "$op_library";  // empty: the engine needs none
const bool kLimitFolding = $limit_folding;
const std::set<int64_t> kEndOfText = {$end_of_text};
// A sequence that first grows beyond so many tokens is computed anew; -1: none is.
const int64_t kRecomputedBeyond = $recomputed_beyond;
const size_t kPrefillChunk = $prefill_chunk;  // tokens of the prompt that run at once; 0: all of them
const std::string kPast = "past_key_values", kPresent = "present";
// Tensors of the cache that may have room for further tokens: a step writes the new ones into them.
const std::set<std::string> kInPlace = {$in_place};
const size_t kLeastRoom = 256;  // tokens for which these have room at first

Ort::Session load(Ort::Env& environment, const std::string& folder) {
  Ort::SessionOptions options;
  // Else constant folding would keep fp32 copies of the 16-bit weights.
  if (kLimitFolding) options.AddConfigEntry("optimization.constant_folding_max_output_size_in_bytes", "65536");
  if (!kOpLibrary.empty()) options.RegisterCustomOpsLibrary((folder + "/" + kOpLibrary).c_str());
  return Ort::Session(environment, (folder + "/" + kEngine).c_str(), options);
}

Ort::Value integers(std::vector<int64_t>& values) {
  const std::vector<int64_t> shape = {1, static_cast<int64_t>(values.size())};
  return Ort::Value::CreateTensor<int64_t>(Ort::MemoryInfo::CreateCpu(OrtArenaAllocator, OrtMemTypeDefault), values.data(),
                                           values.size(), shape.data(), shape.size());
}

// What input `index` of the cache is before any token: keys and values of no token, or a state of zeros.
Ort::Value no_past(Ort::Session& session, size_t index) {
  std::vector<int64_t> shape = session.GetInputTypeInfo(index).GetTensorTypeAndShapeInfo().GetShape();
  shape[0] = 1;
  for (int64_t& size : shape) size = std::max<int64_t>(size, 0);  // a free one is -1
  Ort::AllocatorWithDefaultOptions allocator;
  Ort::Value value = Ort::Value::CreateTensor<float>(allocator, shape.data(), shape.size());
  std::fill_n(value.GetTensorMutableData<float>(), value.GetTensorTypeAndShapeInfo().GetElementCount(), 0.0f);
  return value;
}

// A copy of `cache`, which holds `tokens` tokens on its free axis after the first, with room for `room`.
Ort::Value with_room(Ort::Session& session, size_t index, const Ort::Value& cache, int64_t tokens, int64_t room) {
  const std::vector<int64_t> free = session.GetInputTypeInfo(index).GetTensorTypeAndShapeInfo().GetShape();
  std::vector<int64_t> shape = cache.GetTensorTypeAndShapeInfo().GetShape();
  const auto axis = std::find(free.begin() + 1, free.end(), -1) - free.begin();
  const auto product = [&](size_t first, size_t last) {
    return std::accumulate(shape.begin() + first, shape.begin() + last, int64_t{1}, std::multiplies<int64_t>());
  };
  const int64_t heads = product(0, axis), token = product(axis + 1, shape.size()), before = shape[axis];
  shape[axis] = room;
  Ort::AllocatorWithDefaultOptions allocator;
  Ort::Value value = Ort::Value::CreateTensor<float>(allocator, shape.data(), shape.size());
  for (int64_t head = 0; head < heads; ++head)
    std::copy_n(cache.GetTensorData<float>() + head * before * token, tokens * token,
                value.GetTensorMutableData<float>() + head * room * token);
  return value;
}

// Another tensor in the same memory.
Ort::Value view(Ort::Value& tensor) {
  const auto about = tensor.GetTensorTypeAndShapeInfo();
  const std::vector<int64_t> shape = about.GetShape();
  return Ort::Value::CreateTensor<float>(Ort::MemoryInfo::CreateCpu(OrtArenaAllocator, OrtMemTypeDefault),
                                         tensor.GetTensorMutableData<float>(), about.GetElementCount(), shape.data(),
                                         shape.size());
}

int64_t likeliest(const Ort::Value& logits) {  // of the last position of [1, positions, vocabulary]
  const std::vector<int64_t> shape = logits.GetTensorTypeAndShapeInfo().GetShape();
  const float* last = logits.GetTensorData<float>() + (shape[1] - 1) * shape[2];
  return std::max_element(last, last + shape[2]) - last;
}

void generate(Ort::Session& session, std::vector<int64_t> prompt, int64_t tokens) {
  Ort::AllocatorWithDefaultOptions allocator;
  std::vector<std::string> inputs, outputs = {"logits"};
  std::vector<Ort::Value> past;
  std::vector<size_t> past_inputs;
  std::vector<bool> in_place;
  for (size_t i = 0; i < session.GetInputCount(); ++i) {
    inputs.emplace_back(session.GetInputNameAllocated(i, allocator).get());
    if (inputs.back().rfind(kPast, 0) != 0) continue;
    outputs.push_back(kPresent + inputs.back().substr(kPast.size()));
    past.push_back(no_past(session, i));
    past_inputs.push_back(i);
    in_place.push_back(kInPlace.count(inputs.back()) != 0);
  }
  std::vector<const char*> input_names, output_names;
  for (const std::string& name : inputs) input_names.push_back(name.c_str());
  for (const std::string& name : outputs) output_names.push_back(name.c_str());

  std::vector<int64_t> sequence = std::move(prompt), ids, mask, positions;
  size_t start = 0;  // tokens of the sequence that are in the cache
  size_t room = 0;   // tokens for which a tensor that grows in place has room
  while (tokens > 0) {
    const size_t end = kPrefillChunk == 0 ? sequence.size() : std::min(sequence.size(), start + kPrefillChunk);
    ids.assign(sequence.begin() + start, sequence.begin() + end);
    positions.resize(ids.size());
    std::iota(positions.begin(), positions.end(), static_cast<int64_t>(start));
    mask.assign(end, 1);

    if (end > room) {
      room = std::max(2 * end, kLeastRoom);
      for (size_t i = 0; i < past.size(); ++i)
        if (in_place[i]) past[i] = with_room(session, past_inputs[i], past[i], start, room);
    }

    std::vector<Ort::Value> values, results;
    results.emplace_back(nullptr);  // ONNX Runtime allocates what is not given
    for (size_t i = 0; i < past.size(); ++i) results.push_back(in_place[i] ? view(past[i]) : Ort::Value(nullptr));
    size_t cached = 0;
    for (const std::string& name : inputs) {
      if (name == "input_ids") values.push_back(integers(ids));
      else if (name == "attention_mask") values.push_back(integers(mask));
      else if (name == "position_ids") values.push_back(integers(positions));
      else {
        values.push_back(in_place[cached] ? view(past[cached]) : std::move(past[cached]));
        ++cached;
      }
    }
    session.Run(Ort::RunOptions{}, input_names.data(), values.data(), values.size(), output_names.data(), results.data(),
                results.size());
    for (size_t i = 0; i < past.size(); ++i)
      if (!in_place[i]) past[i] = std::move(results[i + 1]);
    start = end;
    if (start < sequence.size()) continue;  // pieces of the prompt are left

    const int64_t token = likeliest(results[0]);
    if (kEndOfText.count(token) != 0) return;
    std::cout << token << std::endl;
    sequence.push_back(token);
    --tokens;
    if (static_cast<int64_t>(start) == kRecomputedBeyond) {
      start = 0;
      for (size_t i = 0; i < past.size(); ++i)
        if (!in_place[i]) past[i] = no_past(session, past_inputs[i]);
    }
  }
}

}  // namespace

int main(int count, char** arguments) {
  if (count < 4) {
    std::cerr << "usage: generate FOLDER TOKENS ID [ID ...]\n";
    return 2;
  }
  try {
    Ort::Env environment(ORT_LOGGING_LEVEL_ERROR, "generate");
    Ort::Session session = load(environment, arguments[1]);
    std::vector<int64_t> ids;
    for (int i = 3; i < count; ++i) ids.push_back(std::stoll(arguments[i]));
    generate(session, ids, std::stoll(arguments[2]));
  } catch (const std::exception& error) {
    std::cerr << "error: " << error.what() << "\n";
    return 1;
  }
}
