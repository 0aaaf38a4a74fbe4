// The short way of an eager call on plain tensors, in C: asked in Python, the same questions cost the host a quarter of
// a small call. dwconv/autograd.py says what to ask and whom to call, once; anything unusual is left to the long way.
#include "short_way.h"

#include <array>

#include "packed_geometry.h"

namespace dwconv {
namespace {

// What `prepare` was given; alive for good.
struct ShortWay {
  PyObject *tensor_types, *dtypes;  // the plain ones, in tuples
  PyObject* cast_dtypes;            // those of weights that are cast
  PyObject* occasions;              // functions: where one says so, other things than tensors have a say
  PyObject* forward_ad;             // the module that knows the level of forward-mode AD
  PyObject* is_grad_enabled;
  PyObject *without_grad, *with_grad;  // called with (input, weight, bias, geometry)
} known{};

// One reference, given back at the end.
class Owned {
 public:
  explicit Owned(PyObject* object) : object_(object) {}
  Owned(const Owned&) = delete;
  Owned& operator=(const Owned&) = delete;
  ~Owned() { Py_XDECREF(object_); }
  PyObject* get() const { return object_; }

 private:
  PyObject* object_;
};

// Thrown where Python has an exception set.
struct PythonError {};

bool is_one_of(PyObject* object, PyObject* tuple) {
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(tuple); ++i)
    if (PyTuple_GET_ITEM(tuple, i) == object) return true;
  return false;
}

bool is_plain(PyObject* object) {
  return is_one_of(reinterpret_cast<PyObject*>(Py_TYPE(object)), known.tensor_types);
}

bool is_true(const Owned& answer) {
  const int truth = answer.get() ? PyObject_IsTrue(answer.get()) : -1;
  if (truth < 0) throw PythonError();
  return truth != 0;
}

bool says(PyObject* function) {
  return is_true(Owned(PyObject_CallNoArgs(function)));
}

PyObject* name(const char* text) {
  return PyUnicode_InternFromString(text);
}

bool requires_grad(PyObject* tensor) {
  static PyObject* const attribute = name("requires_grad");
  return is_true(Owned(PyObject_GetAttr(tensor, attribute)));
}

long integer(PyObject* object, PyObject* attribute) {
  const Owned value(PyObject_GetAttr(object, attribute));
  const long number = value.get() ? PyLong_AsLong(value.get()) : -1;
  if (number == -1 && PyErr_Occurred()) throw PythonError();
  return number;
}

// Whether `value` is an int or a pair of them, as small as PackedGeometry has them.
bool read_pair(PyObject* value, int64_t* pair) {
  const bool is_pair = PyTuple_CheckExact(value) && PyTuple_GET_SIZE(value) == 2;
  for (int side = 0; side < 2; ++side) {
    PyObject* const number = is_pair ? PyTuple_GET_ITEM(value, side) : value;
    if (!PyLong_CheckExact(number)) return false;
    int overflow = 0;
    pair[side] = PyLong_AsLongAndOverflow(number, &overflow);
    if (overflow != 0 || pair[side] < 0 || pair[side] > PackedGeometry::kLargest) return false;
  }
  return true;
}

bool has_dtype_of(PyObject* tensor, PyObject* tuple) {
  static PyObject* const dtype = name("dtype");
  const Owned found(PyObject_GetAttr(tensor, dtype));
  if (!found.get()) throw PythonError();
  return is_one_of(found.get(), tuple);
}

PyObject* call(PyObject* input, PyObject* weight, PyObject* bias, PyObject* stride, PyObject* padding,
               PyObject* dilation, bool casts) {
  static PyObject* const ndim = name("ndim");
  static PyObject* const current_level = name("_current_level");
  const bool has_bias = bias != Py_None;
  PackedGeometry::Numbers numbers{};
  if (!is_plain(input) || !is_plain(weight) || (has_bias && !is_plain(bias)) || !read_pair(stride, &numbers[0]) ||
      !read_pair(padding, &numbers[2]) || !read_pair(dilation, &numbers[4]))
    Py_RETURN_NONE;
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(known.occasions); ++i)
    if (says(PyTuple_GET_ITEM(known.occasions, i))) Py_RETURN_NONE;
  if (integer(known.forward_ad, current_level) >= 0 || integer(input, ndim) != 4) Py_RETURN_NONE;
  if (!has_dtype_of(input, known.dtypes)) Py_RETURN_NONE;
  if (casts && (!has_dtype_of(weight, known.cast_dtypes) || (has_bias && !has_dtype_of(bias, known.cast_dtypes))))
    Py_RETURN_NONE;

  PyObject* function = known.without_grad;
  if (says(known.is_grad_enabled)) {
    const bool of_input = requires_grad(input), of_weight = requires_grad(weight);
    if (of_input && of_weight)
      function = known.with_grad;
    else if (of_input || of_weight || (has_bias && requires_grad(bias)))
      Py_RETURN_NONE;
  }
  const Owned geometry(PyLong_FromLongLong(PackedGeometry(numbers, casts).packed()));
  if (!geometry.get()) throw PythonError();
  const std::array<PyObject*, 4> arguments = {input, weight, bias, geometry.get()};
  return PyObject_Vectorcall(function, arguments.data(), arguments.size(), nullptr);
}

PyObject* short_way(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  if (count < 6 || count > 7 || known.with_grad == nullptr) {
    PyErr_SetString(PyExc_TypeError,
                    "expected input, weight, bias, stride, padding, dilation and perhaps casts, after prepare");
    return nullptr;
  }
  try {
    return call(arguments[0], arguments[1], arguments[2], arguments[3], arguments[4], arguments[5],
                count == 7 && arguments[6] == Py_True);
  } catch (const PythonError&) {
    return nullptr;
  }
}

PyObject* prepare(PyObject*, PyObject* none, PyObject* keywords) {
  static const char* names[] = {"tensor_types",    "dtypes",       "cast_dtypes", "occasions", "forward_ad",
                                "is_grad_enabled", "without_grad", "with_grad",   nullptr};
  ShortWay given{};
  if (!PyArg_ParseTupleAndKeywords(none, keywords, "$O!O!O!O!OOOO:prepare_short_way", const_cast<char**>(names),
                                   &PyTuple_Type, &given.tensor_types, &PyTuple_Type, &given.dtypes, &PyTuple_Type,
                                   &given.cast_dtypes, &PyTuple_Type, &given.occasions, &given.forward_ad,
                                   &given.is_grad_enabled, &given.without_grad, &given.with_grad))
    return nullptr;
  Py_INCREF(keywords);
  known = given;
  Py_RETURN_NONE;
}

PyMethodDef methods[] = {
    {"prepare_short_way", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(prepare)),
     METH_VARARGS | METH_KEYWORDS, "What short_way asks, and whom it calls: see ShortWay."},
    {"short_way", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(short_way)), METH_FASTCALL,
     "The output for (input, weight, bias, stride, padding, dilation, casts=False), or None where the call is not a\n"
     "plain one."},
    {nullptr, nullptr, 0, nullptr},
};

}  // namespace

bool add_short_way(PyObject* module) {
  return PyModule_AddFunctions(module, methods) == 0;
}

}  // namespace dwconv
