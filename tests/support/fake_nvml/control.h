/* What a test says the host's GPUs are: a control file, one fact a line, '#' starts a comment line.
 *
 *   driver 570.124.06
 *   cuda 12080
 *   gpu 0 total 150754820096 used 650000000 reserved 600000000 util 100 power 125000 proc 1234 2180000000
 *   nvlink 0 1                                        (NVLink joins the two, in either order; no line: it does not)
 *   nvlink 0 2 status 6                               (an nvmlGpuP2PStatus_t of its own; 6: unknown)
 *   p2p 0 1 read 4 write 0                            (nvmlGpuP2PStatus_t; no line: both are 0, which is that it works)
 *   ancestor 0 1 50                                   (an nvmlGpuTopologyLevel_t; no line: 40, the same NUMA node)
 *   fault nvmlDeviceGetMemoryInfo error 15            (any version of the call; a name with _v2 is that one alone)
 *   fault nvmlDeviceGetUtilizationRates block gpu 1   (until the fault is taken out of the file)
 *   fault nvmlDeviceGetTemperature slow 300           (it answers after so many milliseconds)
 *
 * Keys of a gpu, each with its value: uuid pci total used reserved util power limit temperature, ecc and persistence (0 or 1),
 * ecc-errors, compute-mode (an nvmlComputeMode_t), recovery (an nvmlDeviceGpuRecoveryAction_t, or "unknown"), proc and
 * graphics (a process that computes, or draws: pid and bytes, or pid and "unknown"), slice (a MIG slice: UUID and
 * bytes), slice-used (of the slice before it), lost and reset-required (no value), name (the rest of the line). GPUs are numbered from 0 without a gap.
 * A file that cannot be understood aborts the process: a test must not pass on a typing error.
 */
#ifndef CONTROL_H
#define CONTROL_H

#include <stddef.h>

enum { MAX_GPUS = 16, MAX_PROCESSES = 32, MAX_FAULTS = 32, MAX_SLICES = 7 };
enum { P2P_READ = 0, P2P_WRITE = 1, P2P_NVLINK = 2, P2P_KINDS = 3 }; /* nvmlGpuP2PCapsIndex_t */
enum { P2P_OK = 0, P2P_NOT_SUPPORTED = 5 };
enum { TOPOLOGY_NODE = 40 };
enum { COMPUTE, GRAPHICS };
enum { ANY_GPU = -1, NO_GPU = -2, BLOCK = -1, NOT_TOLD = -1 };

typedef unsigned long long u64;
typedef struct { unsigned pid; u64 used; unsigned gpu_instance, compute_instance; } process; /* nvmlProcessInfo_t */
typedef struct { char uuid[64]; u64 total, used; } slice;
typedef struct {
    int known, lost; /* lost: 0, or the nvmlReturn_t of every call */
    int recovery;    /* an nvmlDeviceGpuRecoveryAction_t, or NOT_TOLD */
    char uuid[64], name[96], pci[32];
    u64 total, used, reserved;
    unsigned utilisation, power_mw, power_limit_mw, temperature;
    unsigned ecc, persistence, compute_mode;
    u64 ecc_errors;
    unsigned slice_count; /* with any, MIG is on */
    slice slices[MAX_SLICES];
    unsigned process_count;
    process processes[MAX_PROCESSES];
    int kinds[MAX_PROCESSES];              /* COMPUTE or GRAPHICS */
    unsigned p2p[P2P_KINDS][MAX_GPUS];     /* by peer: an nvmlGpuP2PStatus_t */
    unsigned ancestor[MAX_GPUS];           /* by peer: an nvmlGpuTopologyLevel_t */
} gpu;
typedef struct { char call[96]; int code, gpu; unsigned slow_ms; } fault; /* code: an nvmlReturn_t, or BLOCK */
typedef struct {
    int present, gpu_count, cuda;
    unsigned fault_count;
    char driver[64];
    gpu gpus[MAX_GPUS];
    fault faults[MAX_FAULTS];
} world;

/* The file that FAKE_NVML_CONTROL names, as it is now; absent: nothing present. Valid until this thread looks again. */
const world *look(void);
__attribute__((format(printf, 1, 2), noreturn)) void die(const char *format, ...);
void copy(char *to, size_t size, const char *from);

#endif
