// S_t = A_t * S_{t-1} + k_t v_t^T for states of K rows, [B, H, T, K, D]: a tile of steps and columns at a time, which is on its own
// but for what is summed over columns.
//
// ROWS, COLUMNS: the decay differs from row to row, from column to column. BEFORE: q reads S_{t-1} in step t, and q_t . (bonus k_t)
// weighs v_t; else S_t.

constexpr bool FULL = ROWS && COLUMNS;

struct Steps {
  int64_t batch, heads, steps, rows, columns, group, threads;
  bool ones;  // the last column of v is not in memory: it is 1
  View<4> v, q, k, bonus;
  View<5> gate, rate;
  View<4> initial;

  explicit Steps(Arguments &a)
      : batch(a.number()), heads(a.number()), steps(a.number()), rows(a.number()), columns(a.number()), group(a.number()),
        threads(a.number()), ones(a.number()), v(a.view<4>()), q(a.view<4>()), k(a.view<4>()), bonus(a.view<4>()),
        gate(a.view<5>()), rate(a.view<5>()), initial(a.view<4>()) {}
};

// Which columns of which head a thread is at.
struct Place {
  int64_t b, h, d, w;
};

static inline real *at(const View<4> &x, int64_t b, int64_t h, int64_t t, int64_t d) {
  return x.data + b * x.stride[0] + h * x.stride[1] + t * x.stride[2] + d * x.stride[3];
}

// Steps of q, k, bonus or their gradients, [n, K].
static inline void load_rows(real *to, const View<4> &x, int64_t b, int64_t h, int64_t t, int n, int64_t rows) {
  load(to, at(x, b, h, t, 0), x.stride[2], x.stride[3], n, rows, rows);
}

// Steps of v or its like, [n, W].
static inline void load_columns(real *to, const View<4> &x, const Place &p, int64_t t, int n, int64_t w) {
  load(to, at(x, p.b, p.h, t, p.d), x.stride[2], x.stride[3], n, w, W);
}

static inline void store_columns(const real *from, const View<4> &x, const Place &p, int64_t t, int n, int64_t w) {
  store(from, at(x, p.b, p.h, t, p.d), x.stride[2], x.stride[3], n, w, W);
}

// A tile of gate or rate, [n|1, K|1, W|1]; steps and rows are `by_step` and `by_row` apart.
struct Gate {
  std::unique_ptr<real[]> data;
  int64_t by_step, by_row;
  int steps, rows, columns;

  Gate(const View<5> &x, int64_t k) : steps(x && x.stride[2] ? C : 1), rows(x && x.stride[3] ? k : 1), columns(COLUMNS ? W : 1) {
    by_row = rows > 1 ? columns : 0;
    by_step = steps > 1 ? int64_t(rows) * columns : 0;
    data.reset(new real[int64_t(steps) * rows * columns]);
    fill(data.get(), 1, int64_t(steps) * rows * columns);
  }
  void load(const View<5> &x, const Place &p, int64_t t, int n) {
    if (!x || (steps == 1 && t > 0)) return;
    const real *from = x.data + p.b * x.stride[0] + p.h * x.stride[1] + t * x.stride[2] + p.d * x.stride[4];
    for (int i = 0; i < rows; i++)
      ::load(data.get() + i * columns, from + i * x.stride[3], x.stride[2], x.stride[4], steps == 1 ? 1 : n, COLUMNS ? p.w : 1,
             int64_t(rows) * columns);
  }
  const real *line(int t, int64_t i) const { return data.get() + t * by_step + i * by_row; }
};

// The tile's operands.
struct Tile {
  std::unique_ptr<real[]> v{new real[C * W]()}, q, k, bonus, decays;
  Gate gate, rate;
  const int64_t rows;
  const bool alike;  // one decay for all rows

  explicit Tile(const Steps &x)
      : q(new real[C * x.rows]), k(new real[C * x.rows]), bonus(new real[C * x.rows]), decays(new real[C * (COLUMNS ? W : x.rows)]),
        gate(x.gate, x.rows), rate(x.rate, x.rows), rows(x.rows), alike(gate.rows == 1 && rate.rows == 1) {}

