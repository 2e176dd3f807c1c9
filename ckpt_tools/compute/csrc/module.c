/* The Python module: a formula as an object, and its methods, which let go of the interpreter's lock. */

#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <errno.h>
#include <string.h>

#include "native.h"

typedef struct {
    PyObject_HEAD
    Formula *formula;
} FormulaObject;

static const Dtype *dtype_of(const char *name) {
    const Dtype *dtype = DTYPES;
    while (dtype->name && strcmp(dtype->name, name)) dtype++;
    if (dtype->name) return dtype;
    PyErr_Format(PyExc_ValueError, "_native: no dtype %s", name);
    return NULL;
}

PyDoc_STRVAR(formula_doc,
"Formula(*, dtypes, rows, out, itemsize, copied, checked)\n\n"
"How the elements of some tensors are computed; see _native.pyi.");

/* Allocate a formula and its parts as one block. */
static Formula *new_formula(size_t count, size_t rows) {
    size_t both = count * rows;
    Formula *f = PyMem_Calloc(1, sizeof(Formula) + rows * sizeof(Row) + both * sizeof(double) + count * sizeof(Dtype *) +
                                     both + count);
    if (!f) return NULL;
    f->count = count, f->rows = rows;
    f->row = (Row *)(f + 1);
    f->coefficients = (double *)(f->row + rows);
    f->dtypes = (const Dtype **)(f->coefficients + both);
    f->used = (char *)(f->dtypes + count);
    f->needed = f->used + both;
    return f;
}

/* Read (kind, coefficients, last, lost); a coefficient is None if the term is left out. Returns 0 if they do not fit. */
static int read_row(Formula *f, size_t r, PyObject *tuple) {
    PyObject *coefficients;
    Row *row = &f->row[r];
    int kind;
    if (!PyTuple_Check(tuple) ||
        !PyArg_ParseTuple(tuple, "iO!dd", &kind, &PyTuple_Type, &coefficients, &row->last, &row->lost))
        return 0;
    if (kind < PLAIN || kind > MEAN || PyTuple_Size(coefficients) != (Py_ssize_t)f->count) return 0;
    row->first = f->count;
    for (size_t t = 0; t < f->count; t++) {
        PyObject *each = PyTuple_GetItem(coefficients, (Py_ssize_t)t);
        if (each == Py_None) continue;
        f->coefficients[r * f->count + t] = PyFloat_AsDouble(each);
        f->used[r * f->count + t] = f->needed[t] = 1;
        if (row->first == f->count) row->first = t;
    }
    row->kind = (Kind)kind;
    f->exact |= kind != PLAIN;
    return row->first < f->count && !PyErr_Occurred();
}

static PyObject *formula_new(PyTypeObject *type, PyObject *args, PyObject *kwargs) {
    static char *names[] = {"dtypes", "rows", "out", "itemsize", "copied", "checked", NULL};
    PyObject *dtypes, *rows;
    const char *out;
    Py_ssize_t itemsize;
    int copied, checked;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "$O!O!znpp", names, &PyTuple_Type, &dtypes, &PyTuple_Type, &rows, &out,
                                     &itemsize, &copied, &checked))
        return NULL;
    size_t count = (size_t)PyTuple_Size(dtypes), row_count = (size_t)PyTuple_Size(rows);
    Formula *f = new_formula(count, row_count);
    FormulaObject *self = (FormulaObject *)PyType_GenericAlloc(type, 0);
    if (!f || !self) goto no_memory;
    self->formula = f;
    f->item = (size_t)itemsize, f->copied = copied, f->checked = checked;
    const Dtype *raw = DTYPES;
    while (raw->name) raw++;
    if (!(f->out = out ? dtype_of(out) : raw)) goto failed;
    int sound = itemsize > 0 && itemsize <= 16 && count > 0 && row_count > 0 && row_count <= ROWS;
    sound = sound && (out ? f->item == f->out->size * f->out->reals : copied && !checked);
    sound = sound && (!copied || (count == 1 && row_count == 1));
    for (size_t t = 0; sound && t < count; t++) {
        const char *name = out ? PyUnicode_AsUTF8AndSize(PyTuple_GetItem(dtypes, (Py_ssize_t)t), NULL) : "";
        if (!name || !(f->dtypes[t] = out ? dtype_of(name) : raw)) goto failed;
        sound = copied ? f->dtypes[t] == f->out : f->dtypes[t]->reals == f->out->reals;
        if (f->dtypes[t]->size > f->widest) f->widest = f->dtypes[t]->size;
    }
    for (size_t r = 0; sound && r < row_count; r++) {
        sound = read_row(f, r, PyTuple_GetItem(rows, (Py_ssize_t)r));
        if (PyErr_Occurred()) goto failed;
    }
    if (sound) return (PyObject *)self;
    PyErr_SetString(PyExc_ValueError, "_native: a formula whose parts do not fit each other");
