/*
 * A stand-in for NVIDIA's libnvidia-ml.so.1, for tests on machines without an NVIDIA driver. Not NVIDIA's code.
 *
 * Function names, structs and return codes follow nvml.h (package nvidia-nvml-dev), as far as llmwd calls them;
 * -DUSE_NVML_H compiles it against the real header instead of the declarations below (tests/fakes/test_nvml_header.py).
 *
 * The world comes from the file that LLMWD_FAKE_NVML names, read again at every call; words are key=value and
 * `_` in a name stands for a blank:
 *
 *   driver 550.54.15
 *   gpu uuid=GPU-a minor=3 pci=00000000:1B:00.0 name=NVIDIA_H200 memory=1000 used=10 nvlink=1,2
 *   gpu uuid=GPU-b sliceable=0           a GPU without MIG: older or a consumer's
 *   mig gpu=0 uuid=MIG-a                 the GPU is in MIG mode; its own list of processes is for privileged users only
 *   privileged                           we are one of them
 *   process gpu=0 pid=77 used=500 kind=compute mig=0 while_alive=1
 *   process gpu=0 pid=77 used=-1         the driver does not tell how much memory (NVML_VALUE_NOT_AVAILABLE)
 *   grow gpu=0 times=2 pid=5000          so often the list of computing processes outgrows the room that was made for it
 *                                        after asking for its size, by processes 5000, 5001, ...
 *   contexts folder=/path used=500       whatever has said so there is on its GPU while it lives: UUID.PID.START, no contents
 *   forget pid=77                        no list shows this process of the lines before, its memory stays in use
 *   fail nvmlInitWithFlags 18            the call returns this code ...
 *   fail nvmlDeviceGetUUID 15 gpu=1      ... for this GPU only; `fail all 15 gpu=1`: every call on it
 *   hang nvmlDeviceGetMemoryInfo         the call does not return while this line is there
 *
 * -DMISSING_V3 leaves the newer lists of processes out, as drivers before 510 do; -DMISSING_V2 the older ones as well, and
 * MIG, as drivers from before MIG do.
 * while_alive=1: listed only while a process with that pid exists and is no zombie, as with the real driver.
 */
#include <dirent.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define API __attribute__((visibility("default")))

#ifdef USE_NVML_H
#include <nvml.h>
#define RETURN API nvmlReturn_t
#else
typedef struct nvmlDevice_st *nvmlDevice_t;
typedef struct {
    char busIdLegacy[16];
    unsigned int domain, bus, device, pciDeviceId, pciSubSystemId;
    char busId[32];
} nvmlPciInfo_t;
typedef struct {
    unsigned long long total, free, used;
} nvmlMemory_t;
typedef struct {
    unsigned int pid;
    unsigned long long usedGpuMemory;
    unsigned int gpuInstanceId, computeInstanceId;
} nvmlProcessInfo_t;
#define NVML_VALUE_NOT_AVAILABLE (-1)
typedef unsigned int nvmlGpuP2PCapsIndex_t, nvmlGpuP2PStatus_t;
typedef unsigned int nvmlReturn_t;
enum {
    NVML_SUCCESS = 0,
    NVML_ERROR_UNINITIALIZED = 1,
    NVML_ERROR_INVALID_ARGUMENT = 2,
    NVML_ERROR_NOT_SUPPORTED = 3,
    NVML_ERROR_NO_PERMISSION = 4,
    NVML_ERROR_NOT_FOUND = 6,
    NVML_ERROR_INSUFFICIENT_SIZE = 7,
    NVML_ERROR_DRIVER_NOT_LOADED = 9,
    NVML_ERROR_UNKNOWN = 999,
    NVML_P2P_CAPS_INDEX_NVLINK = 2,
    NVML_P2P_STATUS_OK = 0,
    NVML_P2P_STATUS_NOT_SUPPORTED = 5,
};
#define RETURN API nvmlReturn_t
#endif

