// What is called in C directly, and not through miekg/pkcs11.

#ifndef HK_SIGN_H
#define HK_SIGN_H

typedef unsigned long hk_ulong;

// The head of CK_FUNCTION_LIST (PKCS#11 v2.40, 3.6): a two-byte version and
// the functions in the order of pkcs11f.h, of which we call two.
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

// hk_lot is messages that are signed one after the other: each ends in data where
// ends says. The signatures, of size bytes each, are written one after the other
// to sig.
typedef struct {
	unsigned char *data;
	hk_ulong *ends;
	hk_ulong count;
	unsigned char *sig;
	hk_ulong size;
} hk_lot;

// hk_signer is a thread that signs lots in one session. After each lot it writes a
// byte to a file descriptor. When one fails it signs no more.
typedef struct hk_signer hk_signer;

// At most so many lots may be with a signer, from hk_signer_add to
// hk_signer_result.
enum { HK_DEPTH = 2 };

// hk_signer_start returns NULL when no thread can be had.
hk_signer *hk_signer_start(hk_functions *f, hk_ulong session, hk_mechanism mechanism, hk_ulong key, int done);

void hk_signer_add(hk_signer *s, hk_lot lot);

// hk_signer_result returns what became of the lot of the byte that was read last.
hk_ulong hk_signer_result(hk_signer *s);

// hk_signer_end ends the thread, after the signature that it is at.
void hk_signer_end(hk_signer *s);

#endif