failed:
    Py_DECREF((PyObject *)self); /* frees the formula */
    return NULL;
no_memory:
    PyMem_Free(f);
    Py_XDECREF((PyObject *)self);
    return PyErr_NoMemory();
}

static void formula_dealloc(PyObject *self) {
    PyTypeObject *type = Py_TYPE(self);
    PyMem_Free(((FormulaObject *)self)->formula);
    PyObject_Free(self);
    Py_DECREF(type);
}

/* Return scratch at the start of a cache line; NULL and an error if it is too small. */
static char *scratch_of(Py_buffer *buffer, size_t needed) {
    size_t shift = -(size_t)buffer->buf % 64;
    if ((size_t)buffer->len >= shift + needed) return (char *)buffer->buf + shift;
    PyErr_SetString(PyExc_ValueError, "_native: too little scratch");
    return NULL;
}

static PyObject *failure_of(Result result) {
    if (result.status == DONE) Py_RETURN_NONE;
    return Py_BuildValue("(inni)", result.status, (Py_ssize_t)result.slice, (Py_ssize_t)result.term, result.reason);
}

/* Count the targets in numbers; 0 if they are not whole or have rows that are not there. */
static size_t targets_in(const Formula *f, const int64_t *numbers, size_t count) {
    if (count % 3) return 0;
    const Target *targets = (const Target *)numbers;
    for (size_t i = 0; i < count / 3; i++)
        if (targets[i].row < 0 || (size_t)targets[i].row >= f->rows) return 0;
    return count / 3;
}

/* Return (failure, CRC-32 of each row, whether NaN or infinity was found). */
static PyObject *filled(const Formula *f, Result done, const uint32_t *crcs, int bad) {
    return Py_BuildValue("(Ny#O)", failure_of(done), (const char *)crcs, (Py_ssize_t)(f->rows * sizeof *crcs),
                         bad ? Py_True : Py_False);
}

PyDoc_STRVAR(fill_doc, "fill(ends, scratch, wants_crc)\n\nSum a large slice from the inputs to the outputs; see _native.pyi.");

static PyObject *formula_fill(PyObject *self, PyObject *args) {
    const Formula *f = ((FormulaObject *)self)->formula;
    Py_buffer ends, scratch;
    int wants_crc, bad = 0;
    if (!PyArg_ParseTuple(args, "y*w*p", &ends, &scratch, &wants_crc)) return NULL;
    PyObject *result = NULL;
    const int64_t *numbers = ends.buf;
    size_t before = 1 + 2 * f->count, count = (size_t)ends.len / sizeof(int64_t);
    size_t targets = count > before ? targets_in(f, numbers + before, count - before) : 0;
    char *memory = scratch_of(&scratch, scratch_needed(f->rows, 0) - 64);
    if (memory && targets && numbers[0] >= 0) {
        Result done;
        uint32_t crcs[ROWS];
        Py_BEGIN_ALLOW_THREADS
        done = fill_large(f, (size_t)numbers[0], (const Place *)(numbers + 1), (const Target *)(numbers + before), targets,
                          memory, wants_crc, crcs, &bad);
        Py_END_ALLOW_THREADS
        result = filled(f, done, crcs, bad);
    } else if (memory) PyErr_SetString(PyExc_ValueError, "_native: ends that do not fit the formula");
    PyBuffer_Release(&ends), PyBuffer_Release(&scratch);
    return result;
}

PyDoc_STRVAR(pack_doc, "pack(rows, scratch, wants_crc)\n\nSum small slices into memory; see _native.pyi.");

