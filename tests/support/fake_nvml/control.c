/* The control file of the fake driver: its grammar is in control.h. */
#include "control.h"

#include <pthread.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static world latest; /* and what it was read from */
static struct stat latest_stat;

void die(const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    fputs("fake_nvml: ", stderr);
    vfprintf(stderr, format, arguments);
    fputc('\n', stderr);
    abort();
}

static char *word(char **rest) {
    char *found = strsep(rest, " \t");
    while (found && !*found) found = strsep(rest, " \t");
    return found;
}

static char *value(char **rest, const char *key) {
    char *found = word(rest);
    if (!found) die("\"%s\" has no value", key);
    return found;
}

static u64 number(char **rest, const char *key) {
    char *text = value(rest, key), *end;
    u64 parsed = strtoull(text, &end, 10);
    if (*text < '0' || *text > '9' || *end) die("\"%s %s\" is not a number", key, text);
    return parsed;
}

static int told(char **rest, const char *key) { /* a number, or "unknown" */
    while (*rest && **rest == ' ') ++*rest;
    if (!*rest || strncmp(*rest, "unknown", 7)) return (int)number(rest, key);
    word(rest);
    return NOT_TOLD;
}

void copy(char *to, size_t size, const char *from) {
    if (strlen(from) >= size) die("\"%s\" is too long", from);
    strcpy(to, from);
}

static unsigned gpu_number(char **rest, const char *key) {
    u64 index = number(rest, key);
    if (index >= MAX_GPUS) die("gpu %llu: at most %d", index, MAX_GPUS);
    return (unsigned)index;
}

static void parse_process(gpu *g, char **rest, const char *key, int kind) {
    if (g->process_count == MAX_PROCESSES) die("more than %d processes on a GPU", MAX_PROCESSES);
    g->kinds[g->process_count] = kind;
    process *p = &g->processes[g->process_count++];
    *p = (process){.used = ~0ull, .gpu_instance = ~0u, .compute_instance = ~0u};
    p->pid = (unsigned)number(rest, key);
    if (*rest && !strncmp(*rest, "unknown", 7)) word(rest);
    else p->used = number(rest, key);
}

static void parse_gpu(world *w, char *rest) {
    unsigned index = gpu_number(&rest, "gpu");
    gpu *g = &w->gpus[index];
    *g = (gpu){.known = 1, .total = 150754820096, .power_mw = 75000, .power_limit_mw = 700000,
               .temperature = 30, .ecc = 1, .persistence = 1, .name = "NVIDIA H200"};
    snprintf(g->uuid, sizeof g->uuid, "GPU-%08x-0000-4000-8000-%012x", 0xa0000000u + index, index);
    snprintf(g->pci, sizeof g->pci, "00000000:%02X:00.0", 0x10 + index);
    for (char *key = word(&rest); key; key = word(&rest)) {
        if (!strcmp(key, "uuid")) copy(g->uuid, sizeof g->uuid, value(&rest, key));
        else if (!strcmp(key, "pci")) copy(g->pci, sizeof g->pci, value(&rest, key));
        else if (!strcmp(key, "total")) g->total = number(&rest, key);
        else if (!strcmp(key, "used")) g->used = number(&rest, key);
        else if (!strcmp(key, "reserved")) g->reserved = number(&rest, key);
        else if (!strcmp(key, "util")) g->utilisation = (unsigned)number(&rest, key);
        else if (!strcmp(key, "power")) g->power_mw = (unsigned)number(&rest, key);
        else if (!strcmp(key, "temperature")) g->temperature = (unsigned)number(&rest, key);
        else if (!strcmp(key, "limit")) g->power_limit_mw = (unsigned)number(&rest, key);
        else if (!strcmp(key, "ecc")) g->ecc = (unsigned)number(&rest, key);
        else if (!strcmp(key, "ecc-errors")) g->ecc_errors = number(&rest, key);
        else if (!strcmp(key, "persistence")) g->persistence = (unsigned)number(&rest, key);
        else if (!strcmp(key, "compute-mode")) g->compute_mode = (unsigned)number(&rest, key);
        else if (!strcmp(key, "lost")) g->lost = 15;
        else if (!strcmp(key, "reset-required")) g->lost = 16;
        else if (!strcmp(key, "recovery")) g->recovery = told(&rest, key);
        else if (!strcmp(key, "name")) {
            if (!rest) die("\"name\" has no value");
            copy(g->name, sizeof g->name, rest);
            rest = NULL;
        } else if (!strcmp(key, "proc")) parse_process(g, &rest, key, COMPUTE);
        else if (!strcmp(key, "graphics")) parse_process(g, &rest, key, GRAPHICS);
        else if (!strcmp(key, "slice")) {
            if (g->slice_count == MAX_SLICES) die("more than %d slices of a GPU", MAX_SLICES);
            slice *s = &g->slices[g->slice_count++];
            copy(s->uuid, sizeof s->uuid, value(&rest, key));
            s->total = number(&rest, key);
        } else if (!strcmp(key, "slice-used")) {
            if (!g->slice_count) die("\"slice-used\" without a slice before it");
            g->slices[g->slice_count - 1].used = number(&rest, key);
        } else die("gpu: unknown key \"%s\"", key);
    }
    for (int peer = 0; peer < MAX_GPUS; peer++) {
        g->p2p[P2P_NVLINK][peer] = P2P_NOT_SUPPORTED;
        g->ancestor[peer] = TOPOLOGY_NODE;
    }
}

