/* The way into every call of the driver: it is logged, then its faults are carried out. */
#ifndef CALLS_H
#define CALLS_H

#include "control.h"

#define PUBLIC __attribute__((visibility("default")))

enum { OK = 0, UNINITIALIZED = 1, INVALID_ARGUMENT = 2, NOT_SUPPORTED = 3, NOT_FOUND = 6, INSUFFICIENT_SIZE = 7,
       DRIVER_NOT_LOADED = 9, GPU_IS_LOST = 15, RESET_REQUIRED = 16,
       ARGUMENT_VERSION_MISMATCH = 25 };

enum { FIELD_RECOVERY_ACTION = 230, VALUE_UNSIGNED = 1 };

struct device { char unused; };
typedef struct device *device; /* what NVML calls nvmlDevice_t */

/* The GPUs, and then the slices of each. */
extern struct device devices[MAX_GPUS * (1 + MAX_SLICES)];
extern _Atomic int init_count;
/* As with the real one, a lost GPU is lost to this process until NVML is initialised anew. */
extern _Atomic int gone[MAX_GPUS];

/* Each returns the call's nvmlReturn_t so far, and the GPUs as they are now. */
int enter(const char *call, int index, const world **now);
int enter_initialised(const char *call, const world **now);
int enter_search(const char *call, int index, const world **now); /* for GPU `index`, or NO_GPU */
int enter_device(const char *call, device d, const gpu **found);
int enter_slice(const char *call, device d, const gpu **found, const slice **part); /* part: NULL for a whole GPU */
device slice_of(device d, unsigned place); /* the handle of a slice of a whole GPU */
device whole_of(device d);                 /* the GPU that a slice is of; NULL for anything else */
int enter_pair(const char *call, device d, device peer, const gpu **found);

#endif