static PyObject *formula_pack(PyObject *self, PyObject *args) {
    const Formula *f = ((FormulaObject *)self)->formula;
    Py_buffer rows, scratch;
    int wants_crc, sound = 1;
    if (!PyArg_ParseTuple(args, "y*w*p", &rows, &scratch, &wants_crc)) return NULL;
    PyObject *packed = NULL, *crcs = NULL, *bad = NULL, *result = NULL;
    const int64_t *numbers = rows.buf;
    size_t width = 1 + 2 * f->count, slices = (size_t)rows.len / sizeof(int64_t) / width, elements = 0;
    size_t item = f->copied ? f->item : f->widest * f->out->reals;
    for (size_t p = 0; p < slices; p++) {
        size_t n = (size_t)numbers[p * width];
        elements += n;
        sound = sound && n <= SPAN / 2 / item;
    }
    size_t sums = f->copied ? 0 : f->rows * elements * f->out->reals * sizeof(double) * (f->exact ? EXACT : 1);
    char *memory = scratch_of(&scratch, 2 * SPAN + sums);
    if (!sound) PyErr_SetString(PyExc_ValueError, "_native: a slice that is not small");
    else if (memory) {
        packed = PyByteArray_FromStringAndSize(NULL, (Py_ssize_t)(f->rows * elements * f->item));
        crcs = PyByteArray_FromStringAndSize(NULL, (Py_ssize_t)(f->rows * slices * sizeof(uint32_t)));
        bad = PyByteArray_FromStringAndSize(NULL, (Py_ssize_t)slices);
    }
    if (packed && crcs && bad) {
        char *to = PyByteArray_AsString(packed);
        uint32_t *sums_of = (uint32_t *)PyByteArray_AsString(crcs);
        unsigned char *refused = (unsigned char *)PyByteArray_AsString(bad);
        Result done;
        Py_BEGIN_ALLOW_THREADS
        done = fill_small(f, slices, numbers, memory, wants_crc, to, sums_of, refused);
        Py_END_ALLOW_THREADS
        result = Py_BuildValue("(NOOO)", failure_of(done), packed, crcs, bad);
    }
    Py_XDECREF(packed), Py_XDECREF(crcs), Py_XDECREF(bad);
    PyBuffer_Release(&rows), PyBuffer_Release(&scratch);
    return result;
}

PyDoc_STRVAR(fill_tile_doc, "fill_tile(sizes, strides, ends, scratch, wants_crc)\n\nSum a tile from the inputs to the outputs; see _native.pyi.");

static PyObject *formula_fill_tile(PyObject *self, PyObject *args) {
    const Formula *f = ((FormulaObject *)self)->formula;
    Py_buffer sizes, strides, ends, scratch;
    int wants_crc, bad = 0, one_order = 1;
    if (!PyArg_ParseTuple(args, "y*y*y*w*p", &sizes, &strides, &ends, &scratch, &wants_crc)) return NULL;
    PyObject *result = NULL;
    Tile tile = {(size_t)sizes.len / sizeof(int64_t), sizes.buf, strides.buf};
    char *memory = scratch_of(&scratch, scratch_needed(f->rows, 1) - 64);
    const int64_t *numbers = ends.buf;
    size_t before = 2 * f->count, count = (size_t)ends.len / sizeof(int64_t);
    size_t targets = count > before ? targets_in(f, numbers + before, count - before) : 0;
    int sound = targets && tile.axes <= AXES &&
                (size_t)strides.len == (1 + f->count) * tile.axes * sizeof(int64_t);
    size_t n = 1, most = TILE / f->item / f->rows;
    for (size_t a = 0; sound && a < tile.axes; a++) {
        sound = tile.sizes[a] > 0 && (size_t)tile.sizes[a] <= most / n;
        n *= sound ? (size_t)tile.sizes[a] : 1;
    }
    int64_t first[AXES], packed[AXES];
    for (size_t t = 0; sound && t < f->count; t++) {
        pack_strides(&tile, tile.strides + (1 + t) * tile.axes, t ? packed : first);
        if (t && memcmp(first, packed, tile.axes * sizeof *first)) one_order = 0;
    }
    if (memory && sound && n <= largest_tile(f, one_order)) {
        Result done;
        uint32_t crcs[ROWS] = {0};
        Py_BEGIN_ALLOW_THREADS
        done = fill_tile(f, &tile, (const Place *)numbers, (const Target *)(numbers + before), targets, memory, wants_crc,
                         crcs, &bad);
        Py_END_ALLOW_THREADS
        result = filled(f, done, crcs, bad);
    } else if (memory) PyErr_SetString(PyExc_ValueError, "_native: a tile that does not fit the formula");
    PyBuffer_Release(&sizes), PyBuffer_Release(&strides), PyBuffer_Release(&ends), PyBuffer_Release(&scratch);
    return result;
}

PyDoc_STRVAR(largest_tile_doc, "largest_tile(one_order)\n\nReturn the number of elements that a tile may have; see _native.pyi.");

static PyObject *formula_largest_tile(PyObject *self, PyObject *one_order) {
    return PyLong_FromSize_t(largest_tile(((FormulaObject *)self)->formula, one_order == Py_True));
}

