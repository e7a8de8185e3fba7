// The ordinary tensors behind guarded states, looked up for every input of a call (guard/aliases.py has the tables).

#if __has_include(<Python.h>)
#include <Python.h>

namespace aliases {

PyTypeObject* guarded;  // the class of guarded states
PyObject* known;        // dict: id of a state -> its alias
PyObject* made;         // makes the alias of a state that has none

// A new reference to the alias of a guarded state; to any other object itself.
PyObject* plain(PyObject*, PyObject* x) {
  if (Py_TYPE(x) != guarded) return Py_NewRef(x);
  PyObject* id = PyLong_FromVoidPtr(x);
  if (id == nullptr) return nullptr;
  PyObject* found = PyDict_GetItemWithError(known, id);
  Py_XINCREF(found);
  Py_DECREF(id);
  if (found != nullptr || PyErr_Occurred()) return found;
  return PyObject_CallOneArg(made, x);
}

// plain() of every argument, as a list.
PyObject* plain_all(PyObject* self, PyObject* const* arguments, Py_ssize_t count) {
  PyObject* list = PyList_New(count);
  for (Py_ssize_t i = 0; list != nullptr && i < count; ++i) {
    PyObject* one = plain(self, arguments[i]);
    if (one == nullptr) Py_CLEAR(list);
    else PyList_SET_ITEM(list, i, one);
  }
  return list;
}

PyMethodDef PLAIN = {"plain", plain, METH_O, nullptr};
PyMethodDef PLAIN_ALL = {
    "plain_all", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(&plain_all)), METH_FASTCALL, nullptr};

}  // namespace aliases

// (plain, plain_all) for these tables.
extern "C" PyObject* kvbuffer_aliases(PyObject* guarded, PyObject* known, PyObject* made) {
  aliases::guarded = reinterpret_cast<PyTypeObject*>(Py_NewRef(guarded));
  aliases::known = Py_NewRef(known);
  aliases::made = Py_NewRef(made);
  return Py_BuildValue("(NN)", PyCFunction_New(&aliases::PLAIN, nullptr), PyCFunction_New(&aliases::PLAIN_ALL, nullptr));
}
#endif
