// What generated kernels call of Hopper's tensor cores, on a CPU: the arithmetic and the barriers, at once.
#pragma once

#include <stdlib.h>

#include <array>
#include <deque>
#include <functional>
#include <map>
#include <vector>

#include "cuda_host.h"

#define __grid_constant__
#define __align__(bytes)

struct alignas(16) uint4 { unsigned x, y, z, w; };

namespace host {

static unsigned char memory[232448];

static std::map<int, std::pair<int, int>> met;  // how many wait under a number, and how often all have come

// A thread that comes under a number, but does not wait for the others.
static void come(int number, int count) {
  auto& [waiting, times] = met[number];
  if (++waiting == count) {
    waiting = 0;
    ++times;
  }
}

// All threads that come under one number, until `count` of them have.
static void gather(int number, int count) {
  const int before = met[number].second;
  come(number, count);
  while (met[number].second == before) yield();
}

static void gather_warp() { gather(1000 + running / 32, 32); }

struct Barrier { int arrivals, pending, phases, bytes; };
static std::map<unsigned, Barrier> barriers;

// Bulk copies that nobody has waited for yet: what they overwrite is gone, what they bring is not there.
static std::deque<std::function<void()>> coming;

static const bool each_block_has_its_own = (begin_block = [] {
  if (!coming.empty()) abort();
  met.clear();
  barriers.clear();
}, true);

static void settle(Barrier& barrier) {
  if (barrier.pending == 0 && barrier.bytes == 0) {
    barrier.pending = barrier.arrivals;
    ++barrier.phases;
  }
}

// What each lane of the warp gives, known to all of them.
template <typename T>
std::vector<T> shared_by_warp(const T& value) {
  static std::vector<T> given(1024);
  given[running] = value;
  gather_warp();
  const unsigned first = running / 32 * 32;
  std::vector<T> found(given.begin() + first, given.begin() + first + 32);
  gather_warp();
  return found;
}

template <typename T>
const T& at(unsigned place) { return *reinterpret_cast<const T*>(memory + place); }

// Where in shared memory a byte of a swizzled tile lies: 16 bytes change places with others of their 128.
static unsigned swizzled(unsigned at) { return at ^ (at >> 7 & 7) << 4; }

template <typename T>
float half_of(unsigned word, int which) {
  T value;
  memcpy(&value, reinterpret_cast<const char*>(&word) + 2 * which, 2);
  return float(value);
}

template <typename T>
unsigned pack(float low, float high) {
  const T both[2] = {T(low), T(high)};
  unsigned word;
  memcpy(&word, both, 4);
  return word;
}

// Where the element of a matrix lies; its dimensions are `row` and `k`, what is summed over.
static unsigned place(unsigned long long m, int row, int k, int size, bool turned) {
  const unsigned begin = (m & 0x3fff) << 4, across = (m >> 16 & 0x3fff) << 4, down = (m >> 32 & 0x3fff) << 4;
  if (m >> 62 == 0) return begin + row / 8 * down + row % 8 * 16 + k / 8 * across + k % 8 * 2;
  if (m >> 62 != 1) abort();
  const unsigned at = turned ? begin + row / 64 * across + k / 8 * down + k % 8 * 128 + row % 64 * size
                             : begin + row / 8 * down + row % 8 * 128 + k * size;
  return swizzled(at);
}

struct Tf32 {
  unsigned bits;
  operator float() const {
    const unsigned word = bits & ~0x1fffu;
    float value;
    memcpy(&value, &word, 4);
    return value;
  }
};

// What a thread has asked for, done as late as may be: groups of products, and results on their way.
struct Later {
  std::deque<std::vector<std::function<void()>>> groups;
  std::vector<std::function<void()>> open, sent;
};
static std::vector<Later> later(1024);

static void finish_products(size_t but) {
  auto& groups = later[running].groups;
  for (; groups.size() > but; groups.pop_front())
    for (const auto& product : groups.front()) product();
  gather_warp();
}

// 64 rows of `a` by all of `b`.
template <typename T, int COUNT>
void multiply(float (&sums)[COUNT], unsigned long long a, unsigned long long b, bool add, bool left = false, bool right = false) {
  float* const to = sums;
  later[running].open.push_back([=] {
    const int thread = running % 128, lane = thread % 32;
    for (int s = 0; s < COUNT; ++s) {
      const int row = thread / 32 * 16 + lane / 4 + s / 2 % 2 * 8, column = s / 4 * 8 + lane % 4 * 2 + s % 2;
      float sum = add ? to[s] : 0.0f;
      for (int k = 0; k < 32 / int(sizeof(T)); ++k)
        sum += float(at<T>(place(a, row, k, sizeof(T), left))) * float(at<T>(place(b, column, k, sizeof(T), right)));
      to[s] = sum;
    }
  });
}

// 64 rows in registers, as the warps hold them now, by all of `b`, whose rows are contiguous.
template <typename T, int COUNT>
void multiply_held(float (&sums)[COUNT], const std::array<unsigned, 4>& words, unsigned long long b) {
  float* const to = sums;
  const auto given = shared_by_warp(words);
  later[running].open.push_back([=] {
    const int lane = running % 32;
    for (int s = 0; s < COUNT; ++s) {
      const int row = lane / 4 + s / 2 % 2 * 8, column = s / 4 * 8 + lane % 4 * 2 + s % 2;
      for (int k = 0; k < 16; ++k) {
        const unsigned word = given[row % 8 * 4 + k % 8 / 2][k / 8 * 2 + row / 8];
        to[s] += half_of<T>(word, k % 2) * float(at<T>(place(b, column, k, sizeof(T), true)));
      }
    }
  });
}

template <typename T>
void product(float (&sums)[4], unsigned a, unsigned b, unsigned c, unsigned d, unsigned e, unsigned f) {
  struct Given { unsigned words[6]; };
  const auto given = shared_by_warp(Given{{a, b, c, d, e, f}});
  const int lane = running % 32;
  for (int s = 0; s < 4; ++s) {
    const int row = lane / 4 + s / 2 * 8, column = lane % 4 * 2 + s % 2;
    for (int k = 0; k < 16; ++k) {
      const Given &left = given[row % 8 * 4 + k % 8 / 2], &right = given[column * 4 + k % 8 / 2];
      sums[s] += half_of<T>(left.words[k / 8 * 2 + row / 8], k % 2) * half_of<T>(right.words[4 + k / 8], k % 2);
    }
  }
}

}  // namespace host

