// Every operator of torch on the device: the CPU's kernel on the same memory, once the arguments are of one device.
#pragma once

#include "memory.h"

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/EmptyTensor.h>
#include <ATen/SDPBackend.h>
#include <ATen/autocast_mode.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/native/transformers/attention.h>
#include <ATen/ops/_fused_sdp_choice.h>
#include <ATen/ops/_scaled_dot_product_flash_attention_for_cpu.h>
#include <ATen/ops/_scaled_dot_product_flash_attention_for_cpu_backward.h>
#include <ATen/ops/convolution.h>
#include <ATen/ops/convolution_backward.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>
#include <c10/core/InferenceMode.h>
#include <torch/library.h>

namespace second {

using at::Tensor;

inline bool ours(const Tensor& tensor) { return tensor.defined() && tensor.device().type() == kSecond; }

inline Tensor with_storage(const Tensor& tensor, const c10::Storage& storage) {
  auto key = storage.device().is_cpu() ? c10::DispatchKey::CPU : c10::DispatchKey::PrivateUse1;
  c10::InferenceMode as_it_is(tensor.is_inference());  // a view of an inference tensor is one, in any mode
  auto made = at::detail::make_tensor<c10::TensorImpl>(
      c10::Storage(storage), c10::DispatchKeySet(key), tensor.dtype());
  made.unsafeGetTensorImpl()->set_sizes_and_strides(tensor.sizes(), tensor.strides(), tensor.storage_offset());
  if (tensor.is_conj()) made._set_conj(true);
  if (tensor.is_neg()) made._set_neg(true);
  return made;
}

// The same memory as the CPU's kernels see it.
inline c10::Storage cpu_storage(const c10::Storage& storage) {
  auto drop = [](void* held) { delete static_cast<c10::Storage*>(held); };
  c10::DataPtr memory(
      const_cast<void*>(storage.data()), new c10::Storage(storage), drop, c10::Device(c10::kCPU));
  return {c10::Storage::use_byte_size_t(), storage.nbytes(), std::move(memory), c10::GetCPUAllocator(), true};
}
inline Tensor on_cpu(const Tensor& tensor) { return with_storage(tensor, cpu_storage(tensor.storage())); }

// The device's generator: the CPU's, under a name that the CPU does not take.
struct Generator final : public c10::GeneratorImpl {
  at::Generator inner;
  explicit Generator(at::Generator made)
      : c10::GeneratorImpl(second::device(), c10::DispatchKeySet(c10::DispatchKey::PrivateUse1)), inner(std::move(made)) {}
  static at::Generator& standard() {
    static auto* one = new at::Generator(at::make_generator<Generator>(at::detail::createCPUGenerator()));
    return *one;
  }
  void set_current_seed(uint64_t seed) override { inner.set_current_seed(seed); }
  uint64_t current_seed() const override { return inner.current_seed(); }
  uint64_t seed() override { return inner.seed(); }
  void set_offset(uint64_t) override { TORCH_CHECK(false, "second device: its generator has no offset"); }
  uint64_t get_offset() const override { TORCH_CHECK(false, "second device: its generator has no offset"); }
  void set_state(const c10::TensorImpl& state) override { inner.unsafeGetGeneratorImpl()->set_state(state); }
  c10::intrusive_ptr<c10::TensorImpl> get_state() const override { return inner.unsafeGetGeneratorImpl()->get_state(); }
  Generator* clone_impl() const override { return new Generator(inner.clone()); }
};

// One launch: what it was given as the CPU sees it, and what it gives back as the device's.
class Launch {
 public:
  explicit Launch(std::string name) : name_(std::move(name)), stream_(Streams::all().current()) {
    Guarded guard(lock());
    tick_ = Streams::all().launch(stream_);
    Streams::all().catch_up(stream_);
  }

  // how: what the operator does to this argument. A view looks at no memory.
  enum class How { view, reads, writes, index };

