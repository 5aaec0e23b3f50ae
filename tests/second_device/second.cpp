// A second device for torch on a machine that has none: see README.md beside this file.
#include "operators.h"

#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/variable.h>
#include <torch/csrc/utils/pybind.h>

#include <pybind11/stl.h>

namespace second {

struct Hooks final : public at::PrivateUse1HooksInterface {
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  void init() const override {}
  c10::DeviceIndex deviceCount() const override { return 1; }
  void setCurrentDevice(c10::DeviceIndex) const override {}
  c10::DeviceIndex getCurrentDevice() const override { return 0; }
  c10::DeviceIndex exchangeDevice(c10::DeviceIndex) const override { return 0; }
  c10::DeviceIndex maybeExchangeDevice(c10::DeviceIndex) const override { return 0; }
  const at::Generator& getDefaultGenerator(c10::DeviceIndex) const override { return Generator::standard(); }
  at::Generator getNewGenerator(c10::DeviceIndex) const override {
    return at::make_generator<Generator>(at::detail::createCPUGenerator());
  }
  at::Allocator* getPinnedMemoryAllocator() const override { return &Pinned::all(); }
  bool isPinnedPtr(const void* data) const override { return Pinned::all().holds(data); }
};

// `tensor.data = other` across devices, which torch allows between the CPU and CUDA and for no private device: the same
// tensor, with all who hold it, on other memory. What autograd knew of its device goes.
void set_data(const Tensor& tensor, const Tensor& other) {
  if (auto* known = torch::autograd::impl::get_autograd_meta(tensor)) {
    std::lock_guard<std::mutex> guard(known->mutex_);
    if (auto accumulator = known->grad_accumulator_.lock())
      if (accumulator->input_metadata(0).device() != other.device()) known->grad_accumulator_.reset();
  }
  tensor.unsafeGetTensorImpl()->shallow_copy_from(other.getIntrusivePtr());
}

C10_REGISTER_GUARD_IMPL(PrivateUse1, DeviceGuard);

}  // namespace second

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  using namespace second;
  static Hooks hooks;
  at::RegisterPrivateUse1HooksInterface(&hooks);
  c10::SetAllocator(kSecond, &Memory::all());
  m.def("default_generator", [] { return Generator::standard(); });
  m.def("set_data", &set_data);
  m.def("set_limit", [](size_t bytes) {
    Guarded guard(lock());
    Memory::all().limit = bytes;
  });
  m.def("limit", [] { return Memory::all().limit; });
  m.def("pinned", [] { return Pinned::all().held(); });
  m.def("pin", [](uintptr_t data, size_t bytes) { Pinned::all().enlist(reinterpret_cast<void*>(data), bytes); });
  m.def("unpin", [](uintptr_t data) { return Pinned::all().dismiss(reinterpret_cast<void*>(data)); });
  m.def("counts", [] {
    Guarded guard(lock());
    const auto& all = counts();
    return std::map<std::string, int64_t>{
        {"waits", all.waits}, {"to_host", all.to_host}, {"to_device", all.to_device}, {"late", all.late}};
  });
  m.def("reset_counts", [] {
    Guarded guard(lock());
    counts() = {};
  });
}
