// A thread that signs.

#ifndef HK_SIGNER_H
#define HK_SIGNER_H

#include "calls.h"

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

// hk_signer is a thread that signs lots in one session. After each lot it writes
// what became of it, a hk_ulong, to a pipe. When one fails it signs no more.
typedef struct hk_signer hk_signer;

// At most so many lots may be with a signer, from hk_signer_add until it wrote.
enum { HK_DEPTH = 2 };

// hk_signer_start returns NULL when no thread can be had.
hk_signer *hk_signer_start(hk_functions *f, hk_ulong session, hk_mechanism mechanism, hk_ulong key, int done);

void hk_signer_add(hk_signer *s, hk_lot lot);

// hk_signer_end ends the thread, after the signature that it is at.
void hk_signer_end(hk_signer *s);

#endif
