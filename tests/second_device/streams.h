// Streams and events, whose order is checked and not only emulated.
//
// Every launch ticks its stream. A stream's clock says, for each stream, up to which launch that stream's work is finished
// before anything launched here next; waiting for an event takes over the clock that was recorded. So whether one access
// to memory comes before another is a comparison, and an access that no wait orders is an error although the values here
// would happen to be right. What a stream may finish late does finish late: a copy between pinned host memory and the
// device with non_blocking=True runs only when somebody waits for it.
#pragma once

#include <Python.h>

#include <c10/core/Stream.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <deque>
#include <functional>
#include <mutex>
#include <vector>

namespace second {

constexpr auto kSecond = c10::DeviceType::PrivateUse1;
inline c10::Device device() { return {kSecond, 0}; }

// One lock for all that is counted here; launches come from the caller's thread and from autograd's.
inline std::recursive_mutex& lock() {
  static std::recursive_mutex mutex;
  return mutex;
}
// Whoever waits for the lock lets Python's go meanwhile: its holder may need that, when it frees what Python knows too.
class Guarded {
 public:
  explicit Guarded(std::recursive_mutex& mutex) : mutex_(mutex) {
    if (mutex_.try_lock()) return;
    if (Py_IsInitialized() && PyGILState_Check()) {
      PyThreadState* state = PyEval_SaveThread();
      mutex_.lock();
      PyEval_RestoreThread(state);
    } else {
      mutex_.lock();
    }
  }
  ~Guarded() { mutex_.unlock(); }
  Guarded(const Guarded&) = delete;
  Guarded& operator=(const Guarded&) = delete;

 private:
  std::recursive_mutex& mutex_;
};

using StreamId = c10::StreamId;

struct Clock {
  std::vector<uint64_t> ticks;
  uint64_t at(StreamId stream) const { return size_t(stream) < ticks.size() ? ticks[stream] : 0; }
  void join(const Clock& other) {
    if (ticks.size() < other.ticks.size()) ticks.resize(other.ticks.size(), 0);
    for (size_t i = 0; i < other.ticks.size(); i++) ticks[i] = std::max(ticks[i], other.ticks[i]);
  }
};

struct Late {
  uint64_t tick;
  std::function<void()> work;
};

struct StreamState {
  Clock clock;
  std::deque<Late> late;
};

struct Event {
  Clock clock;
  std::chrono::steady_clock::time_point when;
};

struct Counts {
  int64_t waits = 0, to_host = 0, to_device = 0, late = 0;
};

inline Counts& counts() {
  static Counts all;
  return all;
}

class Streams {
 public:
  static Streams& all() {
    static auto* one = new Streams();  // outlives the tensors that are freed while the process ends
    return *one;
  }

  StreamId current() const { return current_; }
  StreamId exchange(StreamId next) {
    std::swap(current_, next);
    return next;
  }
  StreamId fresh() {
    Guarded guard(lock());
    streams_.emplace_back();
    return StreamId(streams_.size() - 1);
  }

  // Begin work on a stream: its number. The host has waited for whatever its own clock says.
  uint64_t launch(StreamId stream) {
    auto& state = streams_[stream];
    state.clock.join(host_);
    if (state.clock.ticks.size() <= size_t(stream)) state.clock.ticks.resize(stream + 1, 0);
    return ++state.clock.ticks[stream];
  }
  // What was put off on a stream comes before what runs on it now.
  void catch_up(StreamId stream) { finish(stream, UINT64_MAX); }
  void put_off(StreamId stream, uint64_t tick, std::function<void()> work) {
    counts().late++;
    streams_[stream].late.push_back({tick, std::move(work)});
  }
  const Clock& clock(StreamId stream) const { return streams_[stream].clock; }
  const Clock& host() const { return host_; }

  Event record(StreamId stream) { return {streams_[stream].clock, std::chrono::steady_clock::now()}; }
  void wait(StreamId stream, const Event& event) {
    finish(event.clock);
    streams_[stream].clock.join(event.clock);
  }
  void wait_on_host(const Clock& until) {
    counts().waits++;
    finish(until);
    host_.join(until);
  }
  void wait_for_all() {
    for (size_t i = 0; i < streams_.size(); i++) wait_on_host(Clock(streams_[i].clock));
  }

 private:
  Streams() : streams_(1) {}
  void finish(const Clock& until) {
    for (size_t i = 0; i < until.ticks.size(); i++) finish(StreamId(i), until.ticks[i]);
  }
  void finish(StreamId stream, uint64_t tick) {
    auto& late = streams_[stream].late;
    while (!late.empty() && late.front().tick <= tick) {
      auto work = std::move(late.front().work);
      late.pop_front();
      work();
    }
  }

  static thread_local StreamId current_;
  std::deque<StreamState> streams_;
  Clock host_;
};
inline thread_local StreamId Streams::current_ = 0;

struct DeviceGuard final : public c10::impl::DeviceGuardImplInterface {
  static c10::Stream named(StreamId id) { return c10::Stream(c10::Stream::UNSAFE, device(), id); }

  c10::DeviceType type() const override { return kSecond; }
  c10::Device exchangeDevice(c10::Device) const override { return device(); }
  c10::Device getDevice() const override { return device(); }
  void setDevice(c10::Device) const override {}
  void uncheckedSetDevice(c10::Device) const noexcept override {}
  c10::DeviceIndex deviceCount() const noexcept override { return 1; }

  c10::Stream getStream(c10::Device) const override { return named(Streams::all().current()); }
  c10::Stream getDefaultStream(c10::Device) const override { return named(0); }
  c10::Stream getStreamFromGlobalPool(c10::Device, bool) const override { return named(Streams::all().fresh()); }
  c10::Stream getNewStream(c10::Device, int) const override { return named(Streams::all().fresh()); }
  c10::Stream exchangeStream(c10::Stream next) const override { return named(Streams::all().exchange(next.id())); }

  void record(void** event, const c10::Stream& stream, const c10::DeviceIndex, const c10::EventFlag) const override {
    Guarded guard(lock());
    if (*event == nullptr) *event = new Event();
    *static_cast<Event*>(*event) = Streams::all().record(stream.id());
  }
  void block(void* event, const c10::Stream& stream) const override {
    Guarded guard(lock());
    if (event != nullptr) Streams::all().wait(stream.id(), *static_cast<Event*>(event));
  }
  void destroyEvent(void* event, const c10::DeviceIndex) const noexcept override { delete static_cast<Event*>(event); }
  bool queryEvent(void* event) const override {
    synchronizeEvent(event);  // asked often enough, the answer becomes yes
    return true;
  }
  void synchronizeEvent(void* event) const override {
    Guarded guard(lock());
    if (event != nullptr) Streams::all().wait_on_host(static_cast<Event*>(event)->clock);
  }
  bool queryStream(const c10::Stream& stream) const override {
    synchronizeStream(stream);
    return true;
  }
  void synchronizeStream(const c10::Stream& stream) const override {
    Guarded guard(lock());
    Streams::all().wait_on_host(Clock(Streams::all().clock(stream.id())));
  }
  void synchronizeDevice(const c10::DeviceIndex) const override {
    Guarded guard(lock());
    Streams::all().wait_for_all();
  }
  double elapsedTime(void* from, void* to, const c10::DeviceIndex) const override {
    auto spent = static_cast<Event*>(to)->when - static_cast<Event*>(from)->when;
    return std::chrono::duration<double, std::milli>(spent).count();
  }
  void recordDataPtrOnStream(const c10::DataPtr& memory, const c10::Stream& stream) const override;
};

}  // namespace second