static void two_gpus(world *w, char **rest, const char *key, unsigned *one, unsigned *other) {
    *one = gpu_number(rest, key), *other = gpu_number(rest, key);
    if (*one == *other || !w->gpus[*one].known || !w->gpus[*other].known)
        die("%s %u %u: no two GPUs above", key, *one, *other);
}

static void parse_p2p(world *w, char *rest, const char *line) { /* "nvlink" or "p2p" */
    unsigned one, other;
    two_gpus(w, &rest, line, &one, &other);
    int nvlink = !strcmp(line, "nvlink");
    if (nvlink) w->gpus[one].p2p[P2P_NVLINK][other] = w->gpus[other].p2p[P2P_NVLINK][one] = P2P_OK;
    for (char *key = word(&rest); key; key = word(&rest)) {
        int kind = nvlink ? (strcmp(key, "status") ? -1 : P2P_NVLINK)
                          : (!strcmp(key, "read") ? P2P_READ : !strcmp(key, "write") ? P2P_WRITE : -1);
        if (kind < 0) die("%s: unknown key \"%s\"", line, key);
        w->gpus[one].p2p[kind][other] = w->gpus[other].p2p[kind][one] = (unsigned)number(&rest, key);
    }
}

static void parse_ancestor(world *w, char *rest) {
    unsigned one, other;
    two_gpus(w, &rest, "ancestor", &one, &other);
    w->gpus[one].ancestor[other] = w->gpus[other].ancestor[one] = (unsigned)number(&rest, "ancestor");
}

static void parse_fault(world *w, char *rest) {
    if (w->fault_count == MAX_FAULTS) die("more than %d faults", MAX_FAULTS);
    fault *f = &w->faults[w->fault_count++];
    copy(f->call, sizeof f->call, value(&rest, "fault"));
    char *kind = value(&rest, f->call);
    if (!strcmp(kind, "block")) f->code = BLOCK;
    else if (!strcmp(kind, "error")) f->code = (int)number(&rest, "error");
    else if (!strcmp(kind, "slow")) f->slow_ms = (unsigned)number(&rest, "slow");
    else die("fault: \"%s\" is neither \"error\" nor \"block\" nor \"slow\"", kind);
    char *key = word(&rest);
    f->gpu = ANY_GPU;
    if (key && strcmp(key, "gpu")) die("fault: unknown key \"%s\"", key);
    if (key) f->gpu = (int)number(&rest, key);
}

static world parse(FILE *file) {
    world w = {.present = 1, .cuda = 12080, .driver = "570.124.06"};
    char *line = NULL;
    size_t size = 0;
    while (getline(&line, &size, file) >= 0) {
        line[strcspn(line, "\n")] = 0;
        char *rest = line, *key = word(&rest);
        if (!key || *key == '#') continue;
        if (!strcmp(key, "gpu")) parse_gpu(&w, rest);
        else if (!strcmp(key, "nvlink") || !strcmp(key, "p2p")) parse_p2p(&w, rest, key);
        else if (!strcmp(key, "ancestor")) parse_ancestor(&w, rest);
        else if (!strcmp(key, "fault")) parse_fault(&w, rest);
        else if (!strcmp(key, "driver")) copy(w.driver, sizeof w.driver, value(&rest, key));
        else if (!strcmp(key, "cuda")) w.cuda = (int)number(&rest, key);
        else die("unknown line \"%s\"", key);
    }
    free(line);
    while (w.gpu_count < MAX_GPUS && w.gpus[w.gpu_count].known) w.gpu_count++;
    for (int i = w.gpu_count; i < MAX_GPUS; i++)
        if (w.gpus[i].known) die("gpu %d is given, gpu %d is not", i, w.gpu_count);
    return w;
}

static int same(const struct stat *a, const struct stat *b) {
    return a->st_ino == b->st_ino && a->st_size == b->st_size && a->st_mtim.tv_sec == b->st_mtim.tv_sec &&
           a->st_mtim.tv_nsec == b->st_mtim.tv_nsec;
}

const world *look(void) {
    static _Thread_local world seen;
    const char *path = getenv("FAKE_NVML_CONTROL");
    FILE *file = path ? fopen(path, "re") : NULL;
    if (!file) {
        seen = (world){0};
        return &seen;
    }
    struct stat st;
    if (fstat(fileno(file), &st)) die("cannot stat \"%s\"", path);
    pthread_mutex_lock(&lock);
    if (!same(&st, &latest_stat)) {
        latest = parse(file);
        latest_stat = st;
    }
    seen = latest;
    pthread_mutex_unlock(&lock);
    fclose(file);
    return &seen;
}
