// How often several storages are held, compared at every step (guard/sharing.py).

#if __has_include(<Python.h>)
#include <Python.h>

#include <c10/core/StorageImpl.h>

#include <vector>

namespace holders {

// A storage, torch's Python object of it, and how often each is held.
struct Storage {
  c10::StorageImpl* storage;
  PyObject* object;
  size_t uses;
  Py_ssize_t references;
};
using Watched = std::vector<Storage>;

size_t uses(c10::StorageImpl* storage) { return c10::raw::intrusive_ptr::use_count(storage); }

PyObject* unchanged(PyObject* self, PyObject*) {
  for (const Storage& one : *static_cast<Watched*>(PyCapsule_GetPointer(self, nullptr))) {
    if (uses(one.storage) != one.uses || Py_REFCNT(one.object) != one.references) Py_RETURN_FALSE;
  }
  Py_RETURN_TRUE;
}

PyMethodDef UNCHANGED = {"unchanged", unchanged, METH_NOARGS, nullptr};

void destroy(PyObject* capsule) { delete static_cast<Watched*>(PyCapsule_GetPointer(capsule, nullptr)); }

}  // namespace holders

// A function that says whether each storage is held as often as now. It holds none itself: the caller keeps them for as
// long. Two lists, of addresses and of Python objects; the second one's own reference to each is not counted.
extern "C" PyObject* kvbuffer_holders(PyObject* addresses, PyObject* objects) {
  auto* watched = new holders::Watched;
  for (Py_ssize_t i = 0; i < PyList_GET_SIZE(objects); ++i) {
    auto* storage = static_cast<c10::StorageImpl*>(PyLong_AsVoidPtr(PyList_GET_ITEM(addresses, i)));
    PyObject* object = PyList_GET_ITEM(objects, i);
    watched->push_back({storage, object, holders::uses(storage), Py_REFCNT(object) - 1});
  }
  PyObject* capsule = PyCapsule_New(watched, nullptr, &holders::destroy);
  if (capsule == nullptr) return nullptr;
  PyObject* function = PyCFunction_New(&holders::UNCHANGED, capsule);
  Py_DECREF(capsule);
  return function;
}
#endif
