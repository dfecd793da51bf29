#include "attributes.h"

namespace rq {
namespace {

class Attributes {
 public:
  explicit Attributes(const Info& info) : api_(info.api()), info_(info.raw()) {}

  // Each leaves `value` unchanged if the node does not have the attribute.
  void read(const char* name, float& value) const {
    if (!succeeded(api_.KernelInfoGetAttribute_float(info_, name, &value))) refuse_other_type(name, "float");
  }
  void read(const char* name, std::string& value) const {
    size_t size = 0;
    if (!succeeded(text(name, nullptr, &size))) return refuse_other_type(name, "string");
    value.assign(size, '\0');
    check(api_, text(name, value.data(), &size));
    value.resize(size ? size - 1 : 0);  // the size counts the terminating zero
  }
  void read(const char* name, std::vector<int64_t>& value) const {
    size_t size = 0;
    if (!succeeded(integers(name, nullptr, &size)) || size == 0) return refuse_other_type(name, "list of integers");
    value.resize(size);
    check(api_, integers(name, value.data(), &size));
  }
  void read(const char* name, std::vector<float>& value) const {
    size_t size = 0;
    if (!succeeded(floats(name, nullptr, &size)) || size == 0) return refuse_other_type(name, "list of floats");
    value.resize(size);
    check(api_, floats(name, value.data(), &size));
  }

 private:
  OrtStatus* text(const char* name, char* out, size_t* size) const {
    return api_.KernelInfoGetAttribute_string(info_, name, out, size);
  }
  OrtStatus* integers(const char* name, int64_t* out, size_t* size) const {
    return api_.KernelInfoGetAttributeArray_int64(info_, name, out, size);
  }
  OrtStatus* floats(const char* name, float* out, size_t* size) const {
    return api_.KernelInfoGetAttributeArray_float(info_, name, out, size);
  }
  bool succeeded(OrtStatus* status) const {
    if (status) api_.ReleaseStatus(status);
    return status == nullptr;
  }
  // A getter fails on an attribute of a different type as if the attribute were missing; those for lists then find an empty list.
  void refuse_other_type(const char* name, const char* words) const {
    int64_t integer;
    float real;
    size_t size = 0;
    if (succeeded(api_.KernelInfoGetAttribute_int64(info_, name, &integer)) ||
        succeeded(api_.KernelInfoGetAttribute_float(info_, name, &real)) || succeeded(text(name, nullptr, &size)) ||
        succeeded(integers(name, nullptr, &size)) || succeeded(floats(name, nullptr, &size)))
      refuse_field(name, std::string("is not a ") + words);
  }

  const Api& api_;
  const OrtKernelInfo* info_;
};

}  // namespace

Fields read_fields(const Info& info) {
  const Attributes attributes(info);
  Fields fields;
  std::vector<int64_t> formats;
  attributes.read("formats", formats);
  for (int64_t format : formats) fields.formats.push_back(format_code(format));
  attributes.read("activation", fields.activation);
  attributes.read("alpha", fields.alpha);
  attributes.read("limit", fields.limit);
  attributes.read("shares", fields.shares);
  check_fields(fields);
  return fields;
}

}  // namespace rq
