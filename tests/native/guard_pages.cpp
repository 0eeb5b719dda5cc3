// A tensor allocator that puts every CPU tensor directly against an inaccessible page, so that one
// byte read or written outside of it ends the process. Used through ctypes by operator_calls.py.

#include <c10/core/Allocator.h>
#include <c10/core/CPUAllocator.h>
#include <sys/mman.h>
#include <unistd.h>

#include <atomic>
#include <cstdint>
#include <cstring>
#include <mutex>
#include <new>
#include <unordered_map>

namespace {

enum Edge : int { kOff = 0, kEnd = 1, kStart = 2 };
std::atomic<int> edge{kOff};
std::atomic<int64_t> guarded{0};

// Pages that hold a tensor, between two that hold nothing.
struct Mapping {
  void* base;
  size_t size;
};

std::mutex lock;
std::unordered_map<void*, Mapping> mappings;  // by the tensor's address
c10::Allocator* usual = nullptr;

void release(void* data) {
  Mapping mapping;
  {
    const std::lock_guard<std::mutex> held(lock);
    const auto found = mappings.find(data);
    if (found == mappings.end()) return usual->raw_deleter()(data);
    mapping = found->second;
    mappings.erase(found);
  }
  munmap(mapping.base, mapping.size);
}

struct GuardAllocator final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    const int where = edge;
    if (where == kOff || bytes == 0) return usual->allocate(bytes);
    const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
    const size_t inside = (bytes + page - 1) / page * page;
    const size_t size = inside + 2 * page;
    void* base = mmap(nullptr, size, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (base == MAP_FAILED) throw std::bad_alloc();
    char* first = static_cast<char*>(base) + page;
    if (mprotect(first, inside, PROT_READ | PROT_WRITE) != 0) throw std::bad_alloc();
    std::memset(first, 0xff, inside);  // NaN in every floating-point type
    char* data = where == kEnd ? first + inside - bytes : first;
    ++guarded;
    const std::lock_guard<std::mutex> held(lock);
    mappings[data] = {base, size};
    return {data, data, &release, c10::Device(c10::DeviceType::CPU)};
  }

  c10::DeleterFnPtr raw_deleter() const override { return &release; }

  void copy_data(void* to, const void* from, size_t count) const override {
    std::memcpy(to, from, count);
  }
};

}  // namespace

#define EXPORTED extern "C" __attribute__((visibility("default")))

// From now on tensors end (1) or start (2) at an inaccessible page, or lie as usual (0).
EXPORTED void guard_tensors(int where) {
  if (usual == nullptr) {
    usual = c10::GetCPUAllocator();
    c10::SetCPUAllocator(new GuardAllocator, 255);
  }
  edge = where;
}

// How many tensors were placed so far.
EXPORTED int64_t guarded_tensors() { return guarded; }