enum { GPUS = 64, SLICES = 7, PROCESSES = 256, LINES = 64, TEXT = 96 };

typedef struct {
    char uuid[TEXT], name[TEXT], pci[32], nvlink[TEXT];
    unsigned int minor;
    int slices, sliceable, growths;
    unsigned int newcomer;
    unsigned long long memory, used;
    char slice[SLICES][TEXT];
} Gpu;
typedef struct {
    int gpu, mig, graphics, forgotten;
    unsigned int pid;
    unsigned long long used;
} Process;
typedef struct {
    char function[TEXT];
    int code, gpu; /* code < 0: hang; gpu < 0: any */
} Fault;
typedef struct {
    char driver[TEXT];
    int gpus, processes, faults, privileged;
    Gpu gpu[GPUS];
    Process process[PROCESSES];
    Fault fault[LINES];
} World;

static World world;
static int initialised;

static const char *word(const char *line, const char *key, char *value, size_t size)
{
    char wanted[TEXT];
    snprintf(wanted, sizeof wanted, " %s=", key);
    const char *at = strstr(line, wanted);
    value[0] = 0;
    if (!at)
        return value;
    at += strlen(wanted);
    size_t length = strcspn(at, " \n");
    if (length >= size)
        length = size - 1;
    memcpy(value, at, length);
    value[length] = 0;
    return value;
}

static long long number(const char *line, const char *key, long long otherwise)
{
    char value[TEXT];
    word(line, key, value, sizeof value);
    return value[0] ? strtoll(value, NULL, 10) : otherwise;
}

/* The start time of a living process, in clock ticks; 0: there is none, or a zombie. */
static unsigned long long start_of(unsigned int pid)
{
    char path[64], text[1024];
    unsigned long long start = 0;
    snprintf(path, sizeof path, "/proc/%u/stat", pid);
    FILE *file = fopen(path, "r");
    if (!file)
        return 0;
    size_t length = fread(text, 1, sizeof text - 1, file);
    fclose(file);
    text[length] = 0;
    char *word = strrchr(text, ')'); /* after it: the state, the third of the words, the start is the 22nd */
    if (!word || word[2] == 'Z' || word[2] == 'X')
        return 0;
    for (int i = 2; word && i < 22; i++)
        word = strchr(word + 1, ' ');
    if (word)
        sscanf(word, "%llu", &start);
    return start;
}

static void take_contexts(const char *folder, unsigned long long used)
{
    DIR *entries = opendir(folder);
    struct dirent *entry;
    while (entries && (entry = readdir(entries)) && world.processes < PROCESSES) {
        char uuid[TEXT];
        Process process = {.mig = -1, .used = used};
        unsigned long long start;
        if (sscanf(entry->d_name, "%90[^.].%u.%llu", uuid, &process.pid, &start) != 3 || start_of(process.pid) != start)
            continue;
        for (process.gpu = 0; process.gpu < world.gpus && strcmp(world.gpu[process.gpu].uuid, uuid); process.gpu++)
            ;
        if (process.gpu < world.gpus)
            world.process[world.processes++] = process;
    }
    if (entries)
        closedir(entries);
}

