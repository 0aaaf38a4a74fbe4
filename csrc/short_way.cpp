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
  PyObject* cast_dtype;             // that of weights that are cast
  PyObject* occasions;              // functions: where one says so, other things than tensors have a say
  PyObject* forward_ad;             // the module that knows the level of forward-mode AD
  PyObject *is_any_autocast_enabled, *is_autocast_enabled, *autocast_dtype;  // the last two: of a type of devices
  PyObject* is_grad_enabled;
  PyObject *without_grad, *with_grad, *with_grad_and_casts;  // called with (input, weight, bias, geometry)
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

// A new reference.
PyObject* attribute_of(PyObject* object, PyObject* attribute) {
  PyObject* const value = PyObject_GetAttr(object, attribute);
  if (!value) throw PythonError();
  return value;
}

// What lives on with its class, or its module, so that no reference need be held.
PyObject* dtype_of(PyObject* tensor) {
  static PyObject* const dtype = name("dtype");
  return Owned(attribute_of(tensor, dtype)).get();
}

// What its devices are called. A new reference: of the usual ones at once, since torch makes a string each time.
PyObject* device_type_of(PyObject* tensor) {
  static PyObject *const is_cuda = name("is_cuda"), *const device = name("device"), *const type = name("type");
  static PyObject* const cuda = name("cuda");
  if (is_true(Owned(PyObject_GetAttr(tensor, is_cuda)))) return Py_NewRef(cuda);
  return attribute_of(Owned(attribute_of(tensor, device)).get(), type);
}

enum class Casts { kNone, kOfWeights, kOthers };

// What autocast casts. It leaves float64 alone, but that is not usual.
Casts casts_of(PyObject* input, PyObject* weight, PyObject* bias) {
  PyObject *const of_input = dtype_of(input), *const of_weight = dtype_of(weight);
  // Where they differ there is either autocast or an error.
  if (of_input == of_weight && !says(known.is_any_autocast_enabled)) return Casts::kNone;
  const Owned device(device_type_of(input));
  if (PyUnicode_CompareWithASCIIString(device.get(), "meta") == 0) return Casts::kOthers;  // torch would raise
  if (!is_true(Owned(PyObject_CallOneArg(known.is_autocast_enabled, device.get())))) return Casts::kNone;
  const Owned low(PyObject_CallOneArg(known.autocast_dtype, device.get()));
  if (!low.get()) throw PythonError();
  if (of_input != low.get() || (bias != Py_None && dtype_of(bias) != of_weight)) return Casts::kOthers;
  return of_weight == low.get() ? Casts::kNone : of_weight == known.cast_dtype ? Casts::kOfWeights : Casts::kOthers;
}

// Whether tensors alone have a say.
bool is_usual_occasion() {
  static PyObject* const current_level = name("_current_level");
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(known.occasions); ++i)
    if (says(PyTuple_GET_ITEM(known.occasions, i))) return false;
  return integer(known.forward_ad, current_level) < 0;
}

PyObject* call(PyObject* input, PyObject* weight, PyObject* bias, PyObject* stride, PyObject* padding,
               PyObject* dilation) {
  static PyObject* const ndim = name("ndim");
  const bool has_bias = bias != Py_None;
  PackedGeometry::Numbers numbers{};
  if (!is_plain(input) || !is_plain(weight) || (has_bias && !is_plain(bias)) || !read_pair(stride, &numbers[0]) ||
      !read_pair(padding, &numbers[2]) || !read_pair(dilation, &numbers[4]))
    Py_RETURN_NONE;
  if (!is_usual_occasion() || integer(input, ndim) != 4) Py_RETURN_NONE;
  if (!is_one_of(dtype_of(input), known.dtypes)) Py_RETURN_NONE;
  const Casts casts = casts_of(input, weight, bias);
  if (casts == Casts::kOthers) Py_RETURN_NONE;

  PyObject* function = known.without_grad;
  if (says(known.is_grad_enabled)) {
    const bool of_input = requires_grad(input), of_weight = requires_grad(weight);
    if (of_input && of_weight)
      function = casts == Casts::kOfWeights ? known.with_grad_and_casts : known.with_grad;
    else if (of_input || of_weight || (has_bias && requires_grad(bias)))
      Py_RETURN_NONE;
  }
  const Owned geometry(PyLong_FromLongLong(PackedGeometry(numbers, casts == Casts::kOfWeights).packed()));
  if (!geometry.get()) throw PythonError();
  const std::array<PyObject*, 4> arguments = {input, weight, bias, geometry.get()};
  return PyObject_Vectorcall(function, arguments.data(), arguments.size(), nullptr);
}

PyObject* short_way(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  if (count != 6 || known.with_grad == nullptr) {
    PyErr_SetString(PyExc_TypeError, "expected input, weight, bias, stride, padding and dilation, after prepare");
    return nullptr;
  }
  try {
    return call(arguments[0], arguments[1], arguments[2], arguments[3], arguments[4], arguments[5]);
  } catch (const PythonError&) {
    return nullptr;
  }
}

// Of the gradient of an output: whether nothing is asked of its backward pass but gradients.
PyObject* has_short_way_back(PyObject*, PyObject* gradient) {
  try {
    return PyBool_FromLong(is_plain(gradient) && !says(known.is_grad_enabled) && is_usual_occasion());
  } catch (const PythonError&) {
    return nullptr;
  }
}

PyObject* prepare(PyObject*, PyObject* none, PyObject* keywords) {
  static const char* names[] = {"tensor_types",
                                "dtypes",
                                "cast_dtype",
                                "occasions",
                                "forward_ad",
                                "is_any_autocast_enabled",
                                "is_autocast_enabled",
                                "autocast_dtype",
                                "is_grad_enabled",
                                "without_grad",
                                "with_grad",
                                "with_grad_and_casts",
                                nullptr};
  ShortWay given{};
  if (!PyArg_ParseTupleAndKeywords(none, keywords, "$O!O!OO!OOOOOOOO:prepare_short_way", const_cast<char**>(names),
                                   &PyTuple_Type, &given.tensor_types, &PyTuple_Type, &given.dtypes, &given.cast_dtype,
                                   &PyTuple_Type, &given.occasions, &given.forward_ad, &given.is_any_autocast_enabled,
                                   &given.is_autocast_enabled, &given.autocast_dtype, &given.is_grad_enabled,
                                   &given.without_grad, &given.with_grad, &given.with_grad_and_casts))
    return nullptr;
  Py_INCREF(keywords);
  known = given;
  Py_RETURN_NONE;
}

PyMethodDef methods[] = {
    {"prepare_short_way", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(prepare)),
     METH_VARARGS | METH_KEYWORDS, "What short_way asks, and whom it calls: see ShortWay."},
    {"short_way", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(short_way)), METH_FASTCALL,
     "The output for (input, weight, bias, stride, padding, dilation), or None where the call is not a plain one."},
    {"has_short_way_back", has_short_way_back, METH_O,
     "Whether a gradient is a plain tensor, and nothing but its gradients is asked of the backward pass."},
    {nullptr, nullptr, 0, nullptr},
};

}  // namespace

bool add_short_way(PyObject* module) {
  return PyModule_AddFunctions(module, methods) == 0;
}

}  // namespace dwconv
