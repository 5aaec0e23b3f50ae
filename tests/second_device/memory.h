// The device's memory: blocks of the CPU's, counted and limited as a card's would be, each with who touched it last.
#pragma once

#include "streams.h"

#include <c10/core/CPUAllocator.h>
#include <c10/core/CachingDeviceAllocator.h>
#include <c10/core/Storage.h>

#include <cstring>
#include <map>
#include <sstream>
#include <string>
#include <unordered_map>
#include <unordered_set>
#include <variant>

namespace second {

struct Access {
  StreamId stream = 0;
  uint64_t tick = 0;
};

class Memory;

// One allocation. `owner` is the CPU memory beneath: its own, or what a CPU kernel returned.
struct Block {
  size_t bytes;
  std::variant<c10::DataPtr, c10::Storage> owner;
  StreamId stream;  // on which it was allocated, and may be handed out again once it is freed
  Access written;
  std::unordered_map<StreamId, uint64_t> read;
  std::unordered_set<StreamId> recorded;  // by record_stream
  std::vector<Access> before;  // what may still be at work on this memory from when it was another block's

  static void drop(void* block);
  static Block* of(const c10::DataPtr& memory) {
    return memory.get_deleter() == &Block::drop ? static_cast<Block*>(memory.get_context()) : nullptr;
  }
};

class Memory final : public c10::DeviceAllocator {
 public:
  static Memory& all() {
    static auto* one = new Memory();
    return *one;
  }

  // Empty memory holds what is no number in any floating type, as nothing may depend on it.
  c10::DataPtr allocate(size_t bytes) override {
    auto memory = c10::GetCPUAllocator()->allocate(bytes);
    void* data = memory.get();
    if (bytes) std::memset(data, 0xff, bytes);
    return taken(data, bytes, std::move(memory));
  }
  // A CPU kernel's result, which becomes the device's.
  c10::Storage adopt(const c10::Storage& made) {
    void* data = const_cast<void*>(made.data());
    auto memory = taken(data, made.nbytes(), made);
    return {c10::Storage::use_byte_size_t(), made.nbytes(), std::move(memory), this, /*resizable=*/true};
  }
  c10::DeleterFnPtr raw_deleter() const override { return nullptr; }
  void copy_data(void* to, const void* from, size_t count) const override { default_copy_data(to, from, count); }

  bool initialized() override { return true; }
  void emptyCache(c10::MempoolId_t) override {}
  void recordStream(const c10::DataPtr& memory, c10::Stream stream) override {
    Guarded guard(lock());
    if (auto* block = Block::of(memory)) block->recorded.insert(stream.id());
  }
  c10::CachingDeviceAllocator::DeviceStats getDeviceStats(c10::DeviceIndex) override {
    Guarded guard(lock());
    return stats_;
  }
  void resetAccumulatedStats(c10::DeviceIndex) override { each([](auto& stat) { stat.reset_accumulated(); }); }
  void resetPeakStats(c10::DeviceIndex) override { each([](auto& stat) { stat.reset_peak(); }); }
  std::pair<size_t, size_t> getMemoryInfo(c10::DeviceIndex) override {
    Guarded guard(lock());
    return {size_t(std::max<int64_t>(0, int64_t(limit) - stats_.allocated_bytes[0].current)), limit};
  }

  void given_back(size_t bytes) {
    for (auto* stat : {&stats_.allocated_bytes, &stats_.reserved_bytes, &stats_.active_bytes})
      (*stat)[0].decrease(bytes);
    for (auto* stat : {&stats_.allocation, &stats_.active}) (*stat)[0].decrease(1);
  }

  // Memory of `owner` was freed while another stream may still be at work on it.
  void left_at(StreamId owner, Access access) { unfinished_[owner].push_back(access); }

  size_t limit = size_t(24) << 30;

 private:
  // What of that a stream has not waited for by now. Which block would be taken again is not known here: any.
  std::vector<Access> unfinished(StreamId stream) {
    auto& left = unfinished_[stream];
    const auto &clock = Streams::all().clock(stream), &host = Streams::all().host();
    left.erase(
        std::remove_if(
            left.begin(), left.end(),
            [&](const Access& a) { return clock.at(a.stream) >= a.tick || host.at(a.stream) >= a.tick; }),
        left.end());
    return left;
  }
  static size_t rounded(size_t bytes) { return (bytes + 511) / 512 * 512; }  // as CUDA's allocator does

