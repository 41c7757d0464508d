package main

/*
#define _GNU_SOURCE
#include <malloc.h>
#include <sched.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>

static int gathered;
static cpu_set_t processors; // what the process had before gather took all but one; empty: it took none

#ifdef __GLIBC__ // others pass no arguments to constructors

// setting returns the value of a flag, else that of its variable, or NULL.
static const char *setting(char **args, const char *flag, const char *variable) {
	size_t length = strlen(flag);
	const char *value = getenv(variable);
	for (; *args != NULL; args++) {
		if (strncmp(*args, flag, length) != 0)
			continue;
		if ((*args)[length] == '=')
			value = *args + length + 1;
		else if ((*args)[length] == 0)
			value = args[1];
	}
	return value != NULL && *value != 0 ? value : NULL;
}

// signs_in_process reports whether the process is `hsmkey sign` with SoftHSM2, which
// isSoftHSM knows by the same name. Other libraries may start threads and processes
// that would inherit what gather sets; HSMs of a balance list are reached through
// goroutines beside the calls.
static int signs_in_process(int argc, char **argv) {
	if (argc < 2 || strcmp(argv[1], "sign") != 0)
		return 0;
	if (setting(argv + 2, "--balance-list", "HSM_LOAD_BALANCE_LIST") != NULL || setting(argv + 2, "--uri", "HSM_URI") != NULL)
		return 0;
	const char *module = setting(argv + 2, "--module", "HSM_MODULE");
	if (module == NULL)
		return 1;
	const char *slash = strrchr(module, '/');
	return strncmp(slash != NULL ? slash + 1 : module, "libsofthsm2.", strlen("libsofthsm2.")) == 0;
}

// gather runs before the Go runtime does, which prepares for a program of many threads
// on all processors. One signature is made of calls that follow each other, within
// some milliseconds, a tenth of which would go into that. So the runtime finds only the
// processor that the process was started on, and its threads stay there: else each
// unmapping of memory interrupts the other processors to flush their TLBs. The
// runtime's monitor, sysmon, may sleep for longer than 20 microseconds, and C has one
// heap for all threads.
__attribute__((constructor)) static void gather(int argc, char **argv) {
	if (!signs_in_process(argc, argv))
		return;
	gathered = 1;
	(void)mallopt(M_ARENA_MAX, 1);
	(void)mallopt(M_TOP_PAD, 1024 * 1024);
	(void)prctl(PR_SET_TIMERSLACK, 10UL * 1000 * 1000, 0, 0, 0); // nanoseconds
	int here = sched_getcpu();
	// A filter of system calls may kill the process for the next one.
	if (here < 0 || here >= CPU_SETSIZE || prctl(PR_GET_SECCOMP, 0, 0, 0, 0) != 0)
		return;
	if (sched_getaffinity(0, sizeof processors, &processors) != 0)
		return;
	cpu_set_t one;
	CPU_ZERO(&one);
	CPU_SET(here, &one);
	(void)sched_setaffinity(0, sizeof one, &one);
}

#endif

// scatter gives the calling thread back what gather took: it may go to another
// processor when this one is busy, and its timers are in time.
static void scatter(void) {
	if (!gathered)
		return;
	if (CPU_COUNT(&processors) > 0)
		(void)sched_setaffinity(0, sizeof processors, &processors);
	(void)prctl(PR_SET_TIMERSLACK, 0, 0, 0, 0);
}
*/
import "C"

// scatter ends, for the thread of main, what was set for the start of the Go runtime.
func scatter() { C.scatter() }
