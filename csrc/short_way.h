// The short way of an eager call: functions of the module dwconv._C.
#pragma once

#include <Python.h>

namespace dwconv {

// False, with an exception set, where that failed.
bool add_short_way(PyObject* module);

}  // namespace dwconv
