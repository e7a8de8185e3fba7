// A shadow: the base in 16 bits, in units of a power of two for each row (PER_ROW) or column of the block, so that the
// largest of them lies in [2^14, 2^15). The units multiply what is read, behind the sum.

// Whether a tile reads its base, and whether its shadow is to be made. scale: 0 where there is none yet, NaN where there is
// none before the next flush.
struct Shadowed {
  bool exact, make;
  Shadowed(const Real* scale, int64_t count, bool flush, bool bare) {
    bool none = false, never = false;
    for (int64_t i = 0; i < count; ++i) none |= scale[i] == 0, never |= scale[i] != scale[i];
    exact = flush || bare || none || never;
    make = flush || (none && !bare);
  }
};
// The unit for a largest number of these bits, and one over it; NaN for inf and NaN.
INLINE void unit(int32_t bits, Real* scale, Real* inverse) {
  const int32_t exponent = bits >> 23, field = std::max(exponent - 14, 1);
  const int32_t up = exponent == 255 ? 0x7fc00000 : field << 23, down = (254 - field) << 23;
  std::memcpy(scale, &up, 4);
  std::memcpy(inverse, &down, 4);
}
INLINE int32_t magnitude(Real x) {
  int32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits & 0x7fffffff;
}
template <class T> INLINE void shade_row(const Block<Real>& s, const Block<T>& half, int64_t r, const Real* inverse, bool per_row) {
  const Real* const from = s.data + r * s.row_stride;
  T* const to = half.data + r * half.row_stride;
  int64_t c = 0;
  if (s.column_stride == 1 && half.column_stride == 1)
    for (; c + WIDTH <= s.columns; c += WIDTH)
      put<Wide>(to + c, get<Wide>(from + c) * (per_row ? splat<Wide>(*inverse) : get<Wide>(inverse + c)));
  for (; c < s.columns; ++c) put<Real>(to + c * half.column_stride, from[c * s.column_stride] * inverse[per_row ? 0 : c]);
}
template <bool PER_ROW, class T> inline void shade(const Block<Real>& s, const Block<T>& half, Real* scale) {
  if constexpr (PER_ROW) {
    for (int64_t r = 0; r < s.rows; ++r) {
      const Real* const from = s.data + r * s.row_stride;
      int32_t largest = 0;
      Real inverse;
      for (int64_t c = 0; c < s.columns; ++c) largest = std::max(largest, magnitude(from[c * s.column_stride]));
      unit(largest, scale + r, &inverse);
      shade_row(s, half, r, &inverse, true);
    }
  } else {
    alignas(64) int32_t largest[K > V ? K : V] = {};
    alignas(64) Real inverse[K > V ? K : V];
    for (int64_t r = 0; r < s.rows; ++r) {
      const Real* const from = s.data + r * s.row_stride;
      if (s.column_stride == 1)
        for (int64_t c = 0; c < s.columns; ++c) largest[c] = std::max(largest[c], magnitude(from[c]));
      else
        for (int64_t c = 0; c < s.columns; ++c) largest[c] = std::max(largest[c], magnitude(from[c * s.column_stride]));
    }
    for (int64_t c = 0; c < s.columns; ++c) unit(largest[c], scale + c, inverse + c);
    for (int64_t r = 0; r < s.rows; ++r) shade_row(s, half, r, inverse, false);
  }
}