static void take(const char *line)
{
    if (!strncmp(line, "driver ", 7)) {
        sscanf(line + 7, "%90s", world.driver);
    } else if (!strncmp(line, "gpu ", 4) && world.gpus < GPUS) {
        Gpu *gpu = &world.gpu[world.gpus++];
        word(line, "uuid", gpu->uuid, sizeof gpu->uuid);
        word(line, "name", gpu->name, sizeof gpu->name);
        word(line, "pci", gpu->pci, sizeof gpu->pci);
        word(line, "nvlink", gpu->nvlink, sizeof gpu->nvlink);
        for (char *c = gpu->name; *c; c++)
            if (*c == '_')
                *c = ' ';
        gpu->minor = number(line, "minor", world.gpus - 1);
        gpu->sliceable = number(line, "sliceable", 1);
        gpu->memory = number(line, "memory", 0);
        gpu->used = number(line, "used", 0);
    } else if (!strncmp(line, "mig ", 4)) {
        int gpu = number(line, "gpu", 0);
        if (gpu < world.gpus && world.gpu[gpu].slices < SLICES)
            word(line, "uuid", world.gpu[gpu].slice[world.gpu[gpu].slices++], TEXT);
    } else if (!strncmp(line, "privileged", 10)) {
        world.privileged = 1;
    } else if (!strncmp(line, "grow ", 5)) {
        Gpu *gpu = &world.gpu[number(line, "gpu", 0) % GPUS];
        gpu->growths = number(line, "times", 0);
        gpu->newcomer = number(line, "pid", 0);
    } else if (!strncmp(line, "process ", 8) && world.processes < PROCESSES) {
        char kind[TEXT];
        Process process = {.gpu = number(line, "gpu", 0), .mig = number(line, "mig", -1)};
        process.pid = number(line, "pid", 0);
        process.used = number(line, "used", 0);
        process.graphics = !strcmp(word(line, "kind", kind, sizeof kind), "graphics");
        if (!number(line, "while_alive", 0) || start_of(process.pid))
            world.process[world.processes++] = process;
    } else if (!strncmp(line, "contexts ", 9)) {
        char folder[512];
        take_contexts(word(line, "folder", folder, sizeof folder), number(line, "used", 0));
    } else if (!strncmp(line, "forget ", 7)) {
        for (int i = 0; i < world.processes; i++)
            if (world.process[i].pid == number(line, "pid", 0))
                world.process[i].forgotten = 1;
    } else if (world.faults < LINES) {
        Fault fault = {.gpu = number(line, "gpu", -1)};
        if (sscanf(line, "fail %90s %d", fault.function, &fault.code) == 2)
            world.fault[world.faults++] = fault;
        fault.code = -1;
        if (sscanf(line, "hang %90s", fault.function) == 1)
            world.fault[world.faults++] = fault;
    }
}

static int read_world(void)
{
    char line[1024];
    const char *path = getenv("LLMWD_FAKE_NVML");
    FILE *file = path ? fopen(path, "r") : NULL;
    memset(&world, 0, sizeof world);
    if (!file)
        return 0;
    while (fgets(line, sizeof line, file))
        take(line);
    fclose(file);
    return 1;
}

/* Read the world, hang or fail as it says. gpu < 0: the call is about no GPU. */
static nvmlReturn_t enter(const char *function, int gpu)
{
    int hangs = 1;
    while (hangs) {
        hangs = 0;
        if (!read_world())
            return NVML_ERROR_DRIVER_NOT_LOADED;
        for (int i = 0; i < world.faults; i++) {
            Fault *fault = &world.fault[i];
            int all = !strcmp(fault->function, "all") && gpu >= 0;
            if ((!all && strcmp(fault->function, function)) || (fault->gpu >= 0 && fault->gpu != gpu))
                continue;
            if (fault->code >= 0)
                return fault->code;
            hangs = 1;
        }
        if (hangs)
            usleep(10000);
    }
    if (!initialised && strncmp(function, "nvmlInit", 8))
        return NVML_ERROR_UNINITIALIZED;
    return gpu >= world.gpus ? NVML_ERROR_INVALID_ARGUMENT : NVML_SUCCESS;
}

/* A handle is GPU + 1, and for its k-th MIG device 1000 * (k + 1) more. */
static int gpu_of(nvmlDevice_t device) { return (int)((size_t)device % 1000) - 1; }
static int slice_of(nvmlDevice_t device) { return (int)((size_t)device / 1000) - 1; }
static nvmlDevice_t handle(int gpu, int slice) { return (nvmlDevice_t)(size_t)(1000 * (slice + 1) + gpu + 1); }

#define ENTER(gpu)                                                                                                     \
    do {                                                                                                               \
        nvmlReturn_t entered = enter(__func__, gpu);                                                                   \
        if (entered != NVML_SUCCESS)                                                                                   \
            return entered;                                                                                            \
    } while (0)