static void __syncwarp() { host::gather_warp(); }

static unsigned in_shared(const void* at) { return unsigned((const unsigned char*)at - host::memory); }
static void begin(unsigned barrier, int arrivals) { host::barriers[barrier] = {arrivals, arrivals, 0, 0}; }

static void arrive(unsigned barrier) {
  --host::barriers[barrier].pending;
  host::settle(host::barriers[barrier]);
}

static void await(unsigned barrier, int phase) {
  while ((host::barriers[barrier].phases & 1) == (phase & 1)) {
    if (!host::coming.empty()) {
      const auto copy = std::move(host::coming.front());
      host::coming.pop_front();
      copy();
    }
    host::yield();
  }
}

template <int NUMBER, int THREADS>
void meet() { host::gather(NUMBER, THREADS); }

static void publish() {}
static void open_products() {}

static void close_products() {
  auto& mine = host::later[host::running];
  mine.groups.push_back(std::move(mine.open));
  mine.open.clear();
}

template <int COUNT>
void leave_products() { host::finish_products(COUNT); }

template <int COUNT>
void await_products(float (&)[COUNT]) { host::finish_products(0); }

static unsigned long long matrix(unsigned at, unsigned across) {
  return (unsigned long long)(at >> 4) | (unsigned long long)(across >> 4) << 16 | 8ull << 32;
}

static unsigned long long swizzled(unsigned at, unsigned across = 16) {
  return (unsigned long long)(at >> 4) | (unsigned long long)(across >> 4) << 16 | 64ull << 32 | 1ull << 62;
}

static void take(unsigned (&four)[4], unsigned from) {
  const auto rows = host::shared_by_warp(from);
  const int lane = host::running % 32;
  for (int q = 0; q < 4; ++q)
    for (int e = 0; e < 2; ++e)
      memcpy((char*)&four[q] + 2 * e, host::memory + rows[q * 8 + lane % 4 * 2 + e] + lane / 4 * 2, 2);
}

static void read(unsigned (&four)[4], unsigned from) {
  const auto rows = host::shared_by_warp(from);
  const int lane = host::running % 32;
  for (int q = 0; q < 4; ++q) {
    const unsigned row = rows[q * 8 + lane / 4];
    if (row % 16) abort();
    memcpy(&four[q], host::memory + row + lane % 4 * 4, 4);
  }
}

template <int COUNT>
void put_matrices(unsigned to, const unsigned (&words)[COUNT]) {
  const auto rows = host::shared_by_warp(to);
  const int lane = host::running % 32;
  for (int q = 0; q < COUNT; ++q) memcpy(host::memory + rows[q * 8 + lane / 4] + lane % 4 * 4, &words[q], 4);
  host::gather_warp();
}

static void put(unsigned to, const unsigned (&four)[4]) { put_matrices(to, four); }

static void put(unsigned to, unsigned upper, unsigned lower) {
  const unsigned words[2] = {upper, lower};
  put_matrices(to, words);
}