  void load(const Steps &x, const Place &p, int64_t t, int n) {
    const int64_t w = x.ones && p.d + p.w == x.columns ? p.w - 1 : p.w;
    load_columns(v.get(), x.v, p, t, n, w);
    for (int i = 0; i < n && w < p.w; i++) v[i * W + w] = 1;
    load_rows(q.get(), x.q, p.b, p.h / x.group, t, n, rows);
    load_rows(k.get(), x.k, p.b, p.h / x.group, t, n, rows);
    if (x.bonus) load_rows(bonus.get(), x.bonus, p.b, p.h, t, n, rows);
    gate.load(x.gate, p, t, n);
    rate.load(x.rate, p, t, n);
    if (!FULL) find_decays(n, bool(x.gate));
  }

  // Those of a row for each step, or of a column; where they differ along both, they are found as they are used.
  void find_decays(int n, bool gated) {
    const int64_t each = COLUMNS ? W : alike ? 1 : rows;
    for (int t = 0; t < n; t++)
      for (int64_t i = 0; i < each; i++) {
        const int64_t row = COLUMNS ? 0 : i, column = COLUMNS ? i : 0;
        decays[t * each + i] = gate.line(t, row)[column] * rate.line(t, row)[column];
      }
#pragma omp simd
    for (int64_t i = 0; i < n * each; i++) decays[i] = gated ? exponential(decays[i]) : 1;
  }

  inline real decay(int t, int64_t i, int j, const real *g, const real *r) const {
    if constexpr (FULL) return exponential(g[j] * r[j]);
    else if constexpr (COLUMNS) return decays[t * W + j];
    else return decays[alike ? t : t * rows + i];
  }

  // q . (bonus k), the weight of v in what is read.
  real weight(int t) const {
    real sum = 0;
    for (int64_t i = 0; i < rows; i++) sum += q[t * rows + i] * bonus[t * rows + i] * k[t * rows + i];
    return sum;
  }
};

static inline void load_state(real *to, const View<4> &x, const Place &p, int64_t rows) {
  for (int64_t i = 0; i < rows * W; i++) to[i] = 0;
  if (x) load(to, at(x, p.b, p.h, 0, p.d), x.stride[2], x.stride[3], rows, p.w, W);
}

static inline void store_state(const real *from, const View<4> &x, const Place &p, int64_t rows) {
  store(from, at(x, p.b, p.h, 0, p.d), x.stride[2], x.stride[3], rows, p.w, W);
}

template <typename Work>
static void over_places(const Steps &x, Work work) {
  const int64_t tiles = (x.columns + W - 1) / W, all = x.batch * x.heads * tiles;
#pragma omp parallel for num_threads(x.threads) if (x.threads > 1)
  for (int64_t i = 0; i < all; i++) {
    const int64_t d = i % tiles * W;
    work(Place{i / tiles / x.heads, i / tiles % x.heads, d, x.columns - d < W ? x.columns - d : W});
  }
}

extern "C" void steps_forward(const int64_t *list) {
  Arguments list_of{list};
  const Steps x(list_of);
  const auto out = list_of.view<4>(), final = list_of.view<4>();
  over_places(x, [&](const Place &p) {
    Tile tile(x);
    std::unique_ptr<real[]> state(new real[x.rows * W]), found(new real[C * W]);
    load_state(state.get(), x.initial, p, x.rows);
    for (int64_t t = 0; t < x.steps; t += C) {
      const int n = x.steps - t < C ? x.steps - t : C;
      tile.load(x, p, t, n);
      for (int step = 0; step < n; step++) {
        const real *v = tile.v.get() + step * W;
        const real first = x.bonus ? tile.weight(step) : 0;
        real o[W];
        for (int j = 0; j < W; j++) o[j] = first * v[j];
        for (int64_t i = 0; i < x.rows; i++) {
          const real k = tile.k[step * x.rows + i], q = tile.q[step * x.rows + i];
          const real *g = tile.gate.line(step, i), *r = tile.rate.line(step, i);
          real *__restrict s = state.get() + i * W;
#pragma omp simd
          for (int j = 0; j < W; j++) {
            const real before = s[j], after = tile.decay(step, i, j, g, r) * before + k * v[j];
            s[j] = after;
            o[j] += q * (BEFORE ? before : after);
          }
        }
        std::memcpy(found.get() + step * W, o, sizeof(o));
      }
      store_columns(found.get(), out, p, t, n, p.w);
    }
    store_state(state.get(), final, p, x.rows);
  });
}

// The gradient of gate or rate, [n|1, K|1, W|1] in a tile; of one that is the same for all steps it is summed in float64.
struct Gradient {
  std::unique_ptr<real[]> data;
  std::unique_ptr<double[]> sum;
  const int64_t columns, count, by_step, by_row;
  const bool once, across;  // one for all steps, for all columns

