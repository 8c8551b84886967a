/* Stands between a process and its disk (LD_PRELOAD): records what is written below one folder, or lets it fail.
 *
 * HV_SHIM_FOLDER: only files below it. HV_SHIM_LOG: where the record goes; absent = nothing is recorded.
 * A record: kind (1 byte: W write, T truncate, S sync, M mark), length of the path (2), offset (8), length (8), path,
 * bytes of a write; numbers in the machine's order. shim_mark(n) puts a mark; shim_arm(nth, error, times) lets the nth
 * write, truncation or sync from now on fail with this errno, and the ones after it, `times` in all; error 0 = SIGKILL.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static long until_fault = -1, faults_left = 0, operations = 0;
static int fault_errno = 0, log_fd = -2;

static int is_ours(int fd, char *path, size_t size) {
    const char *folder = getenv("HV_SHIM_FOLDER");
    char link[64];
    if (folder == NULL || fd == log_fd) return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t length = readlink(link, path, size - 1);
    if (length <= 0) return 0;
    path[length] = 0;
    return strncmp(path, folder, strlen(folder)) == 0 && strstr(path, "-shm") == NULL;
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
    if (log_fd < 0) return;
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
