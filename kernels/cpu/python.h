/* Python's C API, limited to what 3.10 has: one build for all later versions. */
#ifndef INMERGE_PYTHON_H
#define INMERGE_PYTHON_H

#ifndef Py_LIMITED_API
#define Py_LIMITED_API 0x030A0000
#endif
#define PY_SSIZE_T_CLEAN
#include <Python.h>

/* Add the type Watch to the module; -1 with an error set where that fails. */
int add_watch(PyObject *module);

#endif
