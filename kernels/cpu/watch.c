/* Whether a plan's target is still what it was: the same modules with the same weights in the same memory.

   Does in one call what inmerge_fast/plan/structure.py does in Python, where every module and weight costs a few
   attribute look-ups. It keeps no module and no weight alive: it holds weak references, and beside them addresses that
   are compared and never followed. An object that is looked at is held for as long as that takes. */
#include "python.h"

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

/* DLPack's table of C functions, dlpack.h from version 1.2 on. */
struct dl_tensor {
  void *data;
  int32_t device_type, device_id, ndim;
  uint8_t code, bits;
  uint16_t lanes;
  int64_t *shape, *strides;
  uint64_t byte_offset;
};
struct dl_exchange {
  struct {
    uint32_t major, minor;
    void *previous;
  } header;
  void *allocate, *managed_from_object, *managed_to_object;
  int (*tensor_from_object)(void *object, struct dl_tensor *tensor); /* which belongs to the object */
  void *current_stream;
};

enum { MOST_DIMENSIONS = 8 };

struct memory {
  const void *type;  /* torch.utils.swap_tensors makes another kind of tensor of the same object */
  struct dl_tensor seen;
  int64_t shape[MOST_DIMENSIONS], strides[MOST_DIMENSIONS];
};

/* What must stay as it is of a holder's weight, or of a tensor. */
struct held {
  const void *address;
  Py_ssize_t pick; /* its place among the plan's weights, -1 for none */
  enum { MAY_BE_EITHER, MUST_BE_FROZEN, MUST_BE_TRAINED } gradient;
};

typedef struct {
  PyObject_HEAD
  PyObject *died, *childless, *parents, *holders, *others, *tensors;
  Py_ssize_t child_count, holder_count, held_count, weight_count;
  const void **children; /* addresses of all children of all parents */
  struct held *held;     /* of the holders and, after them, the tensors */
  struct memory *memory; /* of the plan's weights */
} Watch;

static PyObject *word_modules, *word_parameters, *word_weight;
static PyObject *is_leaf, *requires_grad; /* the properties of torch.Tensor */
static descrgetfunc get_property;
static const struct dl_exchange *exchange;

/* What a weak reference of a list refers to, or NULL without an error. */
static PyObject *object_at(PyObject *references, Py_ssize_t index) {
  PyObject *object = PyWeakref_GetObject(PyList_GetItem(references, index)); /* borrowed: taken at once */
  if (!object) PyErr_Clear(); /* no weak reference */
  return object && object != Py_None ? Py_NewRef(object) : NULL;
}

/* module.__dict__[word] if that is a dict, or NULL without an error. */
static PyObject *dict_of(PyObject *module, PyObject *word) {
  PyObject *attributes = PyObject_GenericGetDict(module, NULL);
  PyObject *found = attributes ? PyDict_GetItemWithError(attributes, word) : NULL;
  found = found && PyDict_Check(found) ? Py_NewRef(found) : NULL;
  Py_XDECREF(attributes);
  if (!found) PyErr_Clear();
  return found;
}

static PyObject *dict_at(PyObject *references, Py_ssize_t index, PyObject *word) {
  PyObject *module = object_at(references, index), *found = module ? dict_of(module, word) : NULL;
  Py_XDECREF(module);
  return found;
}

/* The weight of a module, or NULL without an error. */
static PyObject *weight_at(PyObject *references, Py_ssize_t index) {
  PyObject *parameters = dict_at(references, index, word_parameters);
  PyObject *weight = parameters ? PyDict_GetItemWithError(parameters, word_weight) : NULL;
  Py_XINCREF(weight);
  Py_XDECREF(parameters);
  if (!weight) PyErr_Clear();
  return weight;
}

/* Whether a property of a tensor is. Looked up by its name it takes half as long again. */
static int is_true(PyObject *tensor, PyObject *property) {
  PyObject *value = get_property(property, tensor, (PyObject *)Py_TYPE(tensor));
  const int is = value == Py_True;
  if (!value) PyErr_Clear();
  Py_XDECREF(value);
  return is;
}