static PyMethodDef formula_methods[] = {
    {"fill", formula_fill, METH_VARARGS, fill_doc},
    {"pack", formula_pack, METH_VARARGS, pack_doc},
    {"fill_tile", formula_fill_tile, METH_VARARGS, fill_tile_doc},
    {"largest_tile", formula_largest_tile, METH_O, largest_tile_doc},
    {NULL, NULL, 0, NULL},
};

static PyType_Slot formula_slots[] = {
    {Py_tp_doc, (void *)formula_doc},
    {Py_tp_new, formula_new},
    {Py_tp_dealloc, formula_dealloc},
    {Py_tp_methods, formula_methods},
    {0, NULL},
};

static PyType_Spec formula_spec = {"ckpt_tools.compute._native.Formula", sizeof(FormulaObject), 0, Py_TPFLAGS_DEFAULT,
                                   formula_slots};

static PyObject *crc32_of(PyObject *module, PyObject *data) {
    Py_buffer view;
    uint32_t crc;
    (void)module;
    if (PyObject_GetBuffer(data, &view, PyBUF_SIMPLE) < 0) return NULL;
    Py_BEGIN_ALLOW_THREADS
    crc = checksum(0, view.buf, (size_t)view.len);
    Py_END_ALLOW_THREADS
    PyBuffer_Release(&view);
    return PyLong_FromUnsignedLong(crc);
}

static PyObject *address_of(PyObject *module, PyObject *data) {
    Py_buffer view;
    (void)module;
    if (PyObject_GetBuffer(data, &view, PyBUF_SIMPLE) < 0) return NULL;
    PyObject *address = PyLong_FromVoidPtr(view.buf);
    PyBuffer_Release(&view);
    return address;
}

PyDoc_STRVAR(gram_doc, "gram(dtypes, places, n, sums, scratch)\n\nAdd inner products of rows to sums; see _native.pyi.");

static PyObject *gram_of(PyObject *module, PyObject *args) {
    PyObject *names, *result = NULL;
    Py_buffer places, sums, scratch;
    Py_ssize_t n;
    (void)module;
    if (!PyArg_ParseTuple(args, "O!y*nw*w*", &PyTuple_Type, &names, &places, &n, &sums, &scratch)) return NULL;
    size_t count = (size_t)PyTuple_Size(names), padded = (count + 3) & ~(size_t)3;
    const Dtype **dtypes = PyMem_Calloc(count + 1, sizeof *dtypes);
    char *memory = count ? scratch_of(&scratch, gram_scratch(count) - 64) : NULL;
    int sound = dtypes && count && n >= 0 && (size_t)places.len == count * sizeof(Place);
    sound = sound && (size_t)sums.len == padded * padded * sizeof(double);
    for (size_t r = 0; sound && r < count; r++) {
        const char *name = PyUnicode_AsUTF8AndSize(PyTuple_GetItem(names, (Py_ssize_t)r), NULL);
        sound = name && (dtypes[r] = dtype_of(name));
    }
    if (sound && memory) {
        Result done;
        Py_BEGIN_ALLOW_THREADS
        done = gram(dtypes, places.buf, count, (size_t)n, sums.buf, memory);
        Py_END_ALLOW_THREADS
        result = failure_of(done);
    } else if (!PyErr_Occurred()) PyErr_SetString(PyExc_ValueError, "_native: rows that do not fit their sums");
    PyMem_Free(dtypes);
    PyBuffer_Release(&places), PyBuffer_Release(&sums), PyBuffer_Release(&scratch);
    return result;
}

static PyObject *gram_scratch_of(PyObject *module, PyObject *count) {
    size_t rows = PyLong_AsSize_t(count);
    (void)module;
    if (PyErr_Occurred()) return NULL;
    return PyLong_FromSize_t(gram_scratch(rows ? rows : 1));
}

PyDoc_STRVAR(moments_doc,
"moments(address, dtype, shape, threads)\n\nCompute mean and M2 of each channel; see _native.pyi.");