  Tensor given(const Tensor& tensor, How how, const std::string& argument) {
    if (!tensor.defined()) return tensor;
    if (ours(tensor)) {
      used_ = true;
      if (how != How::view) {
        Guarded guard(lock());
        touch(tensor.storage(), how == How::writes, stream_, tick_, name_);
      }
      for (auto& [device_side, cpu_side] : seen_)
        if (device_side.is_same(tensor)) return cpu_side;
      auto [made, is_new] = lent_.try_emplace(tensor.storage().unsafeGetStorageImpl());
      if (is_new) {
        made->second = cpu_storage(tensor.storage());
        homes_.emplace(made->second.unsafeGetStorageImpl(), tensor.storage());
      }
      seen_.emplace_back(tensor, with_storage(tensor, made->second));
      return seen_.back().second;
    }
    // CUDA reads single numbers and indices from the CPU, and nothing else.
    if (tensor.device().is_cpu() && (how == How::writes || (tensor.dim() > 0 && how != How::index)))
      strangers_ << " '" << argument << "' " << tensor.dtype() << " " << tensor.sizes() << " is on the CPU;";
    return tensor;
  }
  at::Generator given(const at::Generator& generator) {
    if (!generator.defined()) return generator;
    if (generator.device().type() == kSecond)
      return static_cast<Generator*>(generator.unsafeGetGeneratorImpl())->inner;
    strangers_ << " its generator is on " << generator.device() << ";";
    return generator;
  }
  c10::Device given(c10::Device wanted) {
    used_ |= wanted.type() == kSecond;
    return wanted.type() == kSecond ? c10::Device(c10::kCPU) : wanted;
  }
  void check() const {
    TORCH_CHECK(
        strangers_.str().empty(), "second device: Expected all tensors to be on the same device in ", name_, ":",
        strangers_.str());
  }

  Tensor result(const Tensor& tensor) {
    if (!tensor.defined() || ours(tensor)) return tensor;
    for (auto& [device_side, cpu_side] : seen_)
      if (cpu_side.is_same(tensor)) {
        follow(device_side, cpu_side);
        return device_side;
      }
    if (!used_ || !tensor.device().is_cpu()) return tensor;
    TORCH_CHECK(tensor.layout() == at::kStrided, "second device: ", name_, " gives a ", tensor.layout(), " tensor");
    auto [home, is_new] = homes_.try_emplace(tensor.storage().unsafeGetStorageImpl());
    if (is_new) {
      home->second = Memory::all().adopt(tensor.storage());
      Guarded guard(lock());
      touch(home->second, true, stream_, tick_, name_);
    }
    return with_storage(tensor, home->second);
  }

  // Arguments that were resized, or given other storage, are so on the device too.
  void follow(const Tensor& device_side, const Tensor& cpu_side) {
    auto* impl = device_side.unsafeGetTensorImpl();
    const auto& there = cpu_side.storage();
    auto [home, is_new] = homes_.try_emplace(there.unsafeGetStorageImpl());
    if (is_new) home->second = Memory::all().adopt(there);
    if (device_side.storage().unsafeGetStorageImpl() != home->second.unsafeGetStorageImpl())
      impl->set_storage_keep_dtype(home->second);
    auto* here = device_side.storage().unsafeGetStorageImpl();
    if (here->data() != there.data() || here->nbytes() != there.nbytes()) {
      auto grown = Memory::all().adopt(there);
      here->set_data_ptr_noswap(std::move(grown.unsafeGetStorageImpl()->_mutable_data_ptr_no_checks()));
      here->set_nbytes(there.nbytes());
    }
    if (device_side.sizes() != cpu_side.sizes() || device_side.strides() != cpu_side.strides() ||
        device_side.storage_offset() != cpu_side.storage_offset())
      impl->set_sizes_and_strides(cpu_side.sizes(), cpu_side.strides(), cpu_side.storage_offset());
  }
  // The host reads a value of the result, and so waits for it.
  void wait() {
    Guarded guard(lock());
    Streams::all().wait_on_host(Clock(Streams::all().clock(stream_)));
  }