static nvmlReturn_t give(char *out, unsigned int length, const char *text)
{
    if (strlen(text) + 1 > length)
        return NVML_ERROR_INSUFFICIENT_SIZE;
    strcpy(out, text);
    return NVML_SUCCESS;
}

RETURN nvmlInitWithFlags(unsigned int flags)
{
    (void)flags;
    ENTER(-1);
    initialised++;
    return NVML_SUCCESS;
}

RETURN nvmlInit_v2(void) { return nvmlInitWithFlags(0); }

RETURN nvmlShutdown(void)
{
    ENTER(-1);
    initialised--;
    return NVML_SUCCESS;
}

API const char *nvmlErrorString(nvmlReturn_t result)
{
    (void)result;
    return "an error of the stand-in driver";
}

RETURN nvmlSystemGetDriverVersion(char *version, unsigned int length)
{
    ENTER(-1);
    return give(version, length, world.driver);
}

RETURN nvmlDeviceGetCount_v2(unsigned int *count)
{
    ENTER(-1);
    *count = world.gpus;
    return NVML_SUCCESS;
}

RETURN nvmlDeviceGetHandleByIndex_v2(unsigned int index, nvmlDevice_t *device)
{
    ENTER((int)index);
    *device = handle((int)index, -1);
    return NVML_SUCCESS;
}

RETURN nvmlDeviceGetUUID(nvmlDevice_t device, char *uuid, unsigned int length)
{
    ENTER(gpu_of(device));
    Gpu *gpu = &world.gpu[gpu_of(device)];
    return give(uuid, length, slice_of(device) < 0 ? gpu->uuid : gpu->slice[slice_of(device)]);
}

RETURN nvmlDeviceGetName(nvmlDevice_t device, char *name, unsigned int length)
{
    ENTER(gpu_of(device));
    return give(name, length, world.gpu[gpu_of(device)].name);
}

RETURN nvmlDeviceGetMinorNumber(nvmlDevice_t device, unsigned int *minor)
{
    ENTER(gpu_of(device));
    *minor = world.gpu[gpu_of(device)].minor;
    return NVML_SUCCESS;
}

RETURN nvmlDeviceGetPciInfo_v3(nvmlDevice_t device, nvmlPciInfo_t *pci)
{
    ENTER(gpu_of(device));
    memset(pci, 0, sizeof *pci);
    strncpy(pci->busId, world.gpu[gpu_of(device)].pci, sizeof pci->busId - 1);
    if (sscanf(pci->busId, "%x:%x:%x", &pci->domain, &pci->bus, &pci->device) != 3)
        return NVML_ERROR_UNKNOWN;
    snprintf(pci->busIdLegacy, sizeof pci->busIdLegacy, "%04X:%02X:%02X.0", pci->domain & 0xffff, pci->bus & 0xff,
             pci->device & 0xff);
    return NVML_SUCCESS;
}

RETURN nvmlDeviceGetMemoryInfo(nvmlDevice_t device, nvmlMemory_t *memory)
{
    ENTER(gpu_of(device));
    Gpu *gpu = &world.gpu[gpu_of(device)];
    memory->total = gpu->memory;
    memory->used = gpu->used;
    for (int i = 0; i < world.processes; i++)
        if (world.process[i].gpu == gpu_of(device) && world.process[i].used != (unsigned long long)NVML_VALUE_NOT_AVAILABLE)
            memory->used += world.process[i].used;
    memory->free = memory->total > memory->used ? memory->total - memory->used : 0;
    return NVML_SUCCESS;
}

#ifndef MISSING_V2
RETURN nvmlDeviceGetMigMode(nvmlDevice_t device, unsigned int *current, unsigned int *pending)
{
    ENTER(gpu_of(device));
    if (!world.gpu[gpu_of(device)].sliceable)
        return NVML_ERROR_NOT_SUPPORTED;
    *current = *pending = world.gpu[gpu_of(device)].slices > 0;
    return NVML_SUCCESS;
}

