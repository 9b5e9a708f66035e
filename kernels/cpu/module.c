/* The extension module inmerge_fast._cpu: the merge of all layers of a plan, and Watch. */
#include "python.h"

#include "merge.h"
#include "restore.h"

/* To be raised together with VERSION in inmerge_fast/native.py whenever anything in this folder changes what a call
   takes, returns or does, so that an older build left in a checkout is not used. */
#define VERSION 6

/* The struct code of this name, the best one for None. */
static const struct code *find_code(PyObject *name) {
  const struct code *code = code_at(0);
  for (int index = 0; name != Py_None && (code = code_at(index)); index++) {
    const int is_it = PyUnicode_CompareWithASCIIString(name, code->name) == 0;
    if (is_it) break;
  }
  if (!code) PyErr_Format(PyExc_ValueError, "no code %R for this processor", name);
  return code;
}

/* The contents of a bytes object that must have `count` elements of `size` bytes. */
static const void *contents(const char *what, PyObject *bytes, int64_t count, int64_t size) {
  char *start;
  Py_ssize_t length;
  if (PyBytes_AsStringAndSize(bytes, &start, &length)) return NULL;
  if (length == count * size) return start;
  PyErr_Format(PyExc_ValueError, "%s has %zd bytes instead of %lld", what, length, (long long)(count * size));
  return NULL;
}

PyDoc_STRVAR(merge_doc,
             "merge(layers, thresholds, coin, partner, seed, step, coin_threshold, alpha, write, threads, code, kept)\n--\n\n"
             "In-model merging of all layers at once, in place: draw or take partners, measure, decide, blend.\n\n"
             "Args:\n"
             "    layers: bytes of int64 (layers, 11), see layer.h. The weights must outlive the call.\n"
             "    thresholds: bytes of float64 (layers,).\n"
             "    coin: bytes of bool (filters,); None to draw both.\n"
             "    partner: bytes of int32 (filters,), within the layer, -1 for none.\n"
             "    seed: of the draw, as are step and coin_threshold.\n"
             "    alpha: share of itself that a merged filter keeps.\n"
             "    write: False for a dry run.\n"
             "    threads: at most.\n"
             "    code: one of code_names, None for the first.\n"
             "    kept: None; or a list with a bytearray, so that the filters that are merged can be restored. It is used\n"
             "        again if it is large enough, and let go if not. What restore takes is appended before the first write:\n"
             "        counts, bytes of int32 with which filter of its layer each sampled one is, passed, and a bytearray\n"
             "        that may have more room than is taken.\n\n"
             "Returns:\n"
             "    Bytearrays: the number of sampled filters, int64 (layers,); of each of them the similarity, float64\n"
             "    and whether it passed, bool; how many passed, and the largest similarity, float64 (2,).\n\n"
             "Raises:\n"
             "    MemoryError: there is no memory; nothing has been written.\n"
             "    ValueError: an argument has the wrong size, or a partner is no other filter of the layer.\n");

/* Append to `kept` what restore takes, with the bytearray in it if that has room. Returns where filters are kept. */
static char *append_kept(PyObject *kept, const struct merge *merge, PyObject *counts, PyObject *passed) {
  PyObject *old = PyList_GetItem(kept, 0);
  if (PyByteArray_Size(old) < merge->old_bytes) {
    /* It costs 1 us for each page that is new to the process; what is too small goes first. */
    PyObject *nothing = PyByteArray_FromStringAndSize(NULL, 0);
    if (!nothing || PyList_SetItem(kept, 0, nothing)) return NULL;
    old = PyByteArray_FromStringAndSize(NULL, (Py_ssize_t)merge->room_for_old);
  } else {
    Py_INCREF(old);
  }
  const Py_ssize_t bytes = (Py_ssize_t)(merge->sampled * (int64_t)sizeof(int32_t));
  PyObject *rows = old ? PyBytes_FromStringAndSize((const char *)merge->rows, bytes) : NULL;
  PyObject *all = rows ? PyTuple_Pack(4, counts, rows, passed, old) : NULL;
  const int failed = !all || PyList_Append(kept, all);
  Py_XDECREF(old), Py_XDECREF(rows), Py_XDECREF(all); /* the list has them now */
  return failed ? NULL : PyByteArray_AsString(old);
}

