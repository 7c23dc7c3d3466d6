/* A driver library for tests: answers as libnvidia-ml.so.1 does, for 0 to 16 GPUs.
 *
 * FAKE_NVML_CONTROL  path of the control file (control.h), looked at in every call, so that a test can change the GPUs
 *                    of a running process; replace it by rename. Without the file there is no driver.
 * FAKE_NVML_CALLS    path of a file that gets one line a call: name, process id, thread id. Optional.
 *
 * Structures and codes follow nvml.h of CUDA 12.
 */
#include "calls.h"

#include <stdio.h>
#include <string.h>
#include <strings.h>

#define COUNT(array) (sizeof(array) / sizeof((array)[0]))

typedef struct { u64 total, free, used; } memory_v1;
typedef struct { unsigned version; u64 total, reserved, free, used; } memory_v2;
typedef struct { unsigned gpu, memory; } utilisation;
typedef struct {
    char bus_id_legacy[16];
    unsigned domain, bus, device, device_id, subsystem_id;
    char bus_id[32];
} pci_info;

static int put(char *to, unsigned size, const char *from) {
    if (strlen(from) >= size) return INSUFFICIENT_SIZE;
    strcpy(to, from);
    return OK;
}

/* ---- NVML's own names: the library ---- */

static int init(const char *call) {
    const world *now;
    int code = enter(call, NO_GPU, &now);
    if (code) return code;
    if (!now->present) return DRIVER_NOT_LOADED;
    if (!init_count++)
        for (int i = 0; i < MAX_GPUS; i++) gone[i] = 0;
    return OK;
}
PUBLIC int nvmlInit(void) { return init("nvmlInit_v2"); }
PUBLIC int nvmlInit_v2(void) { return init("nvmlInit_v2"); }
PUBLIC int nvmlInitWithFlags(unsigned flags) { (void)flags; return init("nvmlInit_v2"); } /* pynvml's nvmlInit() */

PUBLIC int nvmlShutdown(void) {
    const world *now;
    int code = enter("nvmlShutdown", NO_GPU, &now);
    if (code) return code;
    if (!init_count) return UNINITIALIZED;
    init_count--;
    return OK;
}

PUBLIC const char *nvmlErrorString(int code) {
    static const struct { int code; const char *text; } texts[] = {
        {OK, "Success"}, {UNINITIALIZED, "Uninitialized"}, {INVALID_ARGUMENT, "Invalid Argument"},
        {NOT_SUPPORTED, "Not Supported"}, {NOT_FOUND, "Not Found"}, {INSUFFICIENT_SIZE, "Insufficient Size"},
        {DRIVER_NOT_LOADED, "Driver Not Loaded"}, {GPU_IS_LOST, "GPU is lost"}, {RESET_REQUIRED, "GPU requires reset"},
        {ARGUMENT_VERSION_MISMATCH, "Argument version mismatch"}};
    for (size_t i = 0; i < COUNT(texts); i++)
        if (texts[i].code == code) return texts[i].text;
    return "Unknown Error";
}

PUBLIC int nvmlSystemGetDriverVersion(char *text, unsigned size) {
    const world *now;
    return enter_initialised("nvmlSystemGetDriverVersion", &now) ?: put(text, size, now->driver);
}
PUBLIC int nvmlSystemGetNVMLVersion(char *text, unsigned size) {
    const world *now;
    char version[80];
    int code = enter_initialised("nvmlSystemGetNVMLVersion", &now);
    snprintf(version, sizeof version, "%d.%s", now->cuda / 1000, now->driver);
    return code ?: put(text, size, version);
}
PUBLIC int nvmlSystemGetCudaDriverVersion_v2(int *version) {
    const world *now;
    int code = enter_initialised("nvmlSystemGetCudaDriverVersion_v2", &now);
    *version = now->cuda;
    return code;
}
PUBLIC int nvmlSystemGetCudaDriverVersion(int *version) { return nvmlSystemGetCudaDriverVersion_v2(version); }

/* ---- NVML's own names: finding a GPU ---- */

PUBLIC int nvmlDeviceGetCount_v2(unsigned *count) {
    const world *now;
    int code = enter_initialised("nvmlDeviceGetCount_v2", &now);
    *count = (unsigned)now->gpu_count;
    return code;
}
PUBLIC int nvmlDeviceGetCount(unsigned *count) { return nvmlDeviceGetCount_v2(count); }

static int find(int code, const world *now, int index, device *found) {
    if (code) return code;
    *found = &devices[index];
    return now->gpus[index].lost ?: gone[index];
}
PUBLIC int nvmlDeviceGetHandleByIndex_v2(unsigned index, device *found) {
    const world *now;
    int code = enter_search("nvmlDeviceGetHandleByIndex_v2", (int)index, &now);
    if (!code && index >= (unsigned)now->gpu_count) code = INVALID_ARGUMENT;
    return find(code, now, (int)index, found);
}
PUBLIC int nvmlDeviceGetHandleByIndex(unsigned index, device *found) {
    return nvmlDeviceGetHandleByIndex_v2(index, found);
}