RETURN nvmlDeviceGetMaxMigDeviceCount(nvmlDevice_t device, unsigned int *count)
{
    ENTER(gpu_of(device));
    *count = world.gpu[gpu_of(device)].slices > 0 ? SLICES : 0;
    return NVML_SUCCESS;
}

RETURN nvmlDeviceGetMigDeviceHandleByIndex(nvmlDevice_t device, unsigned int index, nvmlDevice_t *slice)
{
    ENTER(gpu_of(device));
    if ((int)index >= world.gpu[gpu_of(device)].slices)
        return NVML_ERROR_NOT_FOUND;
    *slice = handle(gpu_of(device), (int)index);
    return NVML_SUCCESS;
}
#endif

RETURN nvmlDeviceGetP2PStatus(nvmlDevice_t one, nvmlDevice_t other, nvmlGpuP2PCapsIndex_t caps,
                              nvmlGpuP2PStatus_t *status)
{
    ENTER(gpu_of(one));
    char peers[TEXT + 2], peer[TEXT];
    snprintf(peers, sizeof peers, ",%s,", world.gpu[gpu_of(one)].nvlink);
    snprintf(peer, sizeof peer, ",%d,", gpu_of(other));
    *status = caps == NVML_P2P_CAPS_INDEX_NVLINK && strstr(peers, peer) ? NVML_P2P_STATUS_OK
                                                                         : NVML_P2P_STATUS_NOT_SUPPORTED;
    return NVML_SUCCESS;
}

#ifndef MISSING_V2
static struct {
    int growths;
    unsigned int newcomers;
} grown[GPUS]; /* since we were loaded */

static nvmlReturn_t list(nvmlDevice_t device, int graphics, unsigned int *count, nvmlProcessInfo_t *infos)
{
    unsigned int room = *count, found = 0;
    int one = gpu_of(device), whole = slice_of(device) < 0;
    if (whole && world.gpu[one].slices && !world.privileged)
        return NVML_ERROR_NO_PERMISSION;
    for (int i = 0; i < world.processes; i++) {
        Process *process = &world.process[i];
        int here = process->gpu == one && process->graphics == graphics && !process->forgotten;
        int slice = process->mig < 0 ? 0 : process->mig; /* in MIG mode there is nothing outside the slices */
        if (!here || (!whole && slice != slice_of(device)))
            continue;
        if (infos && found < room)
            infos[found] = (nvmlProcessInfo_t){.pid = process->pid,
                                               .usedGpuMemory = process->used,
                                               .gpuInstanceId = -1,
                                               .computeInstanceId = -1};
        found++;
    }
    if (whole && !graphics && world.gpu[one].newcomer) {
        if (infos && grown[one].growths < world.gpu[one].growths && found + grown[one].newcomers <= room) {
            grown[one].growths++;
            grown[one].newcomers = room - found + 1;
        }
        for (unsigned int i = 0; i < grown[one].newcomers; i++, found++)
            if (infos && found < room)
                infos[found] = (nvmlProcessInfo_t){world.gpu[one].newcomer + i, 0, -1, -1};
    }
    *count = found;
    return found > room ? NVML_ERROR_INSUFFICIENT_SIZE : NVML_SUCCESS;
}

#define LIST(name, graphics)                                                                                           \
    RETURN name(nvmlDevice_t device, unsigned int *count, nvmlProcessInfo_t *infos)                                    \
    {                                                                                                                  \
        ENTER(gpu_of(device));                                                                                         \
        return list(device, graphics, count, infos);                                                                   \
    }

LIST(nvmlDeviceGetComputeRunningProcesses_v2, 0)
LIST(nvmlDeviceGetGraphicsRunningProcesses_v2, 1)
#ifndef MISSING_V3
LIST(nvmlDeviceGetComputeRunningProcesses_v3, 0)
LIST(nvmlDeviceGetGraphicsRunningProcesses_v3, 1)
#endif
#endif