 private:
  std::string name_;
  StreamId stream_;
  uint64_t tick_;
  bool used_ = false;
  std::vector<std::pair<Tensor, Tensor>> seen_;
  std::unordered_map<c10::StorageImpl*, c10::Storage> lent_;   // the device's storages -> the CPU's
  std::unordered_map<c10::StorageImpl*, c10::Storage> homes_;  // the CPU's storages -> the device's
  std::ostringstream strangers_;
};

// Whose result is a number on the host, or has a shape that depends on the values.
inline bool host_reads(const std::string& name) {
  static const std::unordered_set<std::string> names{
      "aten::_local_scalar_dense", "aten::equal", "aten::nonzero", "aten::masked_select", "aten::is_nonzero",
      "aten::_unique2", "aten::unique_dim", "aten::unique_consecutive"};
  return names.count(name) > 0;
}
inline bool takes_cpu_indices(const std::string& name) {
  static const std::unordered_set<std::string> names{
      "aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_", "aten::_unsafe_index",
      "aten::_unsafe_index_put"};
  return names.count(name) > 0;
}

inline void fallback(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const auto& schema = op.schema();
  const auto& name = schema.name();
  const auto arguments = schema.arguments().size();
  const auto begin = stack->size() - arguments;
  Launch launch(schema.overload_name().empty() ? name : name + "." + schema.overload_name());
  for (size_t i = 0; i < arguments; i++) {
    auto& value = (*stack)[begin + i];
    const auto& argument = schema.arguments()[i];
    const auto* alias = argument.alias_info();
    auto how = alias == nullptr ? Launch::How::reads : alias->isWrite() ? Launch::How::writes : Launch::How::view;
    const auto listed = how == Launch::How::reads && takes_cpu_indices(name) ? Launch::How::index : how;
    if (value.isTensor()) {
      value = launch.given(value.toTensor(), how, argument.name());
    } else if (value.isTensorList()) {
      c10::List<Tensor> list;
      for (const Tensor& each : value.toTensorVector()) list.push_back(launch.given(each, listed, argument.name()));
      value = list;
    } else if (value.isOptionalTensorList()) {
      c10::List<std::optional<Tensor>> list;
      for (std::optional<Tensor> each : value.toOptionalTensorList())
        list.push_back(each ? std::optional<Tensor>(launch.given(*each, listed, argument.name())) : each);
      value = list;
    } else if (value.isDevice()) {
      value = launch.given(value.toDevice());
    } else if (value.isGenerator()) {
      value = launch.given(value.toGenerator());
    }
  }
  launch.check();
  {
    at::AutoDispatchBelowADInplaceOrView below;
    op.callBoxed(stack);
  }
  if (host_reads(name)) launch.wait();
  const auto results = stack->size() - schema.returns().size();
  for (size_t i = results; i < stack->size(); i++) {
    auto& value = (*stack)[i];
    if (value.isTensor()) {
      value = launch.result(value.toTensor());
    } else if (value.isTensorList()) {
      c10::List<Tensor> list;
      for (const Tensor& each : value.toTensorVector()) list.push_back(launch.result(each));
      value = list;
    }
  }
}

// ---- by hand: what makes, copies and records; and what torch asks a private device to write itself -----------------

inline Tensor empty(
    c10::SymIntArrayRef size, std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
    std::optional<at::Device>, std::optional<bool>, std::optional<at::MemoryFormat> format) {
  return at::detail::empty_generic(
      C10_AS_INTARRAYREF_SLOW(size), &Memory::all(), c10::DispatchKeySet(c10::DispatchKey::PrivateUse1),
      c10::dtype_or_default(dtype), format);
}

inline Tensor empty_strided(
    c10::SymIntArrayRef size, c10::SymIntArrayRef stride, std::optional<at::ScalarType> dtype,
    std::optional<at::Layout>, std::optional<at::Device>, std::optional<bool>) {
  return at::detail::empty_strided_generic(
      C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride), &Memory::all(),
      c10::DispatchKeySet(c10::DispatchKey::PrivateUse1), c10::dtype_or_default(dtype));
}

// A copy that the caller need not wait for is put off where a card could be late with it.
inline Tensor copy_from(const Tensor& self, const Tensor& to, bool non_blocking) {
  Guarded guard(lock());
  auto& streams = Streams::all();
  const auto stream = streams.current();
  const auto tick = streams.launch(stream);
  const bool up = !ours(self), down = !ours(to);
  if (!up) touch(self.storage(), false, stream, tick, "copy");
  if (!down) touch(to.storage(), true, stream, tick, "copy");
  counts().to_device += up;
  counts().to_host += down;
  auto from = up ? self : on_cpu(self);
  auto target = down ? to : on_cpu(to);
  const auto& host_side = up ? self : to;
  if (non_blocking && (up || down) && Pinned::all().holds(host_side.storage().data())) {
    if (down && to.is_non_overlapping_and_dense()) std::memset(to.data_ptr(), 0xff, to.nbytes());
    if (up) {
      // It does not keep what it writes to: memory that is freed meanwhile counts as free at once, as on a card.
      TORCH_CHECK(!to.is_conj() && !to.is_neg(), "second device: a late copy to a conjugate or negative view");
      streams.put_off(
          stream, tick,
          [from, there = to.storage().getWeakStorageImpl(), data = to.data_ptr(), size = to.sizes().vec(),
           stride = to.strides().vec(), type = to.scalar_type()] {
            auto held = there.lock();
            if (!held) return;
            at::AutoDispatchBelowADInplaceOrView below;
            at::from_blob(data, size, stride, at::TensorOptions(type)).copy_(from);
          });
      return to;
    }
    streams.put_off(stream, tick, [from, target]() mutable {
      at::AutoDispatchBelowADInplaceOrView below;
      target.copy_(from);
    });
    return to;
  }
  streams.catch_up(stream);
  {
    at::AutoDispatchBelowADInplaceOrView below;
    target.copy_(from);
  }
  if (up || down) streams.wait_on_host(Clock(streams.clock(stream)));
  return to;
}