  Gradient(const Gate &x, bool across)
      : columns(x.columns), count(int64_t(x.rows) * x.columns), by_step(x.by_step), by_row(x.by_row), once(x.steps == 1), across(across) {
    data.reset(new real[x.steps * count]);
    sum.reset(once ? new double[count]() : nullptr);
  }
  void begin(int n) { fill(data.get(), 0, (once ? 1 : n) * count); }
  real *line(int t, int64_t i) { return data.get() + t * by_step + i * by_row; }

  // A tile's steps are done.
  void end(const View<5> &x, const Place &p, int64_t t, int n) {
    if (!x) return;
    if (!once) return write(x, p, t, n, data.get());
    for (int64_t i = 0; i < count; i++) sum[i] += data[i];
  }
  void finish(const View<5> &x, const Place &p) {
    if (x && once) write(x, p, 0, 1, sum.get());
  }

 private:
  template <typename T>
  void write(const View<5> &x, const Place &p, int64_t t, int n, const T *from) {
    for (int step = 0; step < n; step++)
      for (int64_t i = 0; i < count / columns; i++, from += columns) {
        real *to = x.data + p.b * x.stride[0] + p.h * x.stride[1] + (t + step) * x.stride[2] + i * x.stride[3];
        if (across) {
          T total = 0;
          for (int j = 0; j < columns; j++) total += from[j];  // beyond the last column they are 0
          to[p.d / W * x.stride[4]] = total;
        } else {
          for (int j = 0; j < p.w; j++) to[(p.d + j) * x.stride[4]] = from[j];
        }
      }
  }
};

// What a backward pass of one place works on: the states before each step of a tile and after its last, and decays of columns.
struct History {
  std::unique_ptr<real[]> states, decays, entries;
  const int64_t rows;

  explicit History(const Steps &x)
      : states(new real[(C + 1) * x.rows * W]), decays(COLUMNS ? new real[C * x.rows * W] : nullptr), entries(new real[((x.steps + C - 1) / C) * x.rows * W]),
        rows(x.rows) {}

  real *state(int step) { return states.get() + step * rows * W; }
  real *entry(int64_t t) { return entries.get() + t / C * rows * W; }

  // Take the steps of a tile from the state that enters it.
  void advance(const Tile &tile, int64_t t, int n) {
    std::memcpy(state(0), entry(t), rows * W * sizeof(real));
    for (int step = 0; step < n; step++)
      for (int64_t i = 0; i < rows; i++) {
        const real k = tile.k[step * rows + i];
        const real *v = tile.v.get() + step * W, *g = tile.gate.line(step, i), *r = tile.rate.line(step, i);
        const real *__restrict before = state(step) + i * W;
        real *__restrict after = state(step + 1) + i * W, *__restrict a = COLUMNS ? decays.get() + (step * rows + i) * W : nullptr;
#pragma omp simd
        for (int j = 0; j < W; j++) {
          const real decay = tile.decay(step, i, j, g, r);
          after[j] = decay * before[j] + k * v[j];
          if (COLUMNS) a[j] = decay;
        }
      }
  }
};

struct Results {
  View<4> v;
  View<5> q, k, bonus;  // for each tile of columns: [tiles, B, H, T, K], K dense
  View<5> gate, rate;  // the last dimension is that of tiles where all columns share one
  bool gate_across, rate_across;
  View<4> initial;

  explicit Results(Arguments &a)
      : v(a.view<4>()), q(a.view<5>()), k(a.view<5>()), bonus(a.view<5>()), gate(a.view<5>()), rate(a.view<5>()),
        gate_across(a.number()), rate_across(a.number()), initial(a.view<4>()) {}
};

static inline real *line_of(const View<5> &x, const Place &p, int64_t t) {
  if (!x) return nullptr;
  return x.data + p.d / W * x.stride[0] + p.b * x.stride[1] + p.h * x.stride[2] + t * x.stride[3];
}

