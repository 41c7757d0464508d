package sessionpool

/*
#cgo linux LDFLAGS: -ldl
#cgo noescape hk_sign_single
#cgo nocallback hk_sign_single
#cgo noescape hk_get_attributes
#cgo nocallback hk_get_attributes
#include <dlfcn.h>
#include <stdlib.h>
#include <string.h>
#include "calls.h"

// hk_open loads a library that has a function list. On failure it returns NULL
// and says why in *why, which the caller frees: what dlerror returns is its
// thread's, and valid until the next dl call.
static void *hk_open(const char *path, int lazy, char **why) {
	void *lib = dlopen(path, (lazy ? RTLD_LAZY : RTLD_NOW) | RTLD_LOCAL);
	if (lib == NULL) {
		*why = strdup(dlerror());
		return NULL;
	}
	if (dlsym(lib, "C_GetFunctionList") == NULL) {
		*why = strdup("it is not a PKCS#11 library: it has no C_GetFunctionList");
		dlclose(lib);
		return NULL;
	}
	return lib;
}
*/
import "C"

import (
	"os"
	"path/filepath"
	"slices"
	"unsafe"

	"github.com/miekg/pkcs11"
)

// native is a loaded PKCS#11 library: miekg's binding, plus the calls that are on
// the path of every token and to every key. A library is never unloaded: its
// threads and at-exit handlers may outlive C_Finalize.
type native struct {
	*pkcs11.Ctx
	functions *C.hk_functions // nil: all calls go through Ctx
}

var _ Module = (*native)(nil)

// openNative loads the library at path; private loads a copy that shares
// nothing with other users of the file, and is gone from the disk when this
// returns. miekg's loader says neither why a library does not load nor whether
// it has a function list, so ours looks first. One that lacks functions does not
// load, unless it is direct: there looking for all of them, a thousand for the C++
// of SoftHSM2 alone, would be felt in a process that makes one signature.
func openNative(path string, private, direct bool) (*native, error) {
	if private {
		copied, err := copyLibrary(path)
		if err != nil {
			return nil, fail(ErrConfig, err, "cannot make a private copy of the PKCS#11 library %s", path)
		}
		defer func() { _ = os.RemoveAll(filepath.Dir(copied)) }()
		path = copied
	}
	cpath := C.CString(path)
	defer C.free(unsafe.Pointer(cpath))
	var why *C.char
	lazy := C.int(0)
	if direct {
		lazy = 1
	}
	handle := C.hk_open(cpath, lazy, &why)
	if handle == nil {
		defer C.free(unsafe.Pointer(why))
		return nil, fail(ErrConfig, nil, "cannot load the PKCS#11 library %s: %s", path, C.GoString(why))
	}
	ctx := pkcs11.New(path)
	if ctx == nil {
		return nil, fail(ErrConfig, nil, "cannot load the PKCS#11 library %s", path)
	}
	n := &native{Ctx: ctx}
	if inside := (*contextLayout)(unsafe.Pointer(ctx)).ctx; inside.handle == handle {
		if inside.functions == nil {
			return nil, fail(ErrConfig, nil, "the PKCS#11 library %s has no function list", path)
		}
		n.functions = inside.functions
	}
	return n, nil
}

// contextLayout is how miekg's Ctx looks inside. We must call through the very
// function list that it has: p11-kit's client makes a new one, with a state of
// its own, each time that it is asked. The handle of the library, which the
// loader gives both of us, proves that the layout is what we think it is.
type contextLayout struct {
	ctx *struct {
		handle    unsafe.Pointer
		functions *C.hk_functions
	}
}

// foreverString is a C string that is never freed: modules keep the pointer to
// their initialisation string.
func foreverString(s string) unsafe.Pointer { return unsafe.Pointer(C.CString(s)) }

func (n *native) SignSingle(dst []byte, h pkcs11.SessionHandle, m *pkcs11.Mechanism, key pkcs11.ObjectHandle, data []byte, size int) ([]byte, error) {
	if n.functions == nil {
		if err := n.SignInit(h, []*pkcs11.Mechanism{m}, key); err != nil {
			return nil, err
		}
		sig, err := n.Sign(h, data)
		return append(dst, sig...), err
	}
	start := len(dst)
	dst = slices.Grow(dst, size)[:start+size]
	length := C.hk_ulong(size)
	rv := C.hk_sign_single(n.functions, C.hk_ulong(h), C.hk_mechanism{
		C.hk_ulong(m.Mechanism), unsafe.Pointer(unsafe.SliceData(m.Parameter)), C.hk_ulong(len(m.Parameter)),
	}, C.hk_ulong(key), (*C.uchar)(unsafe.SliceData(data)), C.hk_ulong(len(data)),
		(*C.uchar)(unsafe.SliceData(dst[start:])), &length)
	if rv != 0 {
		return nil, pkcs11.Error(rv)
	}
	if length > C.hk_ulong(size) {
		return nil, pkcs11.Error(pkcs11.CKR_BUFFER_TOO_SMALL)
	}
	return dst[:start+int(length)], nil
}

// attributeRoom is enough for the values of nearly all attributes; certificates
// are larger.
const attributeRoom = 1024

// GetAttributeValue asks once, with room enough for most values. miekg asks for the
// lengths first: at the far end of a network that is twice as long.
func (n *native) GetAttributeValue(h pkcs11.SessionHandle, o pkcs11.ObjectHandle, a []*pkcs11.Attribute) ([]*pkcs11.Attribute, error) {
	if n.functions == nil || len(a) == 0 || len(a) > C.HK_ATTRIBUTES {
		return n.Ctx.GetAttributeValue(h, o, a)
	}
	types, lens := make([]C.hk_ulong, len(a)), make([]C.hk_ulong, len(a))
	for i := range a {
		types[i] = C.hk_ulong(a[i].Type)
	}
	values := make([]byte, len(a)*attributeRoom)
	rv := C.hk_get_attributes(n.functions, C.hk_ulong(h), C.hk_ulong(o), &types[0], C.hk_ulong(len(a)),
		(*C.uchar)(&values[0]), attributeRoom, &lens[0])
	if rv == pkcs11.CKR_BUFFER_TOO_SMALL {
		return n.Ctx.GetAttributeValue(h, o, a)
	}
	if rv != 0 {
		return nil, pkcs11.Error(rv)
	}
	got := make([]*pkcs11.Attribute, len(a))
	for i := range a {
		got[i] = &pkcs11.Attribute{Type: a[i].Type}
		switch length := uint(lens[i]); {
		case length == unavailable:
		case length > attributeRoom:
			return n.Ctx.GetAttributeValue(h, o, a)
		default:
			got[i].Value = append([]byte{}, values[i*attributeRoom:][:length]...)
		}
	}
	return got, nil
}
