// Measured ceilings of this machine: the best bandwidth at several footprints and the best FMA rates.
// Trusted code, shipped with the project; compiled with the same flags as kernels.
#include <cstddef>
#include <cstdint>

typedef float Vf __attribute__((vector_size(64)));
typedef double Vd __attribute__((vector_size(64)));

// 24 independent accumulators hide the latency of two FMA pipes; 2 * 24 * lanes FLOPs an iteration.
template <class V, class T>
static T fma_chain(int64_t n, int64_t threads) {
    T sum = 0;
#pragma omp parallel for reduction(+ : sum) schedule(static) num_threads(threads)
    for (int64_t t = 0; t < threads; ++t) {
        V acc[24], a, b;
        for (int k = 0; k < 24; ++k) acc[k] = V{} + T(k + t);
        a = V{} + T(0.999);
        b = V{} + T(0.001);
        for (int64_t i = 0; i < n; ++i)
#pragma GCC unroll 24
            for (int k = 0; k < 24; ++k) acc[k] = acc[k] * a + b;
        for (int k = 0; k < 24; ++k) sum += acc[k][0];
    }
    return sum;
}

extern "C" {

// Reads n floats; the sum keeps the loads alive.
float peak_read(const float* x, int64_t n) {
    float total = 0;
#pragma omp parallel for simd reduction(+ : total) schedule(static)
    for (int64_t i = 0; i < n; ++i) total += x[i];
    return total;
}

void peak_copy(const float* x, float* y, int64_t n) {
#pragma omp parallel for simd schedule(static)
    for (int64_t i = 0; i < n; ++i) y[i] = x[i];
}

void peak_triad(const float* x, const float* z, float* y, int64_t n) {
#pragma omp parallel for simd schedule(static)
    for (int64_t i = 0; i < n; ++i) y[i] = x[i] + 1.5f * z[i];
}

float peak_fma_float(int64_t n, int64_t threads) { return fma_chain<Vf, float>(n, threads); }
double peak_fma_double(int64_t n, int64_t threads) { return fma_chain<Vd, double>(n, threads); }
}
