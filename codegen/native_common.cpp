// Recurrences on a CPU, in plain C++: what the kernels share. `real`, `RATE` and their like are written before this text.

#include <cstdint>
#include <cstring>
#include <memory>

constexpr int C = 16;  // steps of a tile
constexpr int W = 32;  // columns of a tile

static_assert(sizeof(real) == 4 || sizeof(real) == 8, "float32 or float64");
constexpr bool SINGLE = sizeof(real) == 4;

// exp(x) = 2^n e^r, r = x - n ln 2: Taylor's series, whose rest is below the rounding for |r| < 0.35. Within 1 ulp; 0, inf and NaN as
// they should be, and what is below the smallest normal number is rounded once.
static inline real exponential(real x) {
  constexpr real LOW = SINGLE ? -104 : -746, HIGH = SINGLE ? 89 : 710, LOG2_E = 1.4426950408889634;
  constexpr real LN2_HIGH = SINGLE ? 0x1.62e4p-1 : 0x1.62e42fefa38p-1;  // few enough bits for an exact product with n
  constexpr real LN2_LOW = SINGLE ? 0x1.7f7d1cp-20 : 0x1.ef35793c7673p-45;
  constexpr real ROUND = SINGLE ? 0x1.8p23 : 0x1.8p52;
  x = x < LOW ? LOW : x;
  x = x > HIGH ? HIGH : x;
  real n = (x * LOG2_E + ROUND) - ROUND;
  real r = x - n * LN2_HIGH - n * LN2_LOW;
  real p;
  if constexpr (SINGLE) {
    p = real(1. / 5040);
  } else {
    p = 1. / 6227020800;
    p = p * r + 1. / 479001600;
    p = p * r + 1. / 39916800;
    p = p * r + 1. / 3628800;
    p = p * r + 1. / 362880;
    p = p * r + 1. / 40320;
    p = p * r + 1. / 5040;
  }
  p = p * r + real(1. / 720);
  p = p * r + real(1. / 120);
  p = p * r + real(1. / 24);
  p = p * r + real(1. / 6);
  p = p * r + real(0.5);
  p = p * r + 1;
  p = p * r + 1;
  using Int = std::conditional_t<SINGLE, int32_t, int64_t>;
  constexpr int BITS = SINGLE ? 23 : 52;
  constexpr Int BIAS = SINGLE ? 127 : 1023;
  Int whole = Int(n == n ? n : 0), half = whole >> 1;  // 2^n alone may be no normal number
  Int first = (half + BIAS) << BITS, second = (whole - half + BIAS) << BITS;
  real a, b;
  std::memcpy(&a, &first, sizeof(real));
  std::memcpy(&b, &second, sizeof(real));
  return p * a * b;
}

// An operand or a result: [outer, outer, T, columns] or [B, H, T, rows, columns] by strides in elements; no data, no such tensor.
template <int N>
struct View {
  real *data;
  int64_t stride[N];
  explicit operator bool() const { return data != nullptr; }
};

// Arguments come as one list of whole numbers, in the order in which the kernels take them.
struct Arguments {
  const int64_t *next;
  int64_t number() { return *next++; }
  template <int N>
  View<N> view() {
    View<N> found;
    found.data = reinterpret_cast<real *>(number());
    for (int i = 0; i < N; i++) found.stride[i] = number();
    return found;
  }
};

// `steps` x `columns` elements, as lines of `pitch`. Where steps are neighbours in memory, each column is copied whole and then turned.
static inline void load(real *__restrict to, const real *__restrict from, int64_t by_step, int64_t by_column, int steps, int64_t columns,
                        int64_t pitch) {
  if (by_column == 1) {
    for (int t = 0; t < steps; t++) std::memcpy(to + t * pitch, from + t * by_step, columns * sizeof(real));
  } else if (by_step == 1 && by_column > 1 && steps <= C && columns <= W) {
    real turned[W * C];
    for (int64_t d = 0; d < columns; d++) std::memcpy(turned + d * C, from + d * by_column, steps * sizeof(real));
    for (int t = 0; t < steps; t++)
#pragma omp simd
      for (int64_t d = 0; d < columns; d++) to[t * pitch + d] = turned[d * C + t];
  } else {
    for (int t = 0; t < steps; t++)
      for (int64_t d = 0; d < columns; d++) to[t * pitch + d] = from[t * by_step + d * by_column];
  }
}

static inline void store(const real *__restrict from, real *__restrict to, int64_t by_step, int64_t by_column, int steps,
                         int64_t columns, int64_t pitch) {
  if (by_column == 1) {
    for (int t = 0; t < steps; t++) std::memcpy(to + t * by_step, from + t * pitch, columns * sizeof(real));
  } else if (by_step == 1 && by_column > 1 && steps <= C && columns <= W) {
    real turned[W * C];
    for (int t = 0; t < steps; t++)
#pragma omp simd
      for (int64_t d = 0; d < columns; d++) turned[d * C + t] = from[t * pitch + d];
    for (int64_t d = 0; d < columns; d++) std::memcpy(to + d * by_column, turned + d * C, steps * sizeof(real));
  } else {
    for (int t = 0; t < steps; t++)
      for (int64_t d = 0; d < columns; d++) to[t * by_step + d * by_column] = from[t * pitch + d];
  }
}

static inline void fill(real *to, real value, int64_t count) {
  for (int64_t i = 0; i < count; i++) to[i] = value;
}
