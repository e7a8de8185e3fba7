// The part of PyTorch's stable C ABI that a step needs, declared by hand: with torch's own headers a kernel takes 2.5 s
// to compile, without them 0.5 s. Every name below is exported by torch >= 2.9.
extern "C" {
struct AtenTensorOpaque;
struct TorchLibraryOpaque;
int32_t aoti_torch_delete_tensor_object(AtenTensorOpaque*);
int32_t aoti_torch_get_data_ptr(AtenTensorOpaque*, void**);
int32_t aoti_torch_get_dim(AtenTensorOpaque*, int64_t*);
int32_t aoti_torch_get_sizes(AtenTensorOpaque*, int64_t**);
int32_t aoti_torch_get_strides(AtenTensorOpaque*, int64_t**);
int32_t aoti_torch_get_dtype(AtenTensorOpaque*, int32_t*);
int32_t aoti_torch_empty_strided(int64_t, const int64_t*, const int64_t*, int32_t, int32_t, int32_t, AtenTensorOpaque**);
int32_t aoti_torch_dtype_float32();
int32_t aoti_torch_dtype_float64();
int32_t aoti_torch_dtype_bfloat16();
int32_t aoti_torch_dtype_float16();
int32_t aoti_torch_dtype_int32();
int32_t aoti_torch_dtype_int64();
int32_t aoti_torch_device_type_cpu();
int32_t aoti_torch_library_init_impl(const char*, const char*, const char*, uint32_t, TorchLibraryOpaque**);
int32_t aoti_torch_library_impl(TorchLibraryOpaque*, const char*, void (*)(uint64_t*, uint64_t, uint64_t));
}

[[noreturn]] inline void fail(const std::string& what) { throw std::runtime_error("kvbuffer " OP_NAME ": " + what); }
inline void check(bool ok, const char* name, const char* what) {
  if (!ok) fail(std::string(name) + " " + what);
}
inline void done(int32_t error) {
  if (error) fail("a call into torch failed");
}

// An argument taken from the stack: its reference is given back at the end of the step, also after an error, unless it
// was only lent (native/direct.cpp marks such handles by their last bit).
struct Argument {
  AtenTensorOpaque* handle;
  bool lent;
  explicit Argument(uint64_t slot) : lent(slot & 1) {
    slot &= ~uint64_t(1);
    std::memcpy(&handle, &slot, sizeof handle);
  }
  Argument(const Argument&) = delete;
  ~Argument() { if (!lent) aoti_torch_delete_tensor_object(handle); }
  int64_t dims() const { int64_t n; done(aoti_torch_get_dim(handle, &n)); return n; }
  const int64_t* sizes() const { int64_t* p; done(aoti_torch_get_sizes(handle, &p)); return p; }
  const int64_t* strides() const { int64_t* p; done(aoti_torch_get_strides(handle, &p)); return p; }
  int32_t type() const { int32_t t; done(aoti_torch_get_dtype(handle, &t)); return t; }
  template <class T> T* data() const { void* p; done(aoti_torch_get_data_ptr(handle, &p)); return static_cast<T*>(p); }
};
inline Dtype dtype_of(const Argument& t, const char* name) {
  const int32_t type = t.type();
  if (type == aoti_torch_dtype_float32()) return Dtype::f32;
  if (type == aoti_torch_dtype_bfloat16()) return Dtype::bf16;
#ifdef __FLT16_MAX__
  if (type == aoti_torch_dtype_float16()) return Dtype::f16;
#else
  if (type == aoti_torch_dtype_float16()) fail("this compiler has no float16");
#endif
  if (type == aoti_torch_dtype_float64()) return Dtype::f64;
  fail(std::string(name) + " must be a floating point tensor");
}
inline uint64_t new_tensor(const int64_t* sizes, int64_t dims, Real** data) {
  int64_t strides[LANES + 2], step = 1;
  for (int64_t d = dims - 1; d >= 0; --d) strides[d] = step, step *= sizes[d];
  const int32_t type = sizeof(Real) == 8 ? aoti_torch_dtype_float64() : aoti_torch_dtype_float32();
  AtenTensorOpaque* handle;
  done(aoti_torch_empty_strided(dims, sizes, strides, type, aoti_torch_device_type_cpu(), 0, &handle));
  void* p;
  done(aoti_torch_get_data_ptr(handle, &p));
  *data = static_cast<Real*>(p);
  uint64_t slot = 0;
  std::memcpy(&slot, &handle, sizeof handle);
  return slot;
}

// ----------------------------------------------------------------------------------------------- views

constexpr int AXES = LANES ? LANES : 1;
// A tensor over the lanes: strides in elements, 0 along a lane of size 1; `slot` and `last` are 0 where it has no such axis.
struct View {
  void* data = nullptr;
  Dtype dtype = Dtype::f32;
  int64_t lane[AXES] = {}, slot = 0, last = 0;
  INLINE int64_t at(const int64_t* lanes) const {
    int64_t offset = 0;
    for (int i = 0; i < LANES; ++i) offset += lanes[i] * lane[i];
    return offset;
  }
};
// Reads sizes and strides of t: [lanes..., (slots,) (size)], after `skip` leading dims of size 1. -1 stands for no axis.
inline View view(const Argument& t, const char* name, const int64_t* lanes, int64_t skip, int64_t slots, int64_t size) {
  View v;
  v.data = t.data<void>();
  v.dtype = dtype_of(t, name);
  check(t.dims() == skip + LANES + (slots >= 0) + (size >= 0), name, "has the wrong number of dims");
  const int64_t *sizes = t.sizes() + skip, *strides = t.strides() + skip;
  for (int i = 0; i < LANES; ++i) {
    check(sizes[i] == lanes[i] || sizes[i] == 1, name, "has a lane that is neither full nor of size 1");
    v.lane[i] = sizes[i] == 1 ? 0 : strides[i];
  }
  int d = LANES;
  if (slots >= 0) check(sizes[d] == slots, name, "has the wrong capacity"), v.slot = strides[d++];
  if (size >= 0) check(sizes[d] == size, name, "has the wrong width"), v.last = strides[d];
  return v;
}
// n numbers of a view, from `start` along its last axis.
inline void load(Real* out, const View& v, int64_t offset, int64_t start, int64_t n) {
  offset += start * v.last;
  switch (v.dtype) {
    case Dtype::f32: return convert(out, static_cast<const float*>(v.data) + offset, v.last, n);
    case Dtype::f64: return convert(out, static_cast<const double*>(v.data) + offset, v.last, n);
    case Dtype::bf16: return convert(out, static_cast<const Bf16*>(v.data) + offset, v.last, n);
    case Dtype::f16: return convert(out, static_cast<const F16*>(v.data) + offset, v.last, n);
  }
}
INLINE Real load_one(const View& v, int64_t offset) {
  Real out;
  load(&out, v, offset, 0, 1);
  return out;
}
