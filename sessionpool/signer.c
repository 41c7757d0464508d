#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <unistd.h>

#include "signer.h"

enum { HK_SIGNATURE_LEN_RANGE = 0xC1 }; // CKR_SIGNATURE_LEN_RANGE

struct hk_signer {
	pthread_t thread;
	hk_functions *functions;
	hk_ulong session, key;
	hk_mechanism mechanism;
	int done;

	pthread_mutex_t mu; // for what follows
	pthread_cond_t more;
	hk_lot lots[HK_DEPTH]; // a ring
	unsigned added, taken; // so far
	atomic_int ended;
};

static hk_ulong sign_lot(hk_signer *s, hk_lot *l) {
	hk_ulong start = 0;
	for (hk_ulong i = 0; i < l->count && !s->ended; i++) {
		hk_ulong length = l->size;
		hk_ulong rv = hk_sign_single(s->functions, s->session, s->mechanism, s->key,
			l->data + start, l->ends[i] - start, l->sig + i * l->size, &length);
		if (rv != 0)
			return rv;
		if (length != l->size)
			return HK_SIGNATURE_LEN_RANGE;
		start = l->ends[i];
	}
	return 0;
}

static void *run(void *arg) {
	hk_signer *s = arg;
	hk_ulong rv = 0;
	pthread_mutex_lock(&s->mu);
	while (rv == 0) {
		while (s->added == s->taken && !s->ended)
			pthread_cond_wait(&s->more, &s->mu);
		if (s->ended)
			break;
		hk_lot lot = s->lots[s->taken++ % HK_DEPTH];
		pthread_mutex_unlock(&s->mu);
		rv = sign_lot(s, &lot);
		while (write(s->done, &rv, sizeof rv) < 0 && errno == EINTR)
			;
		pthread_mutex_lock(&s->mu);
	}
	pthread_mutex_unlock(&s->mu);
	return NULL;
}

static void discard(hk_signer *s) {
	pthread_cond_destroy(&s->more);
	pthread_mutex_destroy(&s->mu);
	free(s);
}

hk_signer *hk_signer_start(hk_functions *f, hk_ulong session, hk_mechanism mechanism, hk_ulong key, int done) {
	hk_signer *s = malloc(sizeof *s);
	if (s == NULL)
		return NULL;
	*s = (hk_signer){ .functions = f, .session = session, .mechanism = mechanism, .key = key, .done = done };
	pthread_mutex_init(&s->mu, NULL);
	pthread_cond_init(&s->more, NULL);
	// Signals are for the threads of Go, which know what to do with them.
	sigset_t all, before;
	sigfillset(&all);
	pthread_sigmask(SIG_SETMASK, &all, &before);
	int failed = pthread_create(&s->thread, NULL, run, s);
	pthread_sigmask(SIG_SETMASK, &before, NULL);
	if (failed) {
		discard(s);
		return NULL;
	}
	return s;
}

void hk_signer_add(hk_signer *s, hk_lot lot) {
	pthread_mutex_lock(&s->mu);
	s->lots[s->added++ % HK_DEPTH] = lot;
	pthread_cond_signal(&s->more);
	pthread_mutex_unlock(&s->mu);
}

void hk_signer_end(hk_signer *s) {
	pthread_mutex_lock(&s->mu);
	s->ended = 1;
	pthread_cond_signal(&s->more);
	pthread_mutex_unlock(&s->mu);
	pthread_join(s->thread, NULL);
	discard(s);
}
