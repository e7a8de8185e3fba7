// The state. It is seen as rows x columns, columns being the axis that is contiguous in memory if any is. A read of
// it contracts the rows ("across": one sum for each column) or the columns ("along": one sum for each row).

// `rows` x `columns` elements of the state. A bare block stands for zeros: it may be written but is not read.
// ahead: how far away the block is that this thread will most likely work on next, 0 if unknown.
template <class T> struct Block {
  T* data;
  int64_t row_stride, column_stride, rows, columns;
  bool bare;
  int64_t ahead;
};
// S <- keep_row[:, None] keep_column[None, :] S + sum over m < count of left[m] right[m]^T (left along rows).
// A null factor is 1.
struct Fold {
  int64_t count = 0;
  const Real* left = nullptr;
  int64_t left_stride = 0;
  const Real* right = nullptr;
  int64_t right_stride = 0;
  const Real* keep_row = nullptr;
  const Real* keep_column = nullptr;
};
// Runs body(i) for each item. Large work is handed out in pieces, because a flush makes some items slower and
// other programs take cores away; small work always meets the same core, which has it in its cache.
template <class F> inline void each_item(int64_t items, int threads, bool large, const F& body) {
  if (threads == 1) {
    for (int64_t i = 0; i < items; ++i) body(i);
  } else if (large) {
    const int64_t piece = std::max<int64_t>(1, items / (16 * threads));
#pragma omp parallel for schedule(dynamic, piece) num_threads(threads)
    for (int64_t i = 0; i < items; ++i) body(i);
  } else {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t i = 0; i < items; ++i) body(i);
  }
}

enum class Mode { read, fold_then_read, read_then_fold };

// One pass over a block: ACROSS reads y[i] = S^T x[i] and ALONG reads w[i] = S z[i], and a fold before or after them.
// prefetch: which groups of four rows of the block ahead to ask for meanwhile, a bit for each of four in turn. Passes
// that find the block in the cache, or that are bound by arithmetic, leave the memory idle otherwise: asking for a half
// in each of two passes took a plain Gated DeltaNet step from 1.46 to 1.27 times the time of a copy; every second line
// is enough (lines come in pairs), and more of them only block the core.
template <class T, Mode MODE, int ACROSS, int ALONG> struct Pass {
  static constexpr int NX = ACROSS ? ACROSS : 1, NZ = ALONG ? ALONG : 1;
  static constexpr int COLUMNS = MODE == Mode::read ? 2 : 4;  // Wides per step: a fold re-uses its factors that often
  Block<T> s;
  unsigned prefetch;
  Fold fold;
  const Real* x[NX];
  Real* y[NX];
  const Real* z[NZ];
  Real* w[NZ];

  template <int U, int N, class X> INLINE void apply_fold(int64_t r, int64_t c, X (&v)[U][N]) const {
    constexpr int step = sizeof(X) / sizeof(Real);
    UNROLL for (int u = 0; u < U; ++u)
      UNROLL for (int n = 0; n < N; ++n) {
        if (fold.keep_row) v[u][n] *= splat<X>(fold.keep_row[r + u]);
        if (fold.keep_column) v[u][n] *= get<X>(fold.keep_column + c + n * step);
      }
    for (int64_t m = 0; m < fold.count; ++m) {
      const Real *left = fold.left + m * fold.left_stride + r, *right = fold.right + m * fold.right_stride + c;
      X row[N];
      UNROLL for (int n = 0; n < N; ++n) row[n] = get<X>(right + n * step);
      UNROLL for (int u = 0; u < U; ++u) UNROLL for (int n = 0; n < N; ++n) v[u][n] += splat<X>(left[u]) * row[n];
    }
  }
  template <int U, int N, class X> INLINE void apply_reads(int64_t r, int64_t c, const X (&v)[U][N], X (&sums)[NZ][U]) const {
    constexpr int step = sizeof(X) / sizeof(Real);
    UNROLL for (int n = 0; n < N; ++n) {
      UNROLL for (int i = 0; i < ACROSS; ++i) {
        X out = get<X>(y[i] + c + n * step);
        UNROLL for (int u = 0; u < U; ++u) out += splat<X>(x[i][r + u]) * v[u][n];
        put(y[i] + c + n * step, out);
      }
      UNROLL for (int i = 0; i < ALONG; ++i) {
        const X at = get<X>(z[i] + c + n * step);
        UNROLL for (int u = 0; u < U; ++u) sums[i][u] += at * v[u][n];
      }
    }
  }
  template <int U, int N, class X> INLINE void cell(int64_t r, int64_t c, bool ask, X (&sums)[NZ][U]) const {
    constexpr int step = sizeof(X) / sizeof(Real);
    T* at = s.data + r * s.row_stride + c * s.column_stride;
    X v[U][N];
    if (ask)
      UNROLL for (int u = 0; u < U; ++u)
        for (int n = 0; n < N; n += 2) __builtin_prefetch(at + u * s.row_stride + n * step + s.ahead, 0, 2);
    UNROLL for (int u = 0; u < U; ++u)
      UNROLL for (int n = 0; n < N; ++n) v[u][n] = s.bare ? X{} : get<X>(at + u * s.row_stride + n * step);
    if constexpr (MODE != Mode::fold_then_read) apply_reads<U, N, X>(r, c, v, sums);
    if constexpr (MODE == Mode::read) return;
    apply_fold<U, N, X>(r, c, v);
    UNROLL for (int u = 0; u < U; ++u) UNROLL for (int n = 0; n < N; ++n) put(at + u * s.row_stride + n * step, v[u][n]);
    if constexpr (MODE == Mode::fold_then_read) apply_reads<U, N, X>(r, c, v, sums);
  }
  template <int U> INLINE void rows(int64_t r) const {
    const bool ask = s.ahead && (prefetch >> (r / 4 % 4) & 1);
    Wide wide[NZ][U] = {};
    Real tail[NZ][U] = {};
    const int64_t whole = s.column_stride == 1 ? s.columns : 0;
    int64_t c = 0;
    for (; c + COLUMNS * WIDTH <= whole; c += COLUMNS * WIDTH) cell<U, COLUMNS, Wide>(r, c, ask, wide);
    for (; c + WIDTH <= whole; c += WIDTH) cell<U, 1, Wide>(r, c, false, wide);
    for (; c < s.columns; ++c) cell<U, 1, Real>(r, c, false, tail);
    UNROLL for (int i = 0; i < ALONG; ++i) {
      totals<U, Wide>(wide[i], w[i] + r);
      UNROLL for (int u = 0; u < U; ++u) w[i][r + u] += tail[i][u];
    }
  }
  void run() const {
    for (int i = 0; i < ACROSS; ++i) std::memset(y[i], 0, s.columns * sizeof(Real));
    if (MODE == Mode::read && s.bare) {
      for (int i = 0; i < ALONG; ++i) std::memset(w[i], 0, s.rows * sizeof(Real));
      return;
    }
    int64_t r = 0;
    for (; r + 4 <= s.rows; r += 4) rows<4>(r);
    for (; r < s.rows; ++r) rows<1>(r);
  }
};

