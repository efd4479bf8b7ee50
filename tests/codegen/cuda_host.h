// CUDA C++ device code on a CPU: a block's threads are fibers that take turns at every barrier and shuffle.
#pragma once

#include <math.h>
#include <string.h>
#include <ucontext.h>

#include <algorithm>
#include <utility>
#include <vector>

#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static

typedef _Float16 __half;

struct __nv_bfloat16 {
  unsigned short bits;
  __nv_bfloat16() = default;
  explicit __nv_bfloat16(float value) {
    unsigned word;
    memcpy(&word, &value, 4);
    bits = value != value ? 0x7fc0 : (word + 0x7fff + (word >> 16 & 1)) >> 16;
  }
  operator float() const {
    const unsigned word = unsigned(bits) << 16;
    float value;
    memcpy(&value, &word, 4);
    return value;
  }
};

struct Place { unsigned x, y, z; };
static Place blockIdx, threadIdx, gridDim;

using std::max;
using std::min;

static float __int_as_float(int bits) { float value; memcpy(&value, &bits, 4); return value; }
static float rsqrtf(float x) { return 1.0f / sqrtf(x); }
static double rsqrt(double x) { return 1.0 / sqrt(x); }

namespace host {

struct Fiber {
  ucontext_t context;
  std::vector<char> stack = std::vector<char>(1 << 15);
  Place place;
  bool done;
};
static std::vector<Fiber> fibers(1024);
static ucontext_t scheduler;
static unsigned running, width;
static void (*body)();
static void (*begin_block)() = [] {};
static long long slots[1024];

static void yield() {
  const unsigned here = running;
  swapcontext(&fibers[here].context, &scheduler);
  threadIdx = fibers[here].place;
}

static void enter() {
  body();
  fibers[running].done = true;
  swapcontext(&fibers[running].context, &scheduler);
}

static void block(unsigned threads) {
  begin_block();
  for (unsigned t = 0; t < threads; ++t) {
    Fiber& fiber = fibers[t];
    fiber.place = {t % width, t / width, 0};
    fiber.done = false;
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.data();
    fiber.context.uc_stack.ss_size = fiber.stack.size();
    makecontext(&fiber.context, enter, 0);
  }
  for (unsigned left = threads; left > 0;) {
    for (running = 0; running < threads; ++running) {
      if (fibers[running].done) continue;
      threadIdx = fibers[running].place;
      swapcontext(&scheduler, &fibers[running].context);
      left -= fibers[running].done;
    }
  }
}

// The value of thread `from`, which has come to the same shuffle.
template <typename T>
T exchanged(T value, unsigned from) {
  memcpy(&slots[running], &value, sizeof(T));
  yield();
  memcpy(&value, &slots[from], sizeof(T));
  yield();
  return value;
}

template <typename... A, size_t... I>
void call(void (*kernel)(A...), void** arguments, std::index_sequence<I...>) {
  kernel(A(arguments[I])...);
}

template <auto KERNEL>
struct Runner;

template <typename... A, void (*KERNEL)(A...)>
struct Runner<KERNEL> {
  static inline void** arguments;
  static void thread() { call(KERNEL, arguments, std::index_sequence_for<A...>()); }
  static void run(unsigned along, unsigned across, unsigned x, unsigned y, void** given) {
    arguments = given;
    body = thread;
    width = x;
    gridDim = {along, across, 1};
    for (unsigned b = 0; b < along * across; ++b) {
      blockIdx = {b % along, b / along, 0};
      block(x * y);
    }
  }
};

}  // namespace host

static void __syncthreads() { host::yield(); }

template <typename T>
T __shfl_xor_sync(unsigned, T value, int step) { return host::exchanged(value, host::running ^ step); }

template <typename T>
T __shfl_sync(unsigned, T value, int lane, int width = 32) {
  return host::exchanged(value, host::running / width * width + lane);
}

template <typename T>
T __shfl_up_sync(unsigned, T value, int step, int width = 32) {
  const unsigned lane = host::running % width;
  return host::exchanged(value, lane < unsigned(step) ? host::running : host::running - step);
}