/* Go through the children of all parents: note their addresses, or compare them. Returns their number; -1 where they
   are not the same, or a parent has no dict of them. */
static Py_ssize_t go_through_children(const Watch *self, const void **note) {
  Py_ssize_t count = 0;
  for (Py_ssize_t p = 0, parents = PyList_Size(self->parents); p < parents; p++) {
    PyObject *modules = dict_at(self->parents, p, word_modules), *name, *child;
    Py_ssize_t at = 0;
    if (!modules) return -1;
    for (; PyDict_Next(modules, &at, &name, &child); count++) {
      if (note) note[count] = child;
      else if (self->children && (count >= self->child_count || self->children[count] != child)) {
        Py_DECREF(modules);
        return -1;
      }
    }
    Py_DECREF(modules);
  }
  return count;
}

/* The weight of a holder, or a tensor; NULL without an error where there is none. */
static PyObject *held_at(const Watch *self, Py_ssize_t index) {
  const Py_ssize_t holders = self->holder_count;
  return index < holders ? weight_at(self->holders, index) : object_at(self->tensors, index - holders);
}

static int look(PyObject *weight, struct dl_tensor *found) {
  if (exchange->tensor_from_object(weight, found) == 0) return 1;
  PyErr_Clear();
  return 0;
}

/* Whether a weight is read as it was; says whether its memory is where it was. */
static int is_read_alike(PyObject *weight, const struct memory *memory, int *is_elsewhere) {
  const struct dl_tensor *seen = &memory->seen;
  struct dl_tensor now;
  if (Py_TYPE(weight) != memory->type || !look(weight, &now)) return 0;
  const size_t bytes = (size_t)seen->ndim * sizeof(int64_t);
  *is_elsewhere |= now.data != seen->data || now.byte_offset != seen->byte_offset;
  return now.device_type == seen->device_type && now.device_id == seen->device_id && now.code == seen->code &&
         now.bits == seen->bits && now.lanes == seen->lanes && now.ndim == seen->ndim &&
         !memcmp(now.shape, memory->shape, bytes) && !memcmp(now.strides, memory->strides, bytes);
}

PyDoc_STRVAR(weights_doc,
             "weights()\n--\n\n"
             "The plan's weights in its order, in a list; in a tuple if nothing has changed but where some of them lie\n"
             "(take_note() then); None if anything else has.");

static PyObject *weights(PyObject *object, PyObject *unused) {
  Watch *self = (Watch *)object;
  (void)unused;
  if (PyList_Size(self->died)) Py_RETURN_NONE;
  for (Py_ssize_t i = 0, count = PyList_Size(self->childless); i < count; i++)
    if (PyDict_Size(PyList_GetItem(self->childless, i))) Py_RETURN_NONE;
  if (go_through_children(self, NULL) != self->child_count) Py_RETURN_NONE;
  for (Py_ssize_t i = 0, count = PyList_Size(self->others); i < count; i++) {
    PyObject *parameters = dict_at(self->others, i, word_parameters);
    const int has_none = parameters && !PyDict_GetItemWithError(parameters, word_weight);
    Py_XDECREF(parameters);
    if (!has_none) Py_RETURN_NONE;
  }
  int is_elsewhere = 0;
  PyObject *found = PyList_New(self->weight_count);
  for (Py_ssize_t i = 0; found && i < self->held_count; i++) {
    const struct held *held = &self->held[i];
    PyObject *weight = held_at(self, i);
    int is_the_same = weight && weight == held->address;
    if (is_the_same && held->gradient != MAY_BE_EITHER)
      is_the_same = is_true(weight, requires_grad) == (held->gradient == MUST_BE_TRAINED);
    if (is_the_same && held->pick >= 0)
      is_the_same = is_read_alike(weight, &self->memory[held->pick], &is_elsewhere) && is_true(weight, is_leaf);
    if (is_the_same && held->pick >= 0) PyList_SetItem(found, held->pick, weight);
    else Py_XDECREF(weight);
    if (!is_the_same) Py_CLEAR(found);
  }
  if (found && is_elsewhere) {
    PyObject *moved = PyList_AsTuple(found);
    Py_DECREF(found);
    return moved;
  }
  if (found) return found;
  if (PyErr_Occurred()) return NULL;
  Py_RETURN_NONE;
}

