// The plugin library up to enqueue.
//   tensorrt_host LIBRARY              right and wrong; exits with 1 and says what differs
//   tensorrt_host LIBRARY NODES        a line for each line of the file NODES, what becomes of the node that it describes
//   tensorrt_host LIBRARY SEED COUNT   random fields and shapes
#include "tensorrt_host.h"

#include <algorithm>
#include <fstream>
#include <random>
#include <sstream>

namespace {

using namespace host;

struct Builder : IExprBuilder {};
struct Size : IDimensionExpr {};

void check_shapes_and_types(Plugin& plugin) {
  const auto count = static_cast<int32_t>(kTensors.size());
  Size tokens, hidden;
  Builder builder;
  std::vector<DimsExprs> inputs(count);
  inputs[0].nbDims = 2;
  inputs[0].d[0] = &tokens;
  inputs[0].d[1] = &hidden;
  DimsExprs out{};
  expect(plugin.build().getNbOutputs() == 1, "one output");
  expect(plugin.build().getOutputShapes(inputs.data(), count, nullptr, 0, &out, 1, builder) == 0, "output shapes");
  expect(out.nbDims == 2 && out.d[0] == &tokens && out.d[1] == &hidden, "the output has the shape of x");
  inputs[0].nbDims = 3;
  expect_refusal(plugin.build().getOutputShapes(inputs.data(), count, nullptr, 0, &out, 1, builder) != 0, "x has 3 dimensions");
  expect_refusal(plugin.build().getOutputShapes(inputs.data(), 4, nullptr, 0, &out, 1, builder) != 0, "inputs");
  for (DataType type : {DataType::kHALF, DataType::kBF16}) {
    std::vector<DataType> types(count, type);
    DataType found = DataType::kBOOL;
    expect(plugin.build().getOutputDataTypes(&found, 1, types.data(), count) == 0 && found == type,
           "the output has the type of x");
  }
}

// Each position with each type and each format: right is what kTensors says, in fp16 and bf16, linear.
void check_format_combinations(Plugin& plugin) {
  const auto count = static_cast<int32_t>(kTensors.size());
  int accepted = 0;
  for (DataType type_of_x : {DataType::kHALF, DataType::kBF16})
    for (int32_t position = 0; position <= count; ++position)
      for (int32_t type = 0; type <= static_cast<int32_t>(DataType::kE8M0); ++type)
        for (int32_t format = 0; format <= static_cast<int32_t>(TensorFormat::kDHWC); ++format) {
          auto tensors = described(kTensors, 8);
          tensors.push_back(tensors[0]);
          for (auto& tensor : tensors)
            if (tensor.desc.type == kX) tensor.desc.type = type_of_x;
          const bool of_x = tensors[position].desc.type == type_of_x;
          const auto given = static_cast<DataType>(type);
          const bool right = format == 0 && (position == 0 ? given == DataType::kHALF || given == DataType::kBF16
                                             : of_x        ? given == type_of_x
                                                           : given == tensors[position].desc.type);
          tensors[position].desc.type = given;
          tensors[position].desc.format = static_cast<TensorFormat>(format);
          const bool found = plugin.build().supportsFormatCombination(position, tensors.data(), count, 1);
          accepted += found;
          expect(found == right, "type " + std::to_string(type) + " in format " + std::to_string(format) + " of tensor " +
                                     std::to_string(position));
        }
  expect(accepted == 2 * (count + 2), "as many combinations as tensors, and one more for x");
  auto tensors = described(kTensors, 8);
  expect_refusal(!plugin.build().supportsFormatCombination(-1, tensors.data(), count, 1), "there is no tensor -1");
  expect_refusal(!plugin.build().supportsFormatCombination(0, tensors.data(), count - 1, 1), "inputs");
}

void check_configurations(IPluginCreatorV3One& creator, Plugin& plugin) {
  expect(configure(plugin, described(kTensors, 100)) == 0, "configuration");
  std::vector<Tensor> without_bias;
  for (const Tensor& tensor : kTensors)
    if (!std::strstr(tensor.name, "bias")) without_bias.push_back(tensor);
  expect(configure(plugin, described(without_bias, 100)) == 0, "configuration without biases");
  for (size_t i = 0; i < kTensors.size(); ++i) {
    auto tensors = kTensors;
    tensors.erase(tensors.begin() + static_cast<long>(i));
    expect_refusal(configure(plugin, described(tensors, 100)) != 0, "inputs");
    const auto changed = [&](auto change) {
      auto copy = described(kTensors, 100);
      change(copy[i].desc);
      return configure(plugin, copy) != 0;
    };
    expect_refusal(changed([](auto& desc) { desc.type = DataType::kFP8; }), "type");
    expect(changed([](auto& desc) { desc.dims.nbDims = 4; }), std::string("refusal of four dimensions of ") + kTensors[i].name);
    expect(changed([](auto& desc) { desc.dims.nbDims = -1; }),
           std::string("refusal of negative dimensions of ") + kTensors[i].name);
    for (int d = kTensors[i].dims.d[0] < 0; d < kTensors[i].dims.nbDims; ++d) {
      // Any number of experts, of replicas of one, and of matrices fits, if the other inputs agree.
      if ((i == 3) || (d == 0 && std::strstr(kTensors[i].name, "float_weights"))) continue;
      for (int64_t size : {int64_t{0}, int64_t{-1}, kTensors[i].dims.d[d] + 1, int64_t{1} << 40})
        expect(changed([=](auto& desc) { desc.dims.d[d] = size; }),
               "refusal of " + std::to_string(size) + " as dimension " + std::to_string(d) + " of " + kTensors[i].name);
    }
  }
  // The kernels take multiples of 16.
  const std::vector<int32_t> floats = {0, 0};
  Plugin odd(create(creator, fields_of(floats, "relu")));
  const std::vector<Tensor> tensors = {{"", kX, dims_of({-1, 72})},
                                       {"", DataType::kINT64, dims_of({-1, 1})},
                                       {"", DataType::kFLOAT, dims_of({-1, 1})},
                                       {"", DataType::kINT32, dims_of({2, 1})},
                                       {"", DataType::kINT32, dims_of({2})},
                                       {"", DataType::kINT32, dims_of({2})},
                                       {"", kX, dims_of({2, 64, 72})},
                                       {"", DataType::kINT32, dims_of({2})},
                                       {"", kX, dims_of({2, 72, 64})}};
  expect_refusal(configure(odd, described(tensors, 9)) != 0, "multiples of 16, not 72");
}

// Hidden 384, intermediate 192, two slots of each of `formats`, each with a matrix of its own.
std::vector<Tensor> tensors_of(DataType type, const std::vector<int32_t>& formats, bool gated, int64_t block) {
  const auto slots = static_cast<int64_t>(formats.size());
  std::vector<Tensor> tensors = {{"", type, dims_of({-1, 384})},
                                 {"", DataType::kINT64, dims_of({-1, 1})},
                                 {"", DataType::kFLOAT, dims_of({-1, 1})},
                                 {"", DataType::kINT32, dims_of({slots, 1})},
                                 {"", DataType::kINT32, dims_of({slots})}};
  for (bool down : {false, true}) {
    const int64_t outputs = down ? 384 : gated ? 384 : 192, columns = down ? 192 : 384, blocks = (columns + block - 1) / block;
    tensors.push_back({"", DataType::kINT32, dims_of({slots})});
    for (int32_t format : {0, 1, 2, 5, 6}) {
      const int64_t group = std::count(formats.begin(), formats.end(), format);
      if (group == 0) continue;
      if (format == 0) tensors.push_back({"", type, dims_of({group, outputs, columns})});
      if (format == 0) continue;
      const int64_t bits[] = {0, 8, 4, 0, 0, 3, 2};
      tensors.push_back({"", DataType::kINT8, dims_of({group, outputs, blocks * block * bits[format] / 8})});
      tensors.push_back({"", DataType::kFLOAT, dims_of({group, outputs, blocks})});
    }
  }
  return tensors;
}

// The library holds every kernel, so a layer of any type, formats, activation and block is taken.
void check_every_layer(IPluginCreatorV3One& creator) {
  const std::vector<std::vector<int32_t>> mixes = {{0, 0}, {1, 1}, {2, 2}, {5, 5}, {6}, {0, 1, 2}, {1, 2}, {6, 0, 5, 1, 2}};
  for (const std::vector<int32_t>& formats : mixes)
    for (DataType type : {DataType::kHALF, DataType::kBF16})
      for (const char* activation : {"none", "swiglu", "geglu", "geglu_tanh", "clamped_swiglu", "relu", "gelu"})
        for (int64_t block : {64, 128, 192}) {
          Plugin plugin(create(creator, fields_of(formats, activation)));
          const bool gated = std::strstr(activation, "glu") != nullptr;
          const auto inputs = described(tensors_of(type, formats, gated, block), 9);
          expect(configure(plugin, inputs) == 0, std::string("a layer of ") + activation);
        }
  const std::vector<int32_t> int8 = {1, 1};
  Plugin plugin(create(creator, fields_of(int8, "relu")));
  expect_refusal(configure(plugin, described(tensors_of(kX, int8, false, 32), 9)) != 0, "multiples of 64, not 32");
}

void check_workspace(Plugin& plugin) {
  const auto bytes = [&](int64_t tokens) {
    const auto inputs = described(kTensors, tokens);
    return plugin.build().getWorkspaceSize(inputs.data(), static_cast<int32_t>(inputs.size()), inputs.data(), 1);
  };
  const size_t most = bytes(1000);
  expect(most >= 1000 * 2 * 2 * (256 + 128), "room for both products");
  expect(most < 1000 * 2 * 2 * (256 + 128) + 30000, "and little else");
  for (int64_t tokens : {0, 1, 17, 999}) expect(bytes(tokens) > 0 && bytes(tokens) <= most, "a smaller batch takes less");
  auto wrong = described(kTensors, 10);
  wrong[5].desc.dims.d[0] = 4;
  const auto refused = [&](const std::vector<DynamicPluginTensorDesc>& inputs, const std::string& about) {
    const size_t wanted = plugin.build().getWorkspaceSize(inputs.data(), static_cast<int32_t>(inputs.size()), inputs.data(), 1);
    expect_refusal(wanted > size_t{1} << 60, about);  // never 0, which means that none is needed
  };
  refused(wrong, "up_index");
  // Pairs, of which there are two a token, are counted in 32 bit. One token could run in what such a profile is refused for.
  for (int64_t tokens : {(int64_t{1} << 30) - 64, int64_t{1} << 30, int64_t{1} << 31, INT64_MAX / 2, INT64_MAX}) {
    const auto inputs = described(kTensors, tokens);
    expect_refusal(configure(plugin, inputs) != 0, "tokens");
    refused(inputs, "tokens");
  }
  for (int64_t tokens : {-1, -1000}) {
    auto inputs = described(kTensors, 9);
    inputs[0].max.d[0] = tokens;
    expect_refusal(configure(plugin, inputs) != 0, "the profile's maximum is -1");
    refused(inputs, "the profile's maximum is -1");
  }
  const auto largest = described(kTensors, (int64_t{1} << 30) - 65);
  expect(configure(plugin, largest) == 0, "the largest profile");
  expect(bytes((int64_t{1} << 30) - 65) > size_t{1} << 40, "room for the largest profile");
}

std::string text_of(const PluginFieldCollection& collection) {
  std::string text;
  for (int i = 0; i < collection.nbFields; ++i) {
    const PluginField& field = collection.fields[i];
    const size_t width = field.type == PluginFieldType::kCHAR ? 1 : 4;
    text += std::string(field.name) + ":" + std::to_string(static_cast<int>(field.type)) + ":" +
            std::string(static_cast<const char*>(field.data), width * static_cast<size_t>(field.length)) + ";";
  }
  return text;
}

void check_copies(IPluginCreatorV3One& creator) {
  const std::vector<float> shares = {0.5f, 0.2f, 0.1f, 0.1f, 0.1f};
  const float alpha = 1.5f, limit = 3.0f;
  auto fields = fields_of(kFormats, "clamped_swiglu");
  fields.emplace_back("alpha", &alpha, PluginFieldType::kFLOAT32, 1);
  fields.emplace_back("limit", &limit, PluginFieldType::kFLOAT32, 1);
  fields.emplace_back("shares", shares.data(), PluginFieldType::kFLOAT32, 5);
  auto first = std::make_unique<Plugin>(create(creator, fields));
  const std::string given = text_of({static_cast<int32_t>(fields.size()), fields.data()});
  expect(text_of(*first->runtime().getFieldsToSerialize()) == given, "what is serialized is what was given");
  const PluginFieldCollection& kept = *first->runtime().getFieldsToSerialize();
  Plugin again(creator.createPlugin("layer", &kept, TensorRTPhase::kRUNTIME));
  Plugin copy(first->held->clone());
  Plugin attached(first->runtime().attachToContext(nullptr));
  first.reset();
  for (Plugin* plugin : {&again, &copy, &attached}) {
    expect(text_of(*plugin->runtime().getFieldsToSerialize()) == given, "a copy outlives what it was made from");
    expect(std::string(plugin->core().getPluginName()) == "MoeLayer" && std::string(plugin->core().getPluginVersion()) == "1" &&
               std::string(plugin->core().getPluginNamespace()) == "rq.moe",
           "name, version and namespace");
  }
}

void check_refused_fields(IPluginCreatorV3One& creator) {
  const std::vector<int32_t> unknown_format = {0, 7};
  const float one = 1, half[] = {0.5f, -0.5f}, nan = std::strtof("nan", nullptr);
  const auto refused = [&](std::vector<PluginField> fields, const std::string& about) {
    std::unique_ptr<IPluginV3> plugin(create(creator, fields));
    expect_refusal(!plugin, about);
  };
  const auto with = [&](PluginField field) {
    auto fields = fields_of(kFormats);
    fields.push_back(field);
    return fields;
  };
  refused({}, "field formats is missing");
  refused(fields_of({}), "field formats is missing");
  refused(fields_of(unknown_format), "field formats has 7");
  refused(fields_of(kFormats, "sigmoid"), "field activation");
  refused(with({"experts", &one, PluginFieldType::kFLOAT32, 1}), "field experts is unknown");
  refused(with({"activation", "relu", PluginFieldType::kCHAR, 4}), "field activation is given twice");
  refused(with({"alpha", &one, PluginFieldType::kINT32, 1}), "field alpha has another type");
  refused(with({"alpha", &one, PluginFieldType::kFLOAT32, 0}), "field alpha has 0 values");
  refused(with({"limit", &nan, PluginFieldType::kFLOAT32, 1}), "field limit has a value that is not finite");
  refused(with({"limit", nullptr, PluginFieldType::kFLOAT32, 1}), "field limit has no data");
  refused(with({"shares", half, PluginFieldType::kFLOAT32, 2}), "field shares has 2 values for 5 slots");
  refused(with({"shares", half, PluginFieldType::kFLOAT32, -2}), "field shares has length -2");
  refused(with({nullptr, half, PluginFieldType::kFLOAT32, 2}), "no name");
  expect_refusal(!creator.createPlugin("layer", nullptr, TensorRTPhase::kBUILD), "no fields");
}

void check_run_without_a_driver(Plugin& plugin) {
  std::vector<PluginTensorDesc> inputs;
  for (auto& tensor : described(kTensors, 4)) {
    if (tensor.desc.dims.d[0] < 0) tensor.desc.dims.d[0] = 4;
    inputs.push_back(tensor.desc);
  }
  const auto count = static_cast<int32_t>(inputs.size());
  std::vector<const void*> pointers(inputs.size());
  void* out = nullptr;
  const auto enqueue = [&] {
    return plugin.runtime().enqueue(inputs.data(), inputs.data(), pointers.data(), &out, nullptr, nullptr);
  };
  expect_refusal(enqueue() != 0, "onShapeChange comes first");
  expect_refusal(plugin.runtime().onShapeChange(inputs.data(), count, inputs.data(), 1) != 0, "CUDA");
  inputs[1].dims.d[0] = 5;
  expect_refusal(plugin.runtime().onShapeChange(inputs.data(), count, inputs.data(), 1) != 0, "different numbers of tokens");
  expect_refusal(enqueue() != 0, "onShapeChange comes first");
}

// Names, types, lengths and contents at random; then sizes at random. Only that nothing breaks is of interest.
int fuzz(IPluginCreatorV3One& creator, unsigned seed, int count) {
  std::mt19937 random(seed);
  const auto below = [&](int64_t n) { return static_cast<int64_t>(random() % static_cast<uint64_t>(n)); };
  const char* names[] = {"formats", "activation", "alpha", "limit", "shares", "", "format"};
  const char* activations[] = {"none", "swiglu", "geglu", "relu", "gelu", "swish"};
  int made = 0, configured = 0;
  for (int round = 0; round < count; ++round) {
    std::vector<std::vector<char>> data;
    std::vector<PluginField> fields;
    const auto chosen = activations[below(6)];
    auto formats = kFormats;
    for (auto& format : formats)
      if (below(9) == 0) format = static_cast<int32_t>(below(8));
    if (below(3)) fields = fields_of(formats, chosen);
    for (int64_t i = below(3); i > 0; --i) {
      const int64_t length = below(7);
      data.emplace_back(8 * length + 1);
      for (char& byte : data.back()) byte = static_cast<char>(below(4) ? below(3) : random());
      fields.emplace_back(names[below(7)], data.back().data(), static_cast<PluginFieldType>(below(16) - 1),
                          static_cast<int32_t>(length));
    }
    IPluginV3* plugin = create(creator, fields, below(2) ? TensorRTPhase::kBUILD : TensorRTPhase::kRUNTIME);
    if (!plugin) continue;
    ++made;
    Plugin held(plugin);
    auto inputs = described(kTensors, below(5000));
    for (int64_t i = below(4); i > 0; --i) {
      auto& desc = inputs[below(static_cast<int64_t>(inputs.size()))].desc;
      const int64_t sizes[] = {0, -1, 1, 16, 63, 64, 128, 256, int64_t{1} << 31, INT64_MAX, INT64_MIN};
      desc.dims.d[below(8)] = sizes[below(11)];
      if (below(4) == 0) desc.dims.nbDims = static_cast<int32_t>(below(12)) - 2;
    }
    if (below(4) == 0) inputs.resize(1 + below(static_cast<int64_t>(inputs.size())));
    if (below(9) == 0) inputs[0].max.d[0] = INT64_MAX - below(3);
    const auto given = static_cast<int32_t>(inputs.size());
    configured += configure(held, inputs) == 0;
    held.build().getWorkspaceSize(inputs.data(), given, inputs.data(), 1);
    std::vector<PluginTensorDesc> fixed;
    for (auto& input : inputs) fixed.push_back(input.desc);
    held.runtime().onShapeChange(fixed.data(), given, fixed.data(), 1);
    expect(
        text_of(*held.runtime().getFieldsToSerialize()) == text_of(*Plugin(held.held->clone()).runtime().getFieldsToSerialize()),
        "a clone");
  }
  std::printf("%d made, %d configured\n", made, configured);
  return made && configured ? 0 : 1;
}

template <typename T>
std::vector<T> numbers(std::istream& words) {
  size_t count = 0;
  words >> count;
  std::vector<T> values(count);
  for (T& value : values) words >> value;
  return values;
}

// `formats COUNT F.. activation NAME alpha A limit L shares COUNT S..`, then for each input `input TYPE RANK SIZE..`.
std::string what_becomes_of(IPluginCreatorV3One& creator, std::istream& words) {
  std::vector<int32_t> formats;
  std::vector<float> shares;
  std::string word, activation;
  float alpha = 0, limit = 0;
  std::vector<Tensor> tensors;
  while (words >> word) {
    if (word == "formats") formats = numbers<int32_t>(words);
    if (word == "shares") shares = numbers<float>(words);
    if (word == "activation") words >> activation;
    if (word == "alpha") words >> alpha;
    if (word == "limit") words >> limit;
    if (word == "input") {
      int type = 0;
      words >> type;
      Dims dims{};
      for (int64_t size : numbers<int64_t>(words)) dims.d[dims.nbDims++] = size;
      tensors.push_back({"", static_cast<DataType>(type), dims});
    }
  }
  auto fields = fields_of(formats, activation.c_str());
  fields.emplace_back("alpha", &alpha, PluginFieldType::kFLOAT32, 1);
  fields.emplace_back("limit", &limit, PluginFieldType::kFLOAT32, 1);
  if (!shares.empty())
    fields.emplace_back("shares", shares.data(), PluginFieldType::kFLOAT32, static_cast<int32_t>(shares.size()));
  Plugin plugin(create(creator, fields));
  if (!plugin.held) return "refused: " + logger.last;
  const auto inputs = described(tensors, 100);
  if (configure(plugin, inputs) != 0) return "refused: " + logger.last;
  const bool room = plugin.build().getWorkspaceSize(inputs.data(), static_cast<int32_t>(inputs.size()), inputs.data(), 1) > 0;
  return room ? "taken" : "refused: no workspace";
}

}  // namespace

int main(int count, char** arguments) {
  if (count < 2 || count > 4) return 2;
  IPluginCreatorV3One& creator = *open(arguments[1]);
  if (count == 3) {
    std::ifstream nodes(arguments[2]);
    for (std::string line; std::getline(nodes, line);) {
      std::istringstream words(line);
      std::printf("%s\n", what_becomes_of(creator, words).c_str());
    }
    return failures != 0;
  }
  if (count == 4) return fuzz(creator, static_cast<unsigned>(std::atol(arguments[2])), std::atoi(arguments[3])) || failures;
  expect(creator.getFieldNames()->nbFields == 5, "five fields");
  Plugin plugin(create(creator, fields_of(kFormats)));
  if (!plugin.held) return expect(false, "a plugin"), 1;
  check_shapes_and_types(plugin);
  check_format_combinations(plugin);
  check_configurations(creator, plugin);
  check_every_layer(creator);
  check_workspace(plugin);
  check_copies(creator);
  check_refused_fields(creator);
  check_run_without_a_driver(plugin);
  std::printf("%d failures\n", failures);
  return failures != 0;
}