  template <typename Owner>
  c10::DataPtr taken(void* data, size_t asked, Owner&& owner) {
    Guarded guard(lock());
    const auto bytes = rounded(asked);
    const auto held = size_t(stats_.allocated_bytes[0].current);
    if (held + bytes > limit) {
      stats_.num_ooms++;
      TORCH_CHECK_WITH(
          OutOfMemoryError, false, "second device out of memory. Tried to allocate ", bytes, " bytes; ", held, " of ",
          limit, " are taken");
    }
    for (auto* stat : {&stats_.allocated_bytes, &stats_.reserved_bytes, &stats_.active_bytes})
      (*stat)[0].increase(bytes);
    stats_.requested_bytes[0].increase(asked);
    for (auto* stat : {&stats_.allocation, &stats_.active}) (*stat)[0].increase(1);
    auto* block = new Block{bytes, std::forward<Owner>(owner), Streams::all().current(), {}, {}, {}, {}};
    block->before = unfinished(block->stream);
    return {data, block, &Block::drop, device()};
  }
  template <typename F>
  void each(F change) {
    Guarded guard(lock());
    for (auto* stats : {&stats_.allocated_bytes, &stats_.reserved_bytes, &stats_.active_bytes, &stats_.requested_bytes,
                        &stats_.allocation, &stats_.active})
      for (auto& stat : *stats) change(stat);
  }

  c10::CachingDeviceAllocator::DeviceStats stats_;
  std::unordered_map<StreamId, std::vector<Access>> unfinished_;
};

inline std::string between(const char* what, StreamId a, StreamId b) {
  std::ostringstream text;
  text << what << " on stream " << b << " what stream " << a << " may still be at work on; wait for an event of it first";
  return text.str();
}

inline void Block::drop(void* context) {
  Guarded guard(lock());
  auto* block = static_cast<Block*>(context);
  auto& streams = Streams::all();
  auto unordered = [&](StreamId stream, uint64_t tick) {
    return tick && stream != block->stream && !block->recorded.count(stream) &&
        streams.clock(block->stream).at(stream) < tick && streams.host().at(stream) < tick;
  };
  auto check = [&](StreamId stream, uint64_t tick) {
    if (unordered(stream, tick)) Memory::all().left_at(block->stream, {stream, tick});
  };
  check(block->written.stream, block->written.tick);
  for (auto& [stream, tick] : block->read) check(stream, tick);
  Memory::all().given_back(block->bytes);
  delete block;
}

// A launch on `stream` that reads or writes memory: an error where an access of another stream is not ordered before it.
inline void touch(const c10::Storage& storage, bool writes, StreamId stream, uint64_t tick, const std::string& who) {
  auto* block = Block::of(storage.data_ptr());
  if (block == nullptr) return;
  const auto& clock = Streams::all().clock(stream);
  for (auto& access : block->before)
    TORCH_CHECK(
        access.stream == stream || clock.at(access.stream) >= access.tick, "second device: race: ", who, ": ",
        between("takes memory that was freed", access.stream, stream), ", or record_stream it");
  block->before.clear();
  const auto& last = block->written;
  TORCH_CHECK(
      last.stream == stream || clock.at(last.stream) >= last.tick, "second device: race: ", who, ": ",
      between(writes ? "writes" : "reads", last.stream, stream));
  if (writes) {
    for (auto& [reader, when] : block->read)
      TORCH_CHECK(
          reader == stream || clock.at(reader) >= when, "second device: race: ", who, ": ",
          between("overwrites", reader, stream));
    block->written = {stream, tick};
    block->read.clear();
  } else {
    block->read[stream] = tick;
  }
}

inline void DeviceGuard::recordDataPtrOnStream(const c10::DataPtr& memory, const c10::Stream& stream) const {
  Memory::all().recordStream(memory, stream);
}

// Host memory from which and to which copies need not be waited for.
class Pinned final : public c10::Allocator {
 public:
  static Pinned& all() {
    static auto* one = new Pinned();
    return *one;
  }
  c10::DataPtr allocate(size_t bytes) override {
    Guarded guard(lock());
    auto* memory = new c10::DataPtr(c10::GetCPUAllocator()->allocate(bytes));
    void* data = memory->get();
    ranges_[data] = bytes;
    held_ += bytes;
    return {data, memory, &Pinned::drop, c10::Device(c10::kCPU)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return nullptr; }
  void copy_data(void* to, const void* from, size_t count) const override { default_copy_data(to, from, count); }
  bool holds(const void* data) const {
    Guarded guard(lock());
    auto after = ranges_.upper_bound(const_cast<void*>(data));
    if (after == ranges_.begin()) return false;
    auto [start, bytes] = *std::prev(after);
    return static_cast<const char*>(data) < static_cast<const char*>(start) + bytes;
  }
  size_t held() const { return held_; }
  // Memory that is somebody's already, as cudaHostRegister takes it.
  void enlist(void* data, size_t bytes) {
    Guarded guard(lock());
    TORCH_CHECK(!ranges_.count(data), "second device: this memory is pinned already");
    ranges_[data] = bytes;
    held_ += bytes;
  }
  bool dismiss(void* data) {
    Guarded guard(lock());
    auto found = ranges_.find(data);
    if (found == ranges_.end()) return false;
    held_ -= found->second;
    ranges_.erase(found);
    return true;
  }

 private:
  static void drop(void* context) {
    Guarded guard(lock());
    auto* memory = static_cast<c10::DataPtr*>(context);
    auto found = all().ranges_.find(memory->get());
    all().held_ -= found->second;
    all().ranges_.erase(found);
    delete memory;
  }
  std::map<void*, size_t> ranges_;
  size_t held_ = 0;
};

}  // namespace second