static PyObject *moments_of(PyObject *module, PyObject *args) {
    unsigned long long address;
    const char *name;
    Py_ssize_t outer, channels, inner, threads;
    int done;
    (void)module;
    if (!PyArg_ParseTuple(args, "Ks(nnn)n", &address, &name, &outer, &channels, &inner, &threads)) return NULL;
    const Dtype *dtype = dtype_of(name);
    if (!dtype) return NULL;
    if (outer < 1 || channels < 1 || inner < 1 || threads < 1 || dtype->size < 2 || dtype->reals != 1) {
        PyErr_SetString(PyExc_ValueError, "_native: no channels of 16 bits or more");
        return NULL;
    }
    PyObject *found = PyByteArray_FromStringAndSize(NULL, 2 * channels * (Py_ssize_t)sizeof(double));
    if (!found) return NULL;
    double *result = (double *)PyByteArray_AsString(found);
    Py_BEGIN_ALLOW_THREADS
    done = moments(dtype->code, (const void *)(uintptr_t)address, (size_t)outer, (size_t)channels, (size_t)inner,
                   (size_t)threads, result);
    Py_END_ALLOW_THREADS
    if (done) return found;
    Py_DECREF(found);
    return PyErr_NoMemory();
}

PyDoc_STRVAR(start_disk_doc,
"start_disk(fd, offset, nbytes)\n\n"
"Start to write bytes of a file to the disk, so that a later sync has less to wait for; 0 bytes: up to its end.");

static PyObject *start_disk_of(PyObject *module, PyObject *args) {
    int fd;
    long long offset, nbytes;
    (void)module;
    if (!PyArg_ParseTuple(args, "iLL", &fd, &offset, &nbytes)) return NULL;
    Py_BEGIN_ALLOW_THREADS
    start_disk(fd, offset, nbytes);
    Py_END_ALLOW_THREADS
    Py_RETURN_NONE;
}

static PyObject *scratch_for(PyObject *module, PyObject *args) {
    Py_ssize_t rows;
    int tiles;
    (void)module;
    if (!PyArg_ParseTuple(args, "np", &rows, &tiles)) return NULL;
    if (rows >= 1 && rows <= ROWS) return PyLong_FromSize_t(scratch_needed((size_t)rows, tiles));
    PyErr_SetString(PyExc_ValueError, "_native: too many rows");
    return NULL;
}

static PyMethodDef methods[] = {
    {"crc32", crc32_of, METH_O, "crc32(data)\n\nReturn the CRC-32 of bytes, as zlib.crc32 does."},
    {"address", address_of, METH_O, "address(data)\n\nReturn where bytes are in memory, as long as they live."},
    {"gram", gram_of, METH_VARARGS, gram_doc},
    {"scratch", scratch_for, METH_VARARGS, "scratch(rows, tiles)\n\nReturn the bytes of scratch of a thread; see _native.pyi."},
    {"gram_scratch", gram_scratch_of, METH_O, "gram_scratch(count)\n\nReturn the bytes of scratch for so many rows."},
    {"moments", moments_of, METH_VARARGS, moments_doc},
    {"start_disk", start_disk_of, METH_VARARGS, start_disk_doc},
    {NULL, NULL, 0, NULL},
};

/* The dtypes that can be summed, each with the magnitude from which on it overflows. */
static PyObject *limits(void) {
    PyObject *found = PyDict_New();
    for (const Dtype *dtype = DTYPES; found && dtype->name; dtype++) {
        PyObject *limit = PyFloat_FromDouble(dtype->limit);
        if (!limit || PyDict_SetItemString(found, dtype->name, limit) < 0) Py_CLEAR(found);
        Py_XDECREF(limit);
    }
    return found;
}

static int add_object(PyObject *module, const char *name, PyObject *object) {
    int failed = object == NULL || PyModule_AddObjectRef(module, name, object) < 0;
    Py_XDECREF(object);
    return failed ? -1 : 0;
}

static int filled_module(PyObject *module) {
    crc_init();
    sum_init();
    exact_init();
    if (PyModule_AddIntMacro(module, NOT_READ) < 0 || PyModule_AddIntMacro(module, ENDS_EARLY) < 0 ||
        PyModule_AddIntMacro(module, NOT_WRITTEN) < 0 || PyModule_AddIntMacro(module, ROWS) < 0 ||
        PyModule_AddIntMacro(module, AXES) < 0 || add_object(module, "LIMITS", limits()) < 0)
        return -1;
    return add_object(module, "Formula", PyType_FromSpec(&formula_spec));
}

static PyModuleDef_Slot slots[] = {
    {Py_mod_exec, filled_module},
#ifdef Py_mod_gil /* Python 3.13: a formula never changes, and scratch is of one thread */
    {Py_mod_gil, Py_MOD_GIL_NOT_USED},
#endif
    {0, NULL},
};

static struct PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_native", NULL, 0, methods, slots, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit__native(void) {
    return PyModuleDef_Init(&definition);
}