static PyObject *merge_all(PyObject *module, PyObject *arguments) {
  (void)module;
  PyObject *layers, *thresholds, *coin, *partner, *code_name, *kept;
  struct merge merge = {0};
  unsigned long long seed, step;
  if (!PyArg_ParseTuple(arguments, "SSOOKKIdpiOO:merge", &layers, &thresholds, &coin, &partner, &seed, &step,
                        &merge.draw.coin_threshold, &merge.alpha, &merge.write, &merge.threads, &code_name, &kept))
    return NULL;
  merge.keeps_old = kept != Py_None && merge.write; /* where nothing is written there is nothing to restore */
  if (merge.keeps_old && !(PyList_Check(kept) && PyList_Size(kept) == 1 && PyByteArray_Check(PyList_GetItem(kept, 0)))) {
    PyErr_SetString(PyExc_TypeError, "kept must be a list with a bytearray, or None");
    return NULL;
  }
  merge.draw.seed = seed, merge.draw.step = step;
  merge.layer_count = PyBytes_Size(layers) / (Py_ssize_t)sizeof(struct layer);
  merge.layers = contents("layers", layers, merge.layer_count, sizeof(struct layer));
  merge.thresholds = merge.layers ? contents("thresholds", thresholds, merge.layer_count, sizeof(double)) : NULL;
  merge.code = merge.thresholds ? find_code(code_name) : NULL;
  if (!merge.code) return NULL;
  if (coin != Py_None) {
    merge.given_count = PyBytes_Size(coin);
    merge.given_coin = contents("coin", coin, merge.given_count, 1);
    merge.given_partner = merge.given_coin ? contents("partner", partner, merge.given_count, sizeof(int32_t)) : NULL;
    if (!merge.given_partner) return NULL;
  }

  PyObject *counts = PyByteArray_FromStringAndSize(NULL, (Py_ssize_t)(merge.layer_count * (int64_t)sizeof(int64_t)));
  if (!counts) return NULL;
  merge.counts = (int64_t *)PyByteArray_AsString(counts);
  enum status status;
  Py_BEGIN_ALLOW_THREADS
  status = prepare_merge(&merge);
  Py_END_ALLOW_THREADS
  if (status == MERGE_HAS_NO_MEMORY) PyErr_NoMemory();
  if (status == MERGE_HAS_BAD_LAYER) PyErr_SetString(PyExc_ValueError, "layers has a layer that cannot be");
  if (status == MERGE_HAS_BAD_PARTNER) PyErr_SetString(PyExc_ValueError, "coin and partner do not fit the layers");

  /* All of Python's objects too before the first write. */
  PyObject *similarity = NULL, *passed = NULL, *totals = NULL, *results = NULL;
  if (status == MERGE_IS_READY) {
    similarity = PyByteArray_FromStringAndSize(NULL, (Py_ssize_t)(merge.sampled * (int64_t)sizeof(double)));
    passed = similarity ? PyByteArray_FromStringAndSize(NULL, (Py_ssize_t)merge.sampled) : NULL;
    totals = passed ? PyByteArray_FromStringAndSize(NULL, 2 * sizeof(double)) : NULL;
    results = totals ? PyTuple_Pack(4, counts, similarity, passed, totals) : NULL;
  }
  if (results && merge.keeps_old && !(merge.old = append_kept(kept, &merge, counts, passed))) {
    Py_DECREF(results);
    results = NULL;
  }
  if (results) {
    merge.similarity = (double *)PyByteArray_AsString(similarity);
    merge.passed = (uint8_t *)PyByteArray_AsString(passed);
    Py_BEGIN_ALLOW_THREADS
    run_merge(&merge);
    Py_END_ALLOW_THREADS
    const double numbers[2] = {(double)merge.passed_count, merge.largest};
    memcpy(PyByteArray_AsString(totals), numbers, sizeof numbers);
  }
  free_merge(&merge);
  Py_DECREF(counts), Py_XDECREF(similarity), Py_XDECREF(passed), Py_XDECREF(totals);
  return results;
}

