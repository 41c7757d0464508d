// What is called in C directly, and not through miekg/pkcs11.

#ifndef HK_CALLS_H
#define HK_CALLS_H

typedef unsigned long hk_ulong;

// The head of CK_FUNCTION_LIST (PKCS#11 v2.40, 3.6): a two-byte version and
// the functions in the order of pkcs11f.h, of which we call three.
typedef struct {
	unsigned char version[2];
	void *fn[44];
} hk_functions;

// CK_MECHANISM.
typedef struct {
	hk_ulong mechanism;
	void *parameter;
	hk_ulong parameter_len;
} hk_mechanism;

// hk_sign_single writes the signature to sig and its length to *sig_len.
hk_ulong hk_sign_single(hk_functions *f, hk_ulong session, hk_mechanism mechanism, hk_ulong key,
	unsigned char *data, hk_ulong data_len, unsigned char *sig, hk_ulong *sig_len);

// hk_get_attributes reads attributes of an object, of the types at types, in one
// call: the value of each to room bytes of its own at values, and its length, or
// the module's word that there is none, to lens.
hk_ulong hk_get_attributes(hk_functions *f, hk_ulong session, hk_ulong object,
	hk_ulong *types, hk_ulong count, unsigned char *values, hk_ulong room, hk_ulong *lens);

// At most so many attributes at a time.
enum { HK_ATTRIBUTES = 8 };

#endif
