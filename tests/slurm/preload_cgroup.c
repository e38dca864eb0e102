/* Lets slurmd's cgroup/v2 plugin run on a machine that also mounts cgroup v1 controllers.
 *
 * slurmd reads /proc/PID/cgroup and refuses to start ("Hybrid mode is not supported") when it finds v1 lines. Preloaded
 * into slurmd, and through its environment into slurmstepd, this hands out a memfd with only the v2 line, "0::/...", of
 * any /proc/.../cgroup that is opened to be read. Every other file is opened as it was asked for. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

static int is_proc_cgroup(const char *path)
{
	size_t length = path ? strlen(path) : 0;
	return length > 13 && !strncmp(path, "/proc/", 6) && !strcmp(path + length - 7, "/cgroup");
}

/* A descriptor at the start of the filtered text, or -1 with errno as open() leaves it. */
static int open_v2_line(const char *path)
{
	char text[16384];
	size_t used = 0;
	ssize_t got;
	int in = syscall(SYS_openat, AT_FDCWD, path, O_RDONLY | O_CLOEXEC, 0);
	if (in < 0)
		return -1;
	while (used < sizeof(text) - 1 && (got = read(in, text + used, sizeof(text) - 1 - used)) > 0)
		used += got;
	close(in);
	text[used] = '\0';
	int out = memfd_create("cgroup", MFD_CLOEXEC);
	if (out < 0)
		return -1;
	for (char *line = strtok(text, "\n"); line; line = strtok(NULL, "\n"))
		if (!strncmp(line, "0::", 3))
			dprintf(out, "%s\n", line);
	lseek(out, 0, SEEK_SET);
	return out;
}

static int open_any(const char *path, int flags, mode_t mode)
{
	if (is_proc_cgroup(path) && (flags & O_ACCMODE) == O_RDONLY)
		return open_v2_line(path);
	return syscall(SYS_openat, AT_FDCWD, path, flags, mode);
}

static FILE *fopen_any(const char *name, const char *path, const char *how)
{
	if (is_proc_cgroup(path) && how[0] == 'r') {
		int fd = open_v2_line(path);
		return fd < 0 ? NULL : fdopen(fd, "r");
	}
	FILE *(*real)(const char *, const char *) = (FILE *(*)(const char *, const char *))dlsym(RTLD_NEXT, name);
	return real(path, how);
}

#define OPEN_LIKE(function)                                                \
	int function(const char *path, int flags, ...)                     \
	{                                                                  \
		mode_t mode = 0;                                           \
		if (flags & (O_CREAT | __O_TMPFILE)) {                     \
			va_list more;                                      \
			va_start(more, flags);                             \
			mode = va_arg(more, mode_t);                       \
			va_end(more);                                      \
		}                                                          \
		return open_any(path, flags, mode);                        \
	}
OPEN_LIKE(open)
OPEN_LIKE(open64)

FILE *fopen(const char *path, const char *how) { return fopen_any("fopen", path, how); }
FILE *fopen64(const char *path, const char *how) { return fopen_any("fopen64", path, how); }
