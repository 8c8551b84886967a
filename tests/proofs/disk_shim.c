/* Stands between a process and its disk (LD_PRELOAD): records what is written below one folder, or lets it fail.
 *
 * HV_SHIM_FOLDER: only files below it. HV_SHIM_LOG: where the record goes; absent = nothing is recorded.
 * A record: kind (1 byte: W write, T truncate, S sync, M mark), length of the path (2), offset (8), length (8), path,
 * bytes of a write; numbers in the machine's order. shim_mark(n) puts a mark; shim_arm(nth, error, times) lets the nth
 * operation from now on fail with this errno, and the ones after it, `times` in all; error 0 = SIGKILL; nth -1 = none.
 * Operations that may fail: opening for writing, write, truncation, sync, rename, unlink, mkdir; of SQLite's shared
 * memory too, which is never recorded.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static long until_fault = -1, faults_left = 0, operations = 0;
static int fault_errno = 0, log_fd = -2;

static int is_below(const char *path) {
    const char *folder = getenv("HV_SHIM_FOLDER");
    return folder != NULL && strncmp(path, folder, strlen(folder)) == 0;
}

static int is_ours(int fd, char *path, size_t size) {
    char link[64];
    if (fd == log_fd) return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t length = readlink(link, path, size - 1);
    if (length <= 0) return 0;
    path[length] = 0;
    return is_below(path);
}

static void put(const void *bytes, size_t length) {
    while (length > 0) {
        ssize_t written = syscall(SYS_write, log_fd, bytes, length);
        if (written <= 0) abort();
        bytes = (const char *)bytes + written;
        length -= (size_t)written;
    }
}

static void record(char kind, const char *path, uint64_t offset, uint64_t length, const void *bytes) {
    if (log_fd == -2) {
        const char *name = getenv("HV_SHIM_LOG");
        log_fd = name == NULL ? -1 : (int)syscall(SYS_openat, AT_FDCWD, name, O_WRONLY | O_CREAT | O_APPEND, 0600);
    }
    if (log_fd < 0 || strstr(path, "-shm") != NULL) return;
    uint16_t path_length = (uint16_t)strlen(path);
    pthread_mutex_lock(&lock);
    put(&kind, 1);
    put(&path_length, 2);
    put(&offset, 8);
    put(&length, 8);
    put(path, path_length);
    if (bytes != NULL) put(bytes, length);
    pthread_mutex_unlock(&lock);
}

/* Whether this operation fails. */
static int fails(void) {
    operations++;
    if (until_fault < 0) return 0;
    if (until_fault > 0) {
        until_fault--;
        return 0;
    }
    if (faults_left-- <= 0) {
        until_fault = -1;
        return 0;
    }
    if (fault_errno == 0) kill(getpid(), SIGKILL);
    errno = fault_errno;
    return 1;
}

void shim_mark(long number) { record('M', "", (uint64_t)number, 0, NULL); }

void shim_arm(long nth, int error, long times) {
    fault_errno = error;
    faults_left = times;
    until_fault = nth;
}

long shim_operations(void) { return operations; }

static ssize_t write_at(int fd, const void *bytes, size_t length, off_t offset) {
    char path[4096];
    int ours = is_ours(fd, path, sizeof path);
    if (ours && fails()) return -1;
    ssize_t written = syscall(SYS_pwrite64, fd, bytes, length, offset);
    if (ours && written > 0) record('W', path, (uint64_t)offset, (uint64_t)written, bytes);
    return written;
}

ssize_t pwrite(int fd, const void *bytes, size_t length, off_t offset) { return write_at(fd, bytes, length, offset); }
ssize_t pwrite64(int fd, const void *bytes, size_t length, off64_t offset) { return write_at(fd, bytes, length, offset); }

/* Not recorded: only SQLite's files count in a record, and it writes these with pwrite. */
ssize_t write(int fd, const void *bytes, size_t length) {
    char path[4096];
    if (is_ours(fd, path, sizeof path) && fails()) return -1;
    return syscall(SYS_write, fd, bytes, length);
}

static int open_at(int folder, const char *path, int flags, mode_t mode) {
    int writes = (flags & O_ACCMODE) != O_RDONLY || (flags & O_CREAT) != 0;
    if (writes && is_below(path) && fails()) return -1;
    return (int)syscall(SYS_openat, folder, path, flags, mode);
}

#define MODE_OF(flags)                              \
    mode_t mode = 0;                                \
    if (((flags) & (O_CREAT | O_TMPFILE)) != 0) {   \
        va_list more;                               \
        va_start(more, flags);                      \
        mode = va_arg(more, mode_t);                \
        va_end(more);                               \
    }

int open(const char *path, int flags, ...) { MODE_OF(flags) return open_at(AT_FDCWD, path, flags, mode); }
int open64(const char *path, int flags, ...) { MODE_OF(flags) return open_at(AT_FDCWD, path, flags, mode); }
int openat(int folder, const char *path, int flags, ...) { MODE_OF(flags) return open_at(folder, path, flags, mode); }
int openat64(int folder, const char *path, int flags, ...) { MODE_OF(flags) return open_at(folder, path, flags, mode); }

int rename(const char *from, const char *to) {
    if (is_below(to) && fails()) return -1;
    return (int)syscall(SYS_renameat2, AT_FDCWD, from, AT_FDCWD, to, 0);
}

int unlink(const char *path) {
    if (is_below(path) && fails()) return -1;
    return (int)syscall(SYS_unlinkat, AT_FDCWD, path, 0);
}

int mkdir(const char *path, mode_t mode) {
    if (is_below(path) && fails()) return -1;
    return (int)syscall(SYS_mkdirat, AT_FDCWD, path, mode);
}

static int truncate_to(int fd, off_t length) {
    char path[4096];
    int ours = is_ours(fd, path, sizeof path);
    if (ours && fails()) return -1;
    int result = (int)syscall(SYS_ftruncate, fd, length);
    if (ours && result == 0) record('T', path, (uint64_t)length, 0, NULL);
    return result;
}

int ftruncate(int fd, off_t length) { return truncate_to(fd, length); }
int ftruncate64(int fd, off64_t length) { return truncate_to(fd, length); }

static int sync_it(int fd, long number) {
    char path[4096];
    int ours = is_ours(fd, path, sizeof path);
    if (ours && fails()) return -1;
    /* What a sync would cost the tests' own disk proves nothing here: the record alone decides what is durable. */
    int result = ours ? 0 : (int)syscall(number, fd);
    if (ours) record('S', path, 0, 0, NULL);
    return result;
}

int fsync(int fd) { return sync_it(fd, SYS_fsync); }
int fdatasync(int fd) { return sync_it(fd, SYS_fdatasync); }