inline Tensor copy_from_and_resize(const Tensor& self, const Tensor& to) {
  to.resize_(self.sizes());
  return copy_from(self, to, false);
}

inline Tensor& set_storage(
    Tensor& self, c10::Storage source, c10::SymInt offset, c10::SymIntArrayRef size, c10::SymIntArrayRef stride) {
  TORCH_CHECK(source.device() == self.device(), "second device: set_ to a storage on ", source.device());
  self.unsafeGetTensorImpl()->set_storage_keep_dtype(source);
  self.unsafeGetTensorImpl()->set_sizes_and_strides(
      C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride), offset.expect_int());
  return self;
}

inline Tensor& set_whole_storage(Tensor& self, c10::Storage source) {
  const auto numbers = int64_t(source.nbytes() / self.itemsize());
  return set_storage(self, source, 0, c10::SymIntArrayRef(c10::SymInt(numbers)), c10::SymIntArrayRef(c10::SymInt(1)));
}

inline void record_stream(Tensor& self, c10::Stream stream) {
  Memory::all().recordStream(self.storage().data_ptr(), stream);
}

inline std::optional<Tensor> given(Launch& launch, const std::optional<Tensor>& tensor, const char* name) {
  return tensor ? std::optional<Tensor>(launch.given(*tensor, Launch::How::reads, name)) : tensor;
}

inline Tensor convolution(
    const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, at::IntArrayRef stride,
    at::IntArrayRef padding, at::IntArrayRef dilation, bool transposed, at::IntArrayRef output_padding, int64_t groups) {
  Launch launch("aten::convolution");
  auto a = launch.given(x, Launch::How::reads, "input"), w = launch.given(weight, Launch::How::reads, "weight");
  auto b = given(launch, bias, "bias");
  launch.check();
  at::AutoDispatchBelowADInplaceOrView below;
  return launch.result(at::convolution(a, w, b, stride, padding, dilation, transposed, output_padding, groups));
}

inline std::tuple<Tensor, Tensor, Tensor> convolution_backward(
    const Tensor& gradient, const Tensor& x, const Tensor& weight, at::IntArrayRef stride, at::IntArrayRef padding,
    at::IntArrayRef dilation, bool transposed, at::IntArrayRef output_padding, int64_t groups,
    std::array<bool, 3> wanted) {
  Launch launch("aten::convolution_backward");
  auto g = launch.given(gradient, Launch::How::reads, "grad_output");
  auto a = launch.given(x, Launch::How::reads, "input"), w = launch.given(weight, Launch::How::reads, "weight");
  launch.check();
  const std::vector<int64_t> bias{transposed ? weight.size(1) * groups : weight.size(0)};
  at::AutoDispatchBelowADInplaceOrView below;
  auto [to_x, to_weight, to_bias] = at::convolution_backward(
      g, a, w, bias, stride, padding, dilation, transposed, output_padding, groups, wanted);
  return {launch.result(to_x), launch.result(to_weight), launch.result(to_bias)};
}

// The kernel that the CPU would take, so that attention's values and memory are the CPU's and not those of the formula.
inline int64_t attention_choice(
    const Tensor& query, const Tensor& key, const Tensor& value, const std::optional<Tensor>& mask, double dropout,
    bool causal, std::optional<double> scale, bool grouped) {
  auto cpu = [](const Tensor& tensor) { return ours(tensor) ? on_cpu(tensor) : tensor; };
  auto q = cpu(query), k = cpu(key), v = cpu(value);
  if (query.requires_grad() || key.requires_grad() || value.requires_grad()) q.set_requires_grad(true);
  auto m = mask ? std::optional<Tensor>(cpu(*mask)) : mask;
  auto choice = at::_fused_sdp_choice(q, k, v, m, dropout, causal, scale, grouped);
  return int64_t(
      choice == int64_t(at::SDPBackend::flash_attention) ? at::SDPBackend::overrideable : at::SDPBackend::math);
}

