/* NVML's own names: what one GPU is set to, who uses it, and its MIG slices. */
#include "calls.h"

#include <stddef.h>

/* A call that answers with one number, and one that answers with two that are alike: as it is now, and after a reset. */
#define TELLS(name, type, field)                                                                                       \
    PUBLIC int name(device d, type *told) {                                                                            \
        const gpu *g;                                                                                                  \
        int code = enter_device(#name, d, &g);                                                                         \
        if (!code) *told = (type)g->field;                                                                             \
        return code;                                                                                                   \
    }
#define TELLS_TWICE(name, value)                                                                                       \
    PUBLIC int name(device d, unsigned *current, unsigned *pending) {                                                  \
        const gpu *g;                                                                                                  \
        int code = enter_device(#name, d, &g);                                                                         \
        if (!code) *current = *pending = value;                                                                        \
        return code;                                                                                                   \
    }

TELLS(nvmlDeviceGetEnforcedPowerLimit, unsigned, power_limit_mw)
TELLS(nvmlDeviceGetPersistenceMode, unsigned, persistence)
TELLS(nvmlDeviceGetComputeMode, unsigned, compute_mode)
TELLS_TWICE(nvmlDeviceGetEccMode, g->ecc)
TELLS_TWICE(nvmlDeviceGetMigMode, g->slice_count > 0)

PUBLIC int nvmlDeviceGetTotalEccErrors(device d, int kind, int counter, u64 *count) { /* of the uncorrected since boot */
    const gpu *g;
    int code = enter_device("nvmlDeviceGetTotalEccErrors", d, &g);
    if (code) return code;
    if (!g->ecc) return NOT_SUPPORTED;
    *count = g->ecc_errors;
    return kind == 1 && counter == 0 ? OK : INVALID_ARGUMENT;
}

PUBLIC int nvmlDeviceGetMaxMigDeviceCount(device d, unsigned *count) {
    const gpu *g;
    int code = enter_device("nvmlDeviceGetMaxMigDeviceCount", d, &g);
    if (!code) *count = MAX_SLICES;
    return code;
}
PUBLIC int nvmlDeviceGetMigDeviceHandleByIndex(device d, unsigned index, device *found) {
    const gpu *g;
    int code = enter_device("nvmlDeviceGetMigDeviceHandleByIndex", d, &g);
    if (code) return code;
    if (index >= g->slice_count) return NOT_FOUND;
    *found = slice_of(d, index);
    return OK;
}
PUBLIC int nvmlDeviceGetDeviceHandleFromMigDeviceHandle(device d, device *whole) {
    const gpu *g;
    const slice *s;
    int code = enter_slice("nvmlDeviceGetDeviceHandleFromMigDeviceHandle", d, &g, &s);
    if (!code) *whole = whole_of(d);
    return code ?: (s ? OK : INVALID_ARGUMENT);
}

typedef struct { /* nvmlFieldValue_t */
    unsigned field, scope;
    long long at, latency;
    int value_type, code;
    union { unsigned number; u64 room; } value;
} field_value;
PUBLIC int nvmlDeviceGetFieldValues(device d, int count, field_value *values) {
    const gpu *g;
    int code = enter_device("nvmlDeviceGetFieldValues", d, &g);
    if (code) return code;
    for (field_value *v = values; v < values + count; v++) {
        v->code = v->field == FIELD_RECOVERY_ACTION && g->recovery != NOT_TOLD ? OK : NOT_SUPPORTED;
        v->value_type = VALUE_UNSIGNED;
        v->value.number = v->code ? 0 : (unsigned)g->recovery;
    }
    return OK;
}

/* count: in, the room in found; out, how many there are. */
static int processes(const char *call, device d, unsigned *count, process *found, int kind) {
    const gpu *g;
    const slice *s;
    int code = enter_slice(call, d, &g, &s); /* of a slice, all of its GPU's */
    if (code) return code;
    unsigned room = *count;
    *count = 0;
    for (unsigned i = 0; i < g->process_count; i++) {
        if (g->kinds[i] != kind) continue;
        if (*count < room) found[*count] = g->processes[i];
        ++*count;
    }
    return *count > room ? INSUFFICIENT_SIZE : OK;
}
PUBLIC int nvmlDeviceGetComputeRunningProcesses_v2(device d, unsigned *count, process *found) {
    return processes("nvmlDeviceGetComputeRunningProcesses_v2", d, count, found, COMPUTE);
}
PUBLIC int nvmlDeviceGetComputeRunningProcesses_v3(device d, unsigned *count, process *found) {
    return processes("nvmlDeviceGetComputeRunningProcesses_v3", d, count, found, COMPUTE);
}
PUBLIC int nvmlDeviceGetGraphicsRunningProcesses_v3(device d, unsigned *count, process *found) {
    return processes("nvmlDeviceGetGraphicsRunningProcesses_v3", d, count, found, GRAPHICS);
}
