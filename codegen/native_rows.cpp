// h_t = a_t h_{t-1} + v_t for one row, [O, P, T, D]: a tile of steps and columns at a time, each column on its own.
//
// LOG: a = exp(gate * rate), the gate's logarithm; else the gate itself. BEFORE: h_{t-1} is read in step t, else h_t.

struct Rows {
  int64_t outer, inner, steps, columns, threads;
  View<4> gate, rate;

  explicit Rows(Arguments &a)
      : outer(a.number()), inner(a.number()), steps(a.number()), columns(a.number()), threads(a.number()),
        gate(a.view<4>()), rate(a.view<4>()) {}
};

// The tile of one operand that begins at a step.
static inline real *at(const View<4> &x, int64_t o, int64_t p, int64_t t, int64_t d) {
  return x.data + o * x.stride[0] + p * x.stride[1] + t * x.stride[2] + d * x.stride[3];
}

static inline void load(real *to, const View<4> &x, int64_t o, int64_t p, int64_t t, int64_t d, int n, int64_t w) {
  load(to, at(x, o, p, t, d), x.stride[2], x.stride[3], n, w, W);
}

static inline void store(const real *from, const View<4> &x, int64_t o, int64_t p, int64_t t, int64_t d, int n, int64_t w) {
  store(from, at(x, o, p, t, d), x.stride[2], x.stride[3], n, w, W);
}

// The decays of a tile, which begins with ones.
static inline void decays(real *__restrict a, real *__restrict scratch, const Rows &x, int64_t o, int64_t p, int64_t t, int64_t d,
                          int n, int64_t w) {
  if (!x.gate) return;
  load(a, x.gate, o, p, t, d, n, w);
  if (x.rate) {
    load(scratch, x.rate, o, p, t, d, n, w);
    for (int i = 0; i < n * W; i++) a[i] *= scratch[i];
  }
  if (!LOG) return;
#pragma omp simd
  for (int i = 0; i < n * W; i++) a[i] = exponential(a[i]);
}

template <typename Block>
static void over_blocks(const Rows &x, Block block) {
  const int64_t tiles = (x.columns + W - 1) / W, all = x.outer * x.inner * tiles;
#pragma omp parallel for num_threads(x.threads) if (x.threads > 1)
  for (int64_t i = 0; i < all; i++) {
    const int64_t d = i % tiles * W, w = x.columns - d < W ? x.columns - d : W;
    block(i / tiles / x.inner, i / tiles % x.inner, d, w);
  }
}

extern "C" void rows_forward(const int64_t *list) {
  Arguments list_of{list};
  const Rows x(list_of);
  const auto v = list_of.view<4>(), initial = list_of.view<4>(), out = list_of.view<4>(), final = list_of.view<4>();
  over_blocks(x, [&](int64_t o, int64_t p, int64_t d, int64_t w) {
    real h[W] = {}, a[C * W], values[C * W] = {}, scratch[C * W] = {};
    fill(a, 1, C * W);
    if (initial) load(h, initial, o, p, 0, d, 1, w);
    for (int64_t t = 0; t < x.steps; t += C) {
      const int n = x.steps - t < C ? x.steps - t : C;
      load(values, v, o, p, t, d, n, w);
      decays(a, scratch, x, o, p, t, d, n, w);
      for (int i = 0; i < n; i++) {
#pragma omp simd
        for (int j = 0; j < W; j++) {
          const real before = h[j], after = a[i * W + j] * before + values[i * W + j];
          values[i * W + j] = BEFORE ? before : after;
          h[j] = after;
        }
      }
      store(values, out, o, p, t, d, n, w);
    }
    store(h, final, o, p, 0, d, 1, w);
  });
}

// With D_t the gradient of h_t: dv_t = D_t, that of the decay D_t h_{t-1} (of its logarithm D_t h_{t-1} a_t), and a_t D_t goes on to
// h_{t-1}. `states` are those that the forward pass returned.
extern "C" void rows_backward(const int64_t *list) {
  Arguments list_of{list};
  const Rows x(list_of);
  const auto states = list_of.view<4>(), initial = list_of.view<4>(), grad = list_of.view<4>(), grad_final = list_of.view<4>();
  const auto dv = list_of.view<4>(), d_decay = list_of.view<4>(), d_initial = list_of.view<4>();
  over_blocks(x, [&](int64_t o, int64_t p, int64_t d, int64_t w) {
    real g[W] = {}, a[C * W], before[C * W] = {}, out[C * W], scratch[C * W] = {};
    fill(a, 1, C * W);
    fill(out, 0, C * W);
    if (grad_final) load(g, grad_final, o, p, 0, d, 1, w);
    for (int64_t end = x.steps; end > 0; end -= C) {
      const int n = end < C ? end : C;
      const int64_t t = end - n;
      decays(a, scratch, x, o, p, t, d, n, w);
      if (grad) load(out, grad, o, p, t, d, n, w);
      else fill(out, 0, C * W);
      if (d_decay && BEFORE) {
        load(before, states, o, p, t, d, n, w);
      } else if (d_decay) {
        if (t > 0) load(before, states, o, p, t - 1, d, 1, w);
        else if (initial) load(before, initial, o, p, 0, d, 1, w);
        else fill(before, 0, W);
        load(before + W, states, o, p, t, d, n - 1, w);
      }
      for (int i = n - 1; i >= 0; i--) {
#pragma omp simd
        for (int j = 0; j < W; j++) {
          const int at = i * W + j;
          const real read = out[at], whole = BEFORE ? g[j] : g[j] + read, passed = a[at] * whole;
          before[at] = LOG ? whole * before[at] * a[at] : whole * before[at];
          out[at] = whole;
          g[j] = BEFORE ? passed + read : passed;
        }
      }
      store(out, dv, o, p, t, d, n, w);
      if (d_decay) store(before, d_decay, o, p, t, d, n, w);
    }
    if (d_initial) store(g, d_initial, o, p, 0, d, 1, w);
  });
}