inline std::tuple<Tensor, Tensor, Tensor, Tensor, c10::SymInt, c10::SymInt, Tensor, Tensor, Tensor> attention(
    const Tensor& query, const Tensor& key, const Tensor& value, const std::optional<Tensor>& mask, double dropout,
    bool causal, bool, std::optional<double> scale) {
  Launch launch("aten::scaled_dot_product_attention");
  auto q = launch.given(query, Launch::How::reads, "query"), k = launch.given(key, Launch::How::reads, "key");
  auto v = launch.given(value, Launch::How::reads, "value");
  auto m = given(launch, mask, "attn_mask");
  launch.check();
  at::AutoDispatchBelowADInplaceOrView below;
  auto [out, sums] = at::_scaled_dot_product_flash_attention_for_cpu(q, k, v, dropout, causal, m, scale);
  auto none = [&] { return at::empty({0}, query.options().dtype(at::kLong)); };
  return {launch.result(out), launch.result(sums), none(), none(), query.sym_size(2), key.sym_size(2), none(), none(),
          none()};
}

inline std::tuple<Tensor, Tensor, Tensor, Tensor> attention_backward(
    const Tensor& gradient, const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& mask,
    std::array<bool, 4>, const Tensor& out, const Tensor& sums, const Tensor&, const Tensor&, c10::SymInt, c10::SymInt,
    double dropout, bool causal, const Tensor&, const Tensor&, std::optional<double> scale) {
  Launch launch("aten::scaled_dot_product_attention_backward");
  auto read = [&](const Tensor& tensor, const char* name) { return launch.given(tensor, Launch::How::reads, name); };
  auto g = read(gradient, "grad_out"), q = read(query, "query"), k = read(key, "key"), v = read(value, "value");
  auto o = read(out, "out"), s = read(sums, "logsumexp");
  auto m = mask.defined() ? std::optional<Tensor>(read(mask, "attn_mask")) : std::nullopt;
  launch.check();
  at::AutoDispatchBelowADInplaceOrView below;
  auto [to_q, to_k, to_v] =
      at::_scaled_dot_product_flash_attention_for_cpu_backward(g, q, k, v, o, s, dropout, causal, m, scale);
  return {launch.result(to_q), launch.result(to_k), launch.result(to_v), Tensor()};
}

TORCH_LIBRARY_IMPL(_, PrivateUse1, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&fallback>()); }

TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  m.impl("empty.memory_format", &empty);
  m.impl("empty_strided", &empty_strided);
  m.impl("_copy_from", &copy_from);
  m.impl("_copy_from_and_resize", &copy_from_and_resize);
  m.impl("set_.source_Storage_storage_offset", &set_storage);
  m.impl("set_.source_Storage", &set_whole_storage);
  m.impl("record_stream", &record_stream);
  m.impl("convolution_overrideable", &convolution);
  m.impl("convolution_backward_overrideable", &convolution_backward);
  m.impl("_scaled_dot_product_fused_attention_overrideable", &attention);
  m.impl("_scaled_dot_product_fused_attention_overrideable_backward", &attention_backward);
  // CPU and CUDA have kernels for these; elsewhere torch composes them of others, which ask more of their input's layout.
  for (const char* name :
       {"native_group_norm", "native_layer_norm", "native_batch_norm", "silu_backward", "upsample_nearest2d",
        "pixel_shuffle", "pixel_unshuffle", "channel_shuffle"})
    m.impl(name, torch::CppFunction::makeFromBoxedFunction<&fallback>());
}

}  // namespace second

namespace at::native {
REGISTER_PRIVATEUSE1_DISPATCH(_fused_sdp_choice_stub, &second::attention_choice);
}

// Autocast as torch lists it for any device.
namespace at::autocast {
TORCH_LIBRARY_IMPL(_, AutocastPrivateUse1, m) { m.fallback(torch::CppFunction::makeFallthrough()); }
TORCH_LIBRARY_IMPL(aten, AutocastPrivateUse1, m) {
#define RETORT_HALF(...) KERNEL_PRIVATEUSEONE(__VA_ARGS__, lower_precision_fp)
  AT_FORALL_LOWER_PRECISION_FP(RETORT_HALF)
#define RETORT_FULL(...) KERNEL_PRIVATEUSEONE(__VA_ARGS__, fp32)
  AT_FORALL_FP32(RETORT_FULL)
#define RETORT_WIDEST(...) KERNEL_PRIVATEUSEONE(__VA_ARGS__, promote)
  AT_FORALL_PROMOTE(RETORT_WIDEST)
}
}  // namespace at::autocast
