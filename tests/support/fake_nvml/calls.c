/* The way into every call, and what is between the calls: calls.h. */
#include "calls.h"

#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

struct device devices[MAX_GPUS * (1 + MAX_SLICES)];
_Atomic int init_count;
_Atomic int gone[MAX_GPUS];

static void log_call(const char *call) {
    const char *path = getenv("FAKE_NVML_CALLS");
    if (!path) return;
    char line[128];
    int length = snprintf(line, sizeof line, "%s %d %d\n", call, (int)getpid(), (int)gettid());
    int fd = open(path, O_WRONLY | O_APPEND | O_CREAT | O_CLOEXEC, 0644);
    if (fd < 0 || write(fd, line, (size_t)length) != length) die("cannot write \"%s\"", path);
    close(fd);
}

static int names(const char *given, const char *call) { /* "f" names f, f_v2, f_v3...; "f_v2" only itself */
    size_t length = strlen(given);
    return !strncmp(given, call, length) && (!call[length] || !strncmp(call + length, "_v", 2));
}

static const fault *fault_of(const world *now, const char *call, int index) {
    for (unsigned i = 0; i < now->fault_count; i++) {
        const fault *f = &now->faults[i];
        if (names(f->call, call) && (f->gpu == ANY_GPU || f->gpu == index)) return f;
    }
    return NULL;
}

static void wait_ms(unsigned ms) {
    nanosleep(&(struct timespec){.tv_sec = ms / 1000, .tv_nsec = ms % 1000 * 1000000l}, NULL);
}

int enter(const char *call, int index, const world **now) {
    log_call(call);
    for (;;) {
        *now = look();
        const fault *f = fault_of(*now, call, index);
        if (f && f->slow_ms) wait_ms(f->slow_ms);
        if (!f || f->code != BLOCK) return f ? f->code : OK;
        wait_ms(10);
    }
}

int enter_initialised(const char *call, const world **now) { return enter_search(call, NO_GPU, now); }

int enter_search(const char *call, int index, const world **now) {
    int code = enter(call, index, now);
    if (code) return code;
    if (!init_count) return UNINITIALIZED;
    return (*now)->present ? OK : DRIVER_NOT_LOADED;
}

static int is_device(device d) { return d >= devices && d < devices + MAX_GPUS; }

static int lost(const world *now, int index) {
    if (index >= now->gpu_count) gone[index] = GPU_IS_LOST;
    else if (now->gpus[index].lost) gone[index] = now->gpus[index].lost;
    return gone[index];
}

device slice_of(device d, unsigned place) { return &devices[MAX_GPUS + (d - devices) * MAX_SLICES + place]; }

device whole_of(device d) {
    long at = d - devices - MAX_GPUS;
    return at < 0 || at >= MAX_GPUS * MAX_SLICES ? NULL : &devices[at / MAX_SLICES];
}

int enter_slice(const char *call, device d, const gpu **found, const slice **part) {
    device whole = whole_of(d);
    *part = NULL;
    if (!whole) return enter_device(call, d, found);
    int code = enter_device(call, whole, found);
    long place = d - slice_of(whole, 0);
    if (!code && place >= (*found)->slice_count) return NOT_FOUND;
    if (!code) *part = &(*found)->slices[place];
    return code;
}

int enter_device(const char *call, device d, const gpu **found) { return enter_pair(call, d, d, found); }

int enter_pair(const char *call, device d, device peer, const gpu **found) {
    const world *now;
    if (!init_count) return enter(call, NO_GPU, &now) ?: UNINITIALIZED;
    if (!is_device(d) || !is_device(peer)) return INVALID_ARGUMENT;
    int index = (int)(d - devices), code = enter(call, index, &now);
    if (code) return code;
    *found = &now->gpus[index];
    return lost(now, index) ?: lost(now, (int)(peer - devices));
}
