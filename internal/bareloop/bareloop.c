/*
 * bareloop MODULE TOKEN: C_SignInit and C_Sign in a loop, and nothing else. It is
 * what every way to sign is measured against: each thread has a session of its own
 * and signs the same bytes again and again, without hashing anything.
 *
 * The PIN is in HSM_PIN. When it is logged in it says "ready". Then commands come
 * one a line on standard input,
 *
 *	ALGORITHM KEY SESSIONS MILLISECONDS BYTES
 *
 * where KEY is a label and BYTES the length of the message, for algorithms that
 * sign messages. Each is answered by one line, SIGNATURES NANOSECONDS CPU, where
 * CPU is the processor time of it, in nanoseconds as well; or by a sentence.
 */
#include <dlfcn.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <time.h>

/* The little that is needed of PKCS#11 v2.40. */
typedef unsigned long ulong_t;
typedef struct { ulong_t type; void *value; ulong_t len; } attribute;
typedef struct { ulong_t type; void *parameter; ulong_t len; } mechanism;
typedef struct { ulong_t hash, mgf, salt; } pss_params;
typedef struct { void *create, *destroy, *lock, *unlock; ulong_t flags; void *reserved; } initialize_args;
typedef struct { unsigned char version[2]; ulong_t (*fn[68])(); } functions;

enum { INITIALIZE = 0, GET_SLOT_LIST = 4, GET_TOKEN_INFO = 6, OPEN_SESSION = 12, LOGIN = 18,
       FIND_INIT = 26, FIND = 27, FIND_FINAL = 28, SIGN_INIT = 42, SIGN = 43 };
enum { CKF_OS_LOCKING_OK = 2, CKF_SERIAL_SESSION = 4, CKU_USER = 1,
       CKA_CLASS = 0, CKA_LABEL = 3, CKO_PRIVATE_KEY = 3,
       CKM_RSA_PKCS = 0x1, CKM_RSA_PKCS_PSS = 0xd, CKM_SHA256 = 0x250, CKG_MGF1_SHA256 = 2,
       CKM_ECDSA = 0x1041, CKM_EDDSA = 0x1057 };

enum { MOST = 64, LONGEST = 4096 };

static functions *p11;
static ulong_t slot, sessions[MOST];
static int opened;

static void check(ulong_t rv, const char *what) {
	if (rv == 0)
		return;
	printf("%s: return code 0x%lx\n", what, rv);
	exit(1);
}

static long long now(void) {
	struct timespec t;
	clock_gettime(CLOCK_MONOTONIC, &t);
	return t.tv_sec * 1000000000LL + t.tv_nsec;
}

static long long cpu(void) {
	struct rusage r;
	getrusage(RUSAGE_SELF, &r);
	return (r.ru_utime.tv_sec + r.ru_stime.tv_sec) * 1000000000LL + (r.ru_utime.tv_usec + r.ru_stime.tv_usec) * 1000LL;
}

static void load(const char *module, const char *token) {
	void *lib = dlopen(module, RTLD_NOW | RTLD_LOCAL);
	ulong_t (*get)(functions **) = lib ? (ulong_t (*)(functions **))dlsym(lib, "C_GetFunctionList") : NULL;
	if (get == NULL) {
		printf("%s is not a PKCS#11 library\n", module);
		exit(1);
	}
	check(get(&p11), "C_GetFunctionList");
	initialize_args args = { .flags = CKF_OS_LOCKING_OK };
	check(p11->fn[INITIALIZE](&args), "C_Initialize");
	ulong_t slots[64], count = 64;
	check(p11->fn[GET_SLOT_LIST]((unsigned char)1, slots, &count), "C_GetSlotList");
	char padded[33];
	snprintf(padded, sizeof padded, "%-32s", token);
	for (ulong_t i = 0; i < count; i++) {
		char info[512]; /* CK_TOKEN_INFO begins with the label */
		if (p11->fn[GET_TOKEN_INFO](slots[i], info) == 0 && memcmp(info, padded, 32) == 0) {
			slot = slots[i];
			return;
		}
	}
	printf("there is no token %s\n", token);
	exit(1);
}

static void open_sessions(int count) {
	for (; opened < count; opened++)
		check(p11->fn[OPEN_SESSION](slot, (ulong_t)CKF_SERIAL_SESSION, NULL, NULL, &sessions[opened]), "C_OpenSession");
}

