// What generated kernels call of Hopper's tensor cores, on a CPU: the arithmetic and the barriers, at once.
#pragma once

#include <stdlib.h>

#include <map>
#include <vector>

#include "cuda_host.h"

#define __grid_constant__
#define __align__(bytes)

struct alignas(16) uint4 { unsigned x, y, z, w; };

namespace host {

static unsigned char memory[232448];

// All threads that come under one number, until `count` of them have.
static void gather(int number, int count) {
  static std::map<int, std::pair<int, int>> met;  // how many wait, and how often all have come
  auto& [waiting, times] = met[number];
  const int before = times;
  if (++waiting == count) {
    waiting = 0;
    ++times;
  }
  while (met[number].second == before) yield();
}

static void gather_warp() { gather(1000 + running / 32, 32); }

struct Barrier { int arrivals, pending, phases, bytes; };
static std::map<unsigned, Barrier> barriers;

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
float half_at(unsigned at) { return float(*reinterpret_cast<const T*>(memory + at)); }

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

// 64 rows of `a` by all of `b`; rows of 16 bytes follow each other, the next eight columns lie `across` bytes on.
template <typename T, int COUNT>
void multiply(float (&sums)[COUNT], unsigned long long a, unsigned long long b, bool add) {
  const auto at = [](unsigned long long m, int row, int k) {
    const unsigned begin = (m & 0x3fff) << 4, across = (m >> 16 & 0x3fff) << 4, down = (m >> 32 & 0x3fff) << 4;
    return begin + row / 8 * down + row % 8 * 16 + k / 8 * across + k % 8 * 2;
  };
  const int thread = running % 128, lane = thread % 32;
  for (int s = 0; s < COUNT; ++s) {
    const int row = thread / 32 * 16 + lane / 4 + s / 2 % 2 * 8, column = s / 4 * 8 + lane % 4 * 2 + s % 2;
    float sum = add ? sums[s] : 0.0f;
    for (int k = 0; k < 16; ++k) sum += half_at<T>(at(a, row, k)) * half_at<T>(at(b, column, k));
    sums[s] = sum;
  }
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
  while ((host::barriers[barrier].phases & 1) == (phase & 1)) host::yield();
}

template <int NUMBER, int THREADS>
void meet() { host::gather(NUMBER, THREADS); }

static void publish() {}
static void open_products() {}
static void close_products() {}

template <int COUNT>
void await_products(float (&)[COUNT]) {}

static unsigned long long matrix(unsigned at, unsigned across) {
  return (unsigned long long)(at >> 4) | (unsigned long long)(across >> 4) << 16 | 8ull << 32;
}

static void take(unsigned (&four)[4], unsigned from) {
  const auto rows = host::shared_by_warp(from);
  const int lane = host::running % 32;
  for (int q = 0; q < 4; ++q)
    for (int e = 0; e < 2; ++e)
      memcpy((char*)&four[q] + 2 * e, host::memory + rows[q * 8 + lane % 4 * 2 + e] + lane / 4 * 2, 2);
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

// A tensor of halves of three dimensions, as the test hands it over.
struct CUtensorMap {
  unsigned short* data;
  long long shape[3], box[3];
  CUtensorMap(void* given) { memcpy(this, given, sizeof *this); }

  template <typename Move>
  void each(unsigned at, int x, int y, int z, Move move) const {
    for (long long k = 0; k < box[0] * box[1] * box[2]; ++k) {
      const long long i = z + k / (box[1] * box[2]), j = y + k / box[2] % box[1], l = x + k % box[2];
      const bool inside = i >= 0 && i < shape[0] && j >= 0 && j < shape[1] && l >= 0 && l < shape[2];
      move(reinterpret_cast<unsigned short*>(host::memory + at)[k], inside ? data + (i * shape[1] + j) * shape[2] + l : nullptr);
    }
  }
};

static void expect(unsigned barrier, int bytes) {
  host::barriers[barrier].bytes += bytes;
  arrive(barrier);
}

static void fetch(unsigned to, const CUtensorMap& from, unsigned barrier, int x, int y, int z) {
  if (x % 8 || to % 128) abort();  // bulk copies begin at multiples of 16 bytes
  from.each(to, x, y, z, [](unsigned short& here, const unsigned short* there) { here = there ? *there : 0; });
  host::barriers[barrier].bytes -= int(2 * from.box[0] * from.box[1] * from.box[2]);
  host::settle(host::barriers[barrier]);
}

static void send(const CUtensorMap& to, unsigned from, int x, int y, int z) {
  if (x % 8 || from % 128) abort();
  to.each(from, x, y, z, [](unsigned short& here, unsigned short* there) { if (there) *there = here; });
}

static void await_sent() {}

static unsigned pack_f16(float low, float high) { return host::pack<__half>(low, high); }
static unsigned pack_bf16(float low, float high) { return host::pack<__nv_bfloat16>(low, high); }

template <int COUNT>
void multiply_f16(float (&sums)[COUNT], unsigned long long a, unsigned long long b, bool add) {
  host::multiply<__half>(sums, a, b, add);
}

template <int COUNT>
void multiply_bf16(float (&sums)[COUNT], unsigned long long a, unsigned long long b, bool add) {
  host::multiply<__nv_bfloat16>(sums, a, b, add);
}

static void product_f16(float (&sums)[4], unsigned a, unsigned b, unsigned c, unsigned d, unsigned e, unsigned f) {
  host::product<__half>(sums, a, b, c, d, e, f);
}

static void product_bf16(float (&sums)[4], unsigned a, unsigned b, unsigned c, unsigned d, unsigned e, unsigned f) {
  host::product<__nv_bfloat16>(sums, a, b, c, d, e, f);
}
