// Ops called from Python past torch's dispatcher: a step of a small state takes 1 us, to be found by the dispatcher 4 us.
//
// The contract is in direct.py. A call goes straight to its kernel where the dispatcher would find nothing to do on the
// way: all arguments are ordinary tensors, no mode, transform, tracer or profiler is active, no gradient may be needed.
// In any other case it is torch's own call.

#if __has_include(<Python.h>)
#include <Python.h>

#include <ATen/record_function.h>
#include <c10/core/GradMode.h>

#include <exception>

namespace direct {

using c10::DispatchKey;
using c10::DispatchKeySet;
using Kernel = void (*)(uint64_t*, uint64_t, uint64_t);  // boxed, by torch's stable C ABI

constexpr Py_ssize_t MOST = 64;
constexpr size_t SMALL = 1 << 16;  // bytes of a state whose step takes a few microseconds

// torch's own Python object of a tensor begins like this; direct.py compares it with one before it relies on it.
struct PythonTensor {
  PyObject_HEAD
  at::Tensor tensor;
};

struct Op {
  PyObject* torchs;  // torch's own way to call it
  Kernel kernel;
  Py_ssize_t arguments, outputs;
};

PyObject* (*wrapped)(const at::TensorBase&);
PyTypeObject *tensor_type, *parameter_type;

const at::Tensor& tensor(PyObject* object) { return reinterpret_cast<PythonTensor*>(object)->tensor; }

// Whether the dispatcher would end up at the CPU's kernel and do nothing before.
bool nothing_between(const Op& op, PyObject* const* arguments, Py_ssize_t count) {
  if (count != op.arguments || at::hasCallbacks()) return false;
  const auto local = c10::impl::tls_local_dispatch_key_set();
  DispatchKeySet keys = local.included_;
  for (Py_ssize_t i = 0; i < count; ++i) {
    const PyTypeObject* type = Py_TYPE(arguments[i]);
    if ((type != tensor_type && type != parameter_type) || !tensor(arguments[i]).defined()) return false;
    keys = keys | tensor(arguments[i]).key_set();
  }
  // Our ops have no kernels of their own for these; autograd's would only refuse gradients.
  DispatchKeySet passed({DispatchKey::BackendSelect, DispatchKey::ADInplaceOrView});
  if (!c10::GradMode::is_enabled()) passed = passed | c10::autograd_dispatch_keyset;
  return (keys - local.excluded_ - passed).highestPriorityTypeId() == DispatchKey::CPU;
}

PyObject* result(const Op& op, const uint64_t* stack) {
  if (op.outputs == 0) Py_RETURN_NONE;
  PyObject* out = op.outputs == 1 ? nullptr : PyTuple_New(op.outputs);
  for (Py_ssize_t i = 0; i < op.outputs; ++i) {
    auto* made = reinterpret_cast<at::Tensor*>(stack[i]);
    PyObject* object = wrapped(*made);
    delete made;
    if (op.outputs == 1) return object;
    PyTuple_SET_ITEM(out, i, object);
  }
  return out;
}

PyObject* call(PyObject* self, PyObject* const* arguments, Py_ssize_t count, PyObject* keywords) {
  const Op& op = *static_cast<Op*>(PyCapsule_GetPointer(self, nullptr));
  if (keywords != nullptr || !nothing_between(op, arguments, count)) {
    return PyObject_Vectorcall(op.torchs, arguments, count, keywords);
  }
  // The caller holds the arguments: their handles are lent (abi.h). Another reference to a tensor that Python knows is
  // counted with the lock of the interpreter held.
  uint64_t stack[MOST];
  for (Py_ssize_t i = 0; i < count; ++i) stack[i] = reinterpret_cast<uint64_t>(&tensor(arguments[i])) | 1;
  std::exception_ptr failed;
  PyThreadState* thread = tensor(arguments[0]).nbytes() < SMALL ? nullptr : PyEval_SaveThread();
  try {
    op.kernel(stack, count, op.outputs);
  } catch (...) {
    failed = std::current_exception();
  }
  if (thread != nullptr) PyEval_RestoreThread(thread);
  if (!failed) return result(op, stack);
  try {
    std::rethrow_exception(failed);
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_RuntimeError, error.what());
  }
  return nullptr;
}

PyMethodDef METHOD = {
    "direct", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(&call)), METH_FASTCALL | METH_KEYWORDS, nullptr};

}  // namespace direct

extern "C" void kvbuffer_direct_start(void* wrap, PyObject* tensor_type, PyObject* parameter_type) {
  direct::wrapped = reinterpret_cast<PyObject* (*)(const at::TensorBase&)>(wrap);
  direct::tensor_type = reinterpret_cast<PyTypeObject*>(tensor_type);
  direct::parameter_type = reinterpret_cast<PyTypeObject*>(parameter_type);
}

// A function that calls an op; it lives as long as the process, as the op does.
extern "C" PyObject* kvbuffer_direct_call(PyObject* torchs, void* kernel, Py_ssize_t arguments, Py_ssize_t outputs) {
  if (arguments > direct::MOST || outputs > direct::MOST) return Py_NewRef(torchs);
  auto* op = new direct::Op{Py_NewRef(torchs), reinterpret_cast<direct::Kernel>(kernel), arguments, outputs};
  PyObject* self = PyCapsule_New(op, nullptr, nullptr);
  return self == nullptr ? nullptr : PyCFunction_New(&direct::METHOD, self);
}
#endif