PyDoc_STRVAR(restore_doc,
             "restore(layers, counts, rows, passed, old, threads)\n--\n\n"
             "Put the filters back that a merge has blended: as they were, to the bit.\n\n"
             "Args:\n"
             "    layers: bytes of int64 (layers, 11), see layer.h. The weights must outlive the call.\n"
             "    counts: what merge has appended to its list, as are rows, passed and old.\n"
             "    threads: at most.\n\n"
             "Raises:\n"
             "    ValueError: the arguments do not fit each other; nothing has been written.\n");

static PyObject *restore_all(PyObject *module, PyObject *arguments) {
  (void)module;
  PyObject *layers, *counts, *rows, *passed, *old;
  struct restore restore = {0};
  if (!PyArg_ParseTuple(arguments, "SYSYYi:restore", &layers, &counts, &rows, &passed, &old, &restore.threads))
    return NULL;
  restore.layer_count = PyBytes_Size(layers) / (Py_ssize_t)sizeof(struct layer);
  restore.sampled = PyByteArray_Size(passed);
  restore.layers = contents("layers", layers, restore.layer_count, sizeof(struct layer));
  restore.rows = restore.layers ? contents("rows", rows, restore.sampled, sizeof(int32_t)) : NULL;
  if (!restore.rows) return NULL;
  restore.counts = (const int64_t *)PyByteArray_AsString(counts);
  restore.passed = (const uint8_t *)PyByteArray_AsString(passed);
  restore.old = PyByteArray_AsString(old), restore.old_bytes = PyByteArray_Size(old);
  if (PyByteArray_Size(counts) != restore.layer_count * (Py_ssize_t)sizeof(int64_t) || !restore_fits(&restore)) {
    PyErr_SetString(PyExc_ValueError, "counts, rows, passed and old do not fit the layers");
    return NULL;
  }
  Py_BEGIN_ALLOW_THREADS
  run_restore(&restore);
  Py_END_ALLOW_THREADS
  Py_RETURN_NONE;
}

static int execute(PyObject *module) {
  int count = 0;
  while (code_at(count)) count++;
  PyObject *names = PyTuple_New(count);
  if (!names) return -1;
  for (int index = 0; index < count; index++) {
    PyObject *name = PyUnicode_FromString(code_at(index)->name);
    if (!name || PyTuple_SetItem(names, index, name)) {
      Py_DECREF(names);
      return -1;
    }
  }
  const int failed =
    PyModule_AddObjectRef(module, "code_names", names) || PyModule_AddIntConstant(module, "version", VERSION) ||
    add_watch(module);
  Py_DECREF(names);
  remember_process();
  return failed ? -1 : 0;
}

static PyMethodDef methods[] = {
  {"merge", merge_all, METH_VARARGS, merge_doc},
  {"restore", restore_all, METH_VARARGS, restore_doc},
  {NULL, NULL, 0, NULL},
};
static PyModuleDef_Slot slots[] = {{Py_mod_exec, execute}, {0, NULL}};
static struct PyModuleDef definition = {
  PyModuleDef_HEAD_INIT, "_cpu", "The CPU merge in C: kernels/cpu/.", 0, methods, slots, NULL, NULL, NULL,
};

PyMODINIT_FUNC PyInit__cpu(void) { return PyModuleDef_Init(&definition); }