// A run-time number of reads in one pass over a block, after a fold if there is one. Query j is x + j * x_stride, its
// result y + j * y_stride. Every group of rows is fetched once and serves the reads four by four.
struct Reads {
  int64_t count;
  const Real* x;
  int64_t x_stride;
  Real* y;
  int64_t y_stride;
};
template <int U, class T, int ACROSS, int ALONG> INLINE void read_rows_of(const Block<T>& s, int64_t r, const Reads& reads, int64_t j) {
  constexpr int N = ACROSS + ALONG;
  Pass<T, Mode::read, ACROSS, ALONG> pass{s, 0, {}, {}, {}, {}, {}};
  UNROLL for (int i = 0; i < N; ++i) {
    (ACROSS ? pass.x : pass.z)[i] = reads.x + (j + i) * reads.x_stride;
    (ACROSS ? pass.y : pass.w)[i] = reads.y + (j + i) * reads.y_stride;
  }
  pass.template rows<U>(r);
}
template <int U, class T>
INLINE void read_group(const Block<T>& s, bool fold_first, const Fold& fold, int64_t r, const Reads& across, const Reads& along) {
  if (fold_first) Pass<T, Mode::fold_then_read, 0, 0>{s, 0b1111, fold, {}, {}, {}, {}}.template rows<U>(r);
  else if (s.bare) return;
  Block<T> written = s;
  written.bare = false;
  int64_t j = 0;
  for (; j + 4 <= across.count; j += 4) read_rows_of<U, T, 4, 0>(written, r, across, j);
  for (; j < across.count; ++j) read_rows_of<U, T, 1, 0>(written, r, across, j);
  for (j = 0; j + 2 <= along.count; j += 2) read_rows_of<U, T, 0, 2>(written, r, along, j);
  for (; j < along.count; ++j) read_rows_of<U, T, 0, 1>(written, r, along, j);
}
template <class T>
inline void read_many(const Block<T>& s, bool fold_first, const Fold& fold, const Reads& across, const Reads& along) {
  for (int64_t j = 0; j < across.count; ++j) std::memset(across.y + j * across.y_stride, 0, s.columns * sizeof(Real));
  for (int64_t j = 0; j < along.count; ++j) std::memset(along.y + j * along.y_stride, 0, s.rows * sizeof(Real));
  int64_t r = 0;
  for (; r + 4 <= s.rows; r += 4) read_group<4>(s, fold_first, fold, r, across, along);
  for (; r < s.rows; ++r) read_group<1>(s, fold_first, fold, r, across, along);
}