PyDoc_STRVAR(take_note_doc, "take_note()\n--\n\nExpect the plan's weights where they lie now.");

static PyObject *take_note(PyObject *object, PyObject *unused) {
  Watch *self = (Watch *)object;
  (void)unused;
  for (Py_ssize_t i = 0; i < self->held_count; i++) {
    if (self->held[i].pick < 0) continue;
    struct memory *memory = &self->memory[self->held[i].pick];
    PyObject *weight = held_at(self, i);
    struct dl_tensor now;
    int is_elsewhere;
    if (weight && is_read_alike(weight, memory, &is_elsewhere) && look(weight, &now))
      memory->seen.data = now.data, memory->seen.byte_offset = now.byte_offset;
    Py_XDECREF(weight);
  }
  Py_RETURN_NONE;
}

/* Note what is to be compared; 0 with an error set where that cannot be done. */
static int note(Watch *self, PyObject *picks, PyObject *gradients) {
  char *must;
  Py_ssize_t must_count;
  if (PyBytes_AsStringAndSize(gradients, &must, &must_count)) return 0;
  self->child_count = go_through_children(self, NULL);
  if (self->child_count < 0) return PyErr_SetString(PyExc_ValueError, "a parent without a dict of modules"), 0;
  self->holder_count = PyList_Size(self->holders);
  self->held_count = self->holder_count + PyList_Size(self->tensors);
  if (must_count != self->held_count) return PyErr_SetString(PyExc_ValueError, "not one gradient for each weight"), 0;
  self->weight_count = PyList_Size(picks);
  self->children = calloc((size_t)self->child_count + 1, sizeof *self->children);
  self->held = calloc((size_t)self->held_count + 1, sizeof *self->held);
  self->memory = calloc((size_t)self->weight_count + 1, sizeof *self->memory);
  if (!self->children || !self->held || !self->memory) return PyErr_NoMemory(), 0;
  go_through_children(self, self->children);
  for (Py_ssize_t i = 0; i < self->held_count; i++) {
    PyObject *weight = held_at(self, i);
    if (!weight) return PyErr_SetString(PyExc_ValueError, "a holder without a weight"), 0;
    self->held[i].address = weight, self->held[i].pick = -1, self->held[i].gradient = must[i];
    Py_DECREF(weight);
  }
  for (Py_ssize_t i = 0; i < self->weight_count; i++) {
    struct memory *memory = &self->memory[i];
    const Py_ssize_t index = PyLong_AsSsize_t(PyList_GetItem(picks, i));
    const int is_there = index >= 0 && index < self->held_count && self->held[index].pick < 0;
    PyObject *weight = is_there ? held_at(self, index) : NULL;
    const int is_described = weight && look(weight, &memory->seen) && memory->seen.ndim <= MOST_DIMENSIONS;
    if (is_described) {
      const size_t bytes = (size_t)memory->seen.ndim * sizeof(int64_t);
      memory->type = Py_TYPE(weight), self->held[index].pick = i;
      memcpy(memory->shape, memory->seen.shape, bytes), memcpy(memory->strides, memory->seen.strides, bytes);
    }
    Py_XDECREF(weight);
    if (is_described) continue;
    if (!PyErr_Occurred()) PyErr_SetString(PyExc_ValueError, "a weight that is not there or not described by DLPack");
    return 0;
  }
  return 1;
}

PyDoc_STRVAR(watch_doc,
             "Watch(exchange, properties, died, childless, parents, holders, others, tensors, picks, gradients)\n--\n\n"
             "Notes what a plan's target is made of.\n\n"
             "Args:\n"
             "    exchange: torch.Tensor.__dlpack_c_exchange_api__.\n"
             "    properties: (torch.Tensor.is_leaf, torch.Tensor.requires_grad).\n"
             "    died: a list that something is appended to when any of the objects below dies.\n"
             "    childless: the _modules of modules that have none.\n"
             "    parents: list of weak references to all other modules, as are the next three.\n"
             "    holders: modules with a weight.\n"
             "    others: modules that have no weight, and must not get one.\n"
             "    tensors: tensors.\n"
             "    picks: list of int, the plan's weights as places among the holders' and the tensors.\n"
             "    gradients: a byte for each of the holders' weights and the tensors: 1 if it must not require a\n"
             "        gradient, 2 if it must, 0 for either.\n\n"
             "Raises:\n"
             "    ValueError: something cannot be watched.\n");

