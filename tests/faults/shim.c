/* Faults below Python: loaded before the C library, fails its n-th call that changes or reads files.
 * gcc -shared -fPIC -O1 -o shim.so shim.c -ldl
 * Calls on the standard streams, and opens of files outside of the trial's folder, are let through. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

static atomic_int left = -1;
static int code, once, armed;

void fault_arm(int nth, int error, int only_once) {
    atomic_store(&left, nth);
    code = error;
    once = only_once;
    armed = 1;
}

static int due(void) {
    if (!armed) return 0;
    int now = atomic_fetch_sub(&left, 1);
    if (now == 0 || (now < 0 && !once)) { errno = code; return 1; }
    return 0;
}

static int ours(const char *path) { return path && strstr(path, "/trial/"); }

#define REAL(type, name, ...) \
    static type (*real)(__VA_ARGS__); \
    if (!real) real = (type(*)(__VA_ARGS__))dlsym(RTLD_NEXT, #name)

#define ON_DESCRIPTOR(type, name, parameters, arguments, ...) \
    type name parameters { REAL(type, name, __VA_ARGS__); \
        return fd > 2 && due() ? -1 : real arguments; }

ON_DESCRIPTOR(ssize_t, pwrite64, (int fd, const void *b, size_t n, off_t o), (fd, b, n, o), int, const void *, size_t, off_t)
ON_DESCRIPTOR(ssize_t, preadv64, (int fd, const struct iovec *v, int n, off_t o), (fd, v, n, o), int, const struct iovec *, int, off_t)
ON_DESCRIPTOR(ssize_t, preadv64v2, (int fd, const struct iovec *v, int n, off_t o, int f), (fd, v, n, o, f), int, const struct iovec *, int, off_t, int)
ON_DESCRIPTOR(int, fsync, (int fd), (fd), int)
ON_DESCRIPTOR(int, ftruncate64, (int fd, off_t n), (fd, n), int, off_t)

int posix_fallocate64(int fd, off_t a, off_t n) {
    REAL(int, posix_fallocate64, int, off_t, off_t);
    return due() ? code : real(fd, a, n);
}

int open64(const char *path, int flags, ...) {
    REAL(int, open64, const char *, int, ...);
    va_list list;
    va_start(list, flags);
    mode_t mode = va_arg(list, mode_t);
    va_end(list);
    return ours(path) && due() ? -1 : real(path, flags, mode);
}

#define ON_PATH(name, parameters, arguments, ...) \
    int name parameters { REAL(int, name, __VA_ARGS__); \
        return ours(path) && due() ? -1 : real arguments; }

ON_PATH(rename, (const char *path, const char *to), (path, to), const char *, const char *)
ON_PATH(mkdir, (const char *path, mode_t mode), (path, mode), const char *, mode_t)
ON_PATH(unlink, (const char *path), (path), const char *)
ON_PATH(rmdir, (const char *path), (path), const char *)

int renameat2(int a, const char *path, int b, const char *to, unsigned flags) {
    REAL(int, renameat2, int, const char *, int, const char *, unsigned);
    return ours(path) && due() ? -1 : real(a, path, b, to, flags);
}

int unlinkat(int folder, const char *path, int flags) {
    REAL(int, unlinkat, int, const char *, int);
    return folder > 2 && due() ? -1 : real(folder, path, flags);
}