// One step backwards. On entry `ds` is the gradient of the state after it, but for what is read there; on return that of the state
// before it.
static inline void step_back(const Steps &x, const Tile &tile, History &past, int step, const real *__restrict g, real *__restrict ds,
                             real *__restrict dv, real *__restrict dq, real *__restrict dk, real *__restrict db, Gradient &d_gate,
                             Gradient &d_rate) {
  const real *v = tile.v.get() + step * W;
  real weight = 0, gv = 0;
  if (x.bonus) {
    weight = tile.weight(step);
#pragma omp simd reduction(+ : gv)
    for (int j = 0; j < W; j++) gv += g[j] * v[j];
  }
  for (int j = 0; j < W; j++) dv[j] = weight * g[j];
  for (int64_t i = 0; i < x.rows; i++) {
    const real q = tile.q[step * x.rows + i], k = tile.k[step * x.rows + i];
    const real *before = past.state(step) + i * W, *after = past.state(step + 1) + i * W;
    const real *a = COLUMNS ? past.decays.get() + (step * x.rows + i) * W : tile.decays.get() + (tile.alike ? step : step * x.rows + i);
    const real *gate = tile.gate.line(step, i), *rate = tile.rate.line(step, i);
    real *__restrict own = ds + i * W, *__restrict to_gate = d_gate.line(step, i), *__restrict to_rate = d_rate.line(step, i);
    real q_sum = 0, k_sum = 0, change_sum = 0, change[W];
#pragma omp simd reduction(+ : q_sum, k_sum, change_sum)
    for (int j = 0; j < W; j++) {
      const real decay = COLUMNS ? a[j] : a[0], read = q * g[j], whole = BEFORE ? own[j] : own[j] + read;
      dv[j] += k * whole;
      k_sum += v[j] * whole;
      q_sum += g[j] * (BEFORE ? before[j] : after[j]);
      change[j] = whole * before[j] * decay;  // of the decay's logarithm
      if (!COLUMNS) change_sum += change[j];
      own[j] = decay * whole + (BEFORE ? read : 0);
    }
    if (COLUMNS) {
#pragma omp simd
      for (int j = 0; j < W; j++) to_gate[j] += change[j] * rate[j];
      if (x.rate) {
#pragma omp simd
        for (int j = 0; j < W; j++) to_rate[j] += change[j] * gate[j];
      }
    } else if (x.gate) {
      to_gate[0] += change_sum * rate[0];
      to_rate[0] += change_sum * gate[0];
    }
    if (x.bonus) {
      const real b = tile.bonus[step * x.rows + i];
      db[i] = gv * q * k;
      q_sum += gv * b * k;
      k_sum += gv * b * q;
    }
    dq[i] = q_sum;
    dk[i] = k_sum;
  }
}

// The state before each tile.
static void find_entries(const Steps &x, const Place &p, Tile &tile, History &past) {
  load_state(past.entry(0), x.initial, p, x.rows);
  for (int64_t t = 0; t + C < x.steps; t += C) {
    tile.load(x, p, t, C);
    past.advance(tile, t, C);
    std::memcpy(past.entry(t + C), past.state(C), x.rows * W * sizeof(real));
  }
}

extern "C" void steps_backward(const int64_t *list) {
  Arguments list_of{list};
  const Steps x(list_of);
  const auto grad = list_of.view<4>(), grad_final = list_of.view<4>();
  const Results to(list_of);
  over_places(x, [&](const Place &p) {
    Tile tile(x);
    History past(x);
    Gradient d_gate(tile.gate, to.gate_across), d_rate(tile.rate, to.rate_across);
    std::unique_ptr<real[]> ds(new real[x.rows * W]), g(new real[C * W]()), dv(new real[C * W]);
    find_entries(x, p, tile, past);
    load_state(ds.get(), grad_final, p, x.rows);
    for (int64_t t = (x.steps - 1) / C * C; t >= 0; t -= C) {
      const int n = x.steps - t < C ? x.steps - t : C;
      tile.load(x, p, t, n);
      past.advance(tile, t, n);
      if (grad) load_columns(g.get(), grad, p, t, n, p.w);
      d_gate.begin(n);
      d_rate.begin(n);
      for (int step = n - 1; step >= 0; step--)
        step_back(x, tile, past, step, g.get() + step * W, ds.get(), dv.get() + step * W, line_of(to.q, p, t + step),
                  line_of(to.k, p, t + step), line_of(to.bonus, p, t + step), d_gate, d_rate);
      store_columns(dv.get(), to.v, p, t, n, p.w);
      d_gate.end(to.gate, p, t, n);
      d_rate.end(to.rate, p, t, n);
    }
    d_gate.finish(to.gate, p);
    d_rate.finish(to.rate, p);
    if (to.initial) store_state(ds.get(), to.initial, p, x.rows);
  });
}