static ulong_t find(const char *label) {
	ulong_t class = CKO_PRIVATE_KEY, key[2], count = 0;
	attribute template[] = { { CKA_CLASS, &class, sizeof class }, { CKA_LABEL, (void *)label, strlen(label) } };
	check(p11->fn[FIND_INIT](sessions[0], template, 2UL), "C_FindObjectsInit");
	check(p11->fn[FIND](sessions[0], key, 2UL, &count), "C_FindObjects");
	check(p11->fn[FIND_FINAL](sessions[0]), "C_FindObjectsFinal");
	if (count != 1) {
		printf("%lu keys with label %s\n", count, label);
		exit(1);
	}
	return key[0];
}

static struct {
	mechanism mech;
	ulong_t key, len;
	unsigned char data[LONGEST];
	long long until;
} job;

typedef struct { ulong_t session, rv; long count; pthread_t thread; } worker;

static void *work(void *arg) {
	worker *w = arg;
	unsigned char signature[1024];
	do {
		ulong_t len = sizeof signature;
		mechanism m = job.mech;
		if ((w->rv = p11->fn[SIGN_INIT](w->session, &m, job.key)) != 0)
			return NULL;
		if ((w->rv = p11->fn[SIGN](w->session, job.data, job.len, signature, &len)) != 0)
			return NULL;
		w->count++;
	} while (now() < job.until);
	return NULL;
}

/* What PKCS #1 puts before a SHA-256 digest (RFC 8017, section 9.2). */
static const unsigned char digest_info[] = {
	0x30, 0x31, 0x30, 0x0d, 0x06, 0x09, 0x60, 0x86, 0x48, 0x01, 0x65, 0x03, 0x04, 0x02, 0x01, 0x05, 0x00, 0x04, 0x20 };

static int prepare(const char *algorithm, ulong_t bytes) {
	static pss_params pss = { CKM_SHA256, CKG_MGF1_SHA256, 32 };
	memset(job.data, 'x', sizeof job.data);
	job.len = 32;
	if (strcmp(algorithm, "RS256") == 0) {
		job.mech = (mechanism){ CKM_RSA_PKCS, NULL, 0 };
		memcpy(job.data, digest_info, sizeof digest_info);
		job.len = sizeof digest_info + 32;
	} else if (strcmp(algorithm, "PS256") == 0) {
		job.mech = (mechanism){ CKM_RSA_PKCS_PSS, &pss, sizeof pss };
	} else if (strcmp(algorithm, "ES256") == 0) {
		job.mech = (mechanism){ CKM_ECDSA, NULL, 0 };
	} else if (strcmp(algorithm, "EdDSA") == 0) {
		job.mech = (mechanism){ CKM_EDDSA, NULL, 0 };
		job.len = bytes;
	} else {
		return 0;
	}
	return 1;
}

int main(int argc, char **argv) {
	static worker workers[MOST];
	char line[256], algorithm[16], label[64];
	int count;
	long ms;
	ulong_t bytes;

	setvbuf(stdout, NULL, _IOLBF, 0);
	const char *pin = getenv("HSM_PIN");
	if (argc != 3 || pin == NULL) {
		printf("usage: HSM_PIN=... bareloop MODULE TOKEN\n");
		return 2;
	}
	load(argv[1], argv[2]);
	open_sessions(1);
	check(p11->fn[LOGIN](sessions[0], (ulong_t)CKU_USER, pin, (ulong_t)strlen(pin)), "C_Login");
	printf("ready\n");
	while (fgets(line, sizeof line, stdin) != NULL) {
		if (sscanf(line, "%15s %63s %d %ld %lu", algorithm, label, &count, &ms, &bytes) != 5 ||
		    count < 1 || count > MOST || bytes > LONGEST || !prepare(algorithm, bytes)) {
			printf("cannot: %s", line);
			continue;
		}
		open_sessions(count);
		job.key = find(label);
		long long start = now(), busy = cpu();
		job.until = start + ms * 1000000LL;
		for (int i = 0; i < count; i++) {
			workers[i].session = sessions[i];
			workers[i].count = 0;
			if (pthread_create(&workers[i].thread, NULL, work, &workers[i]) != 0) {
				printf("cannot start a thread\n");
				return 1;
			}
		}
		long total = 0;
		for (int i = 0; i < count; i++) {
			pthread_join(workers[i].thread, NULL);
			check(workers[i].rv, "C_Sign");
			total += workers[i].count;
		}
		printf("%ld %lld %lld\n", total, now() - start, cpu() - busy);
	}
	return 0;
}