static int initialise(PyObject *object, PyObject *arguments, PyObject *keywords) {
  Watch *self = (Watch *)object;
  PyObject *capsule, *leaf, *gradient, *picks, *gradients;
  (void)keywords;
  if (self->died) return PyErr_SetString(PyExc_TypeError, "a Watch is initialised once"), -1;
  if (!PyArg_ParseTuple(arguments, "O(OO)O!O!O!O!O!O!O!S:Watch", &capsule, &leaf, &gradient, &PyList_Type, &self->died, &PyList_Type,
                        &self->childless, &PyList_Type, &self->parents, &PyList_Type, &self->holders, &PyList_Type,
                        &self->others, &PyList_Type, &self->tensors, &PyList_Type, &picks, &gradients)) {
    self->died = self->childless = self->parents = self->holders = self->others = self->tensors = NULL;
    return -1;
  }
  Py_INCREF(self->died), Py_INCREF(self->childless), Py_INCREF(self->parents), Py_INCREF(self->holders);
  Py_INCREF(self->others), Py_INCREF(self->tensors);
  const struct dl_exchange *found = PyCapsule_GetPointer(capsule, "dlpack_exchange_api");
  if (!found) return -1;
  if (found->header.major != 1 || !found->tensor_from_object)
    return PyErr_SetString(PyExc_ValueError, "another DLPack"), -1;
  exchange = found;
  get_property = (descrgetfunc)PyType_GetSlot(Py_TYPE(leaf), Py_tp_descr_get);
  if (!get_property || Py_TYPE(leaf) != Py_TYPE(gradient))
    return PyErr_SetString(PyExc_ValueError, "properties of another kind"), -1;
  Py_INCREF(leaf), Py_INCREF(gradient); /* the ones before live as long as torch.Tensor */
  is_leaf = leaf, requires_grad = gradient;
  return note(self, picks, gradients) ? 0 : -1;
}

static void destroy(PyObject *object) {
  Watch *self = (Watch *)object;
  PyTypeObject *type = Py_TYPE(object);
  Py_XDECREF(self->died), Py_XDECREF(self->childless), Py_XDECREF(self->parents), Py_XDECREF(self->holders);
  Py_XDECREF(self->others), Py_XDECREF(self->tensors);
  free(self->children), free(self->held), free(self->memory);
  ((freefunc)PyType_GetSlot(type, Py_tp_free))(object);
  Py_DECREF(type);
}

static PyMethodDef methods[] = {
  {"weights", weights, METH_NOARGS, weights_doc},
  {"take_note", take_note, METH_NOARGS, take_note_doc},
  {NULL, NULL, 0, NULL},
};
static PyType_Slot slots[] = {
  {Py_tp_doc, (void *)watch_doc}, {Py_tp_init, initialise},   {Py_tp_new, PyType_GenericNew},
  {Py_tp_dealloc, destroy},       {Py_tp_methods, methods}, {0, NULL},
};
static PyType_Spec spec = {"inmerge_fast._cpu.Watch", sizeof(Watch), 0, Py_TPFLAGS_DEFAULT, slots};

int add_watch(PyObject *module) {
  word_modules = PyUnicode_InternFromString("_modules"), word_parameters = PyUnicode_InternFromString("_parameters");
  word_weight = PyUnicode_InternFromString("weight");
  if (!word_modules || !word_parameters || !word_weight) return -1;
  PyObject *type = PyType_FromSpec(&spec);
  const int failed = !type || PyModule_AddObjectRef(module, "Watch", type);
  Py_XDECREF(type);
  return failed ? -1 : 0;
}
