#include "calls.h"

enum { HK_GET_ATTRIBUTE_VALUE = 24, HK_SIGN_INIT = 42, HK_SIGN = 43 };

// CK_ATTRIBUTE.
typedef struct {
	hk_ulong type;
	void *value;
	hk_ulong len;
} hk_attribute;

typedef hk_ulong (*hk_get_attribute_value)(hk_ulong, hk_ulong, hk_attribute *, hk_ulong);
typedef hk_ulong (*hk_sign_init)(hk_ulong, hk_mechanism *, hk_ulong);
typedef hk_ulong (*hk_sign)(hk_ulong, unsigned char *, hk_ulong, unsigned char *, hk_ulong *);

hk_ulong hk_sign_single(hk_functions *f, hk_ulong session, hk_mechanism mechanism, hk_ulong key,
		unsigned char *data, hk_ulong data_len, unsigned char *sig, hk_ulong *sig_len) {
	hk_ulong rv = ((hk_sign_init)f->fn[HK_SIGN_INIT])(session, &mechanism, key);
	if (rv != 0)
		return rv;
	return ((hk_sign)f->fn[HK_SIGN])(session, data, data_len, sig, sig_len);
}

hk_ulong hk_get_attributes(hk_functions *f, hk_ulong session, hk_ulong object,
		hk_ulong *types, hk_ulong count, unsigned char *values, hk_ulong room, hk_ulong *lens) {
	hk_attribute attributes[HK_ATTRIBUTES];
	for (hk_ulong i = 0; i < count; i++)
		attributes[i] = (hk_attribute){ types[i], values + i * room, room };
	hk_ulong rv = ((hk_get_attribute_value)f->fn[HK_GET_ATTRIBUTE_VALUE])(session, object, attributes, count);
	for (hk_ulong i = 0; i < count; i++)
		lens[i] = attributes[i].len;
	return rv;
}