/* The slice of that UUID, or -1; a whole GPU's is none. */
static int place_of(const gpu *g, const char *uuid) {
    for (unsigned i = 0; i < g->slice_count; i++)
        if (!strcmp(g->slices[i].uuid, uuid)) return (int)i;
    return -1;
}
PUBLIC int nvmlDeviceGetHandleByUUID(const char *uuid, device *found) { /* of a GPU or of a slice */
    const world *now = look();
    int index = 0;
    while (index < now->gpu_count && strcmp(now->gpus[index].uuid, uuid) && place_of(&now->gpus[index], uuid) < 0) index++;
    int place = index < now->gpu_count ? place_of(&now->gpus[index], uuid) : -1;
    int code = enter_search("nvmlDeviceGetHandleByUUID", index, &now);
    code = find(code ?: (index < now->gpu_count ? OK : NOT_FOUND), now, index, found);
    if (!code && place >= 0) *found = slice_of(*found, (unsigned)place);
    return code;
}
PUBLIC int nvmlDeviceGetHandleByPciBusId_v2(const char *pci, device *found) {
    const world *now;
    int code = enter_initialised("nvmlDeviceGetHandleByPciBusId_v2", &now), index = 0;
    while (index < now->gpu_count && strcasecmp(now->gpus[index].pci, pci)) index++;
    return find(code ?: (index < now->gpu_count ? OK : NOT_FOUND), now, index, found);
}

/* ---- NVML's own names: one GPU ---- */

PUBLIC int nvmlDeviceGetIndex(device d, unsigned *index) { /* of a slice: among those of its GPU (nvml.h) */
    const gpu *g;
    const slice *s;
    device whole = whole_of(d);
    *index = (unsigned)(d - (whole ? slice_of(whole, 0) : devices));
    return enter_slice("nvmlDeviceGetIndex", d, &g, &s);
}
PUBLIC int nvmlDeviceGetMinorNumber(device d, unsigned *minor) {
    const gpu *g;
    *minor = (unsigned)(d - devices);
    return enter_device("nvmlDeviceGetMinorNumber", d, &g);
}
PUBLIC int nvmlDeviceGetUUID(device d, char *text, unsigned size) {
    const gpu *g;
    const slice *s;
    return enter_slice("nvmlDeviceGetUUID", d, &g, &s) ?: put(text, size, s ? s->uuid : g->uuid);
}
PUBLIC int nvmlDeviceGetName(device d, char *text, unsigned size) {
    const gpu *g;
    return enter_device("nvmlDeviceGetName", d, &g) ?: put(text, size, g->name);
}
PUBLIC int nvmlDeviceGetPciInfo_v3(device d, pci_info *info) {
    const gpu *g;
    int code = enter_device("nvmlDeviceGetPciInfo_v3", d, &g);
    if (code) return code;
    *info = (pci_info){.device_id = 0x233510de, .subsystem_id = 0x18be10de};
    if (sscanf(g->pci, "%x:%x:%x", &info->domain, &info->bus, &info->device) != 3)
        die("\"%s\" is no PCI address", g->pci);
    snprintf(info->bus_id_legacy, sizeof info->bus_id_legacy, "%04X:%02X:%02X.0", info->domain & 0xffff,
             info->bus & 0xff, info->device & 0xff);
    copy(info->bus_id, sizeof info->bus_id, g->pci);
    return OK;
}
PUBLIC int nvmlDeviceGetMemoryInfo(device d, memory_v1 *m) { /* counts the driver's reserve as used */
    const gpu *g;
    const slice *s;
    int code = enter_slice("nvmlDeviceGetMemoryInfo", d, &g, &s);
    if (code) return code;
    m->total = s ? s->total : g->total;
    m->used = s ? s->used : g->used + g->reserved;
    m->free = m->total - m->used;
    return OK;
}
PUBLIC int nvmlDeviceGetMemoryInfo_v2(device d, memory_v2 *m) {
    const gpu *g;
    const slice *s;
    int code = enter_slice("nvmlDeviceGetMemoryInfo_v2", d, &g, &s);
    if (code) return code;
    if (m->version != (sizeof *m | 2u << 24)) return ARGUMENT_VERSION_MISMATCH;
    m->total = s ? s->total : g->total;
    m->reserved = s ? 0 : g->reserved;
    m->used = s ? s->used : g->used;
    m->free = m->total - m->used - m->reserved;
    return OK;
}
PUBLIC int nvmlDeviceGetUtilizationRates(device d, utilisation *u) {
    const gpu *g;
    int code = enter_device("nvmlDeviceGetUtilizationRates", d, &g);
    if (!code) *u = (utilisation){.gpu = g->utilisation};
    return code;
}
PUBLIC int nvmlDeviceGetPowerUsage(device d, unsigned *milliwatts) {
    const gpu *g;
    int code = enter_device("nvmlDeviceGetPowerUsage", d, &g);
    if (!code) *milliwatts = g->power_mw;
    return code;
}
PUBLIC int nvmlDeviceGetTemperature(device d, int sensor, unsigned *celsius) {
    const gpu *g;
    int code = enter_device("nvmlDeviceGetTemperature", d, &g);
    if (!code) *celsius = g->temperature;
    return code ?: (sensor ? INVALID_ARGUMENT : OK);
}