// A tensor as the test hands it over, outermost dimension first: sizes and strides in elements of `size` bytes.
struct CUtensorMap {
  char* data;
  long long shape[5], stride[5], box[5], size, swizzle;
  CUtensorMap(void* given) { memcpy(this, given, sizeof *this); }

  int bytes() const { return int(box[0] * box[1] * box[2] * box[3] * box[4] * size); }

  template <typename Move>
  void each(unsigned at, std::vector<int> innermost_first, Move move) const {
    // Bulk copies begin at multiples of 16 bytes, and what is swizzled has rows of 128 bytes at multiples of 1024.
    if (at % 128 || swizzle && (box[4] * size != 128 || at % 1024) || innermost_first[0] * size % 16) abort();
    innermost_first.resize(5);
    for (long long k = 0; k < bytes() / size; ++k) {
      long long rest = k, place = 0;
      bool inside = true;
      for (int d = 4; d >= 0; rest /= box[d--]) {
        const long long i = innermost_first[4 - d] + rest % box[d];
        inside = inside && i >= 0 && i < shape[d];
        place += i * stride[d];
      }
      const unsigned here = at + unsigned(k * size);
      move(host::memory + (swizzle ? host::swizzled(here) : here), inside ? data + place * size : nullptr);
    }
  }
};

static void expect(unsigned barrier, int bytes) {
  host::barriers[barrier].bytes += bytes;
  arrive(barrier);
}

template <typename... Place>
void fetch(unsigned to, const CUtensorMap& from, unsigned barrier, Place... place) {
  from.each(to, {place...}, [&](unsigned char* here, const char*) { memset(here, 0xff, from.size); });
  host::coming.push_back([=] {
    from.each(to, {place...}, [&](unsigned char* here, const char* there) {
      there ? memcpy(here, there, from.size) : memset(here, 0, from.size);
    });
    host::barriers[barrier].bytes -= from.bytes();
    host::settle(host::barriers[barrier]);
  });
}

static void send(const CUtensorMap& to, unsigned from, int x, int y, int z) {
  host::later[host::running].sent.push_back([=] {
    to.each(from, {x, y, z}, [&](const unsigned char* here, char* there) { if (there) memcpy(there, here, to.size); });
  });
}

static void await_sent() {
  auto& mine = host::later[host::running].sent;
  for (const auto& copy : mine) copy();
  mine.clear();
}

template <typename T, int COUNT>
void settle(T (&)[COUNT]) {}

template <int COUNT>
void take_registers() {}

template <int COUNT>
void leave_registers() {}

static void await_turn(int number) { host::gather(number, 256); }
static void give_turn(int number) { host::come(number, 256); }

static float highest(float a, float b) { return a > b || a != a ? a : b; }
static float power_of_two(float x) { return exp2f(x); }
static void atomicOr(int* at, int bits) { *at |= bits; }

static unsigned pack_f16(float low, float high) { return host::pack<__half>(low, high); }
static unsigned pack_bf16(float low, float high) { return host::pack<__nv_bfloat16>(low, high); }

#define KE_MULTIPLY(DTYPE, T, ENDING, LEFT, RIGHT)                                                        \
  template <int COUNT>                                                                                    \
  void multiply_##DTYPE##ENDING(float (&sums)[COUNT], unsigned long long a, unsigned long long b, bool add) { \
    host::multiply<T>(sums, a, b, add, LEFT, RIGHT);                                                      \
  }
#define KE_MULTIPLY_TURNED(DTYPE, T)            \
  KE_MULTIPLY(DTYPE, T, , false, false)         \
  KE_MULTIPLY(DTYPE, T, _left, true, false)     \
  KE_MULTIPLY(DTYPE, T, _right, false, true)    \
  KE_MULTIPLY(DTYPE, T, _left_right, true, true)
KE_MULTIPLY_TURNED(f16, __half)
KE_MULTIPLY_TURNED(bf16, __nv_bfloat16)
KE_MULTIPLY(tf32, host::Tf32, , false, false)

template <int COUNT>
void multiply_held_f16(float (&sums)[COUNT], unsigned a, unsigned b, unsigned c, unsigned d, unsigned long long right) {
  host::multiply_held<__half>(sums, {a, b, c, d}, right);
}

template <int COUNT>
void multiply_held_bf16(float (&sums)[COUNT], unsigned a, unsigned b, unsigned c, unsigned d, unsigned long long right) {
  host::multiply_held<__nv_bfloat16>(sums, {a, b, c, d}, right);
}

static void product_f16(float (&sums)[4], unsigned a, unsigned b, unsigned c, unsigned d, unsigned e, unsigned f) {
  host::product<__half>(sums, a, b, c, d, e, f);
}

static void product_bf16(float (&sums)[4], unsigned a, unsigned b, unsigned c, unsigned d, unsigned e, unsigned f) {
  host::product<__nv_bfloat16>(sums, a, b, c, d, e, f);
}
