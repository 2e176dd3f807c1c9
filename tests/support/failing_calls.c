/* The k-th system call that concerns a folder fails; preloaded into a process by failing_calls.py. */
#define _GNU_SOURCE
#include <dirent.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

static char root[4096];
static long seen, wanted;
static int reason;
static char failed[64];

void start_failing(const char *folder, long at, int with) {
    snprintf(root, sizeof root, "%s", folder);
    seen = 0, wanted = at, reason = with, failed[0] = 0;
}
long calls_seen(void) { return root[0] = 0, seen; }
const char *failed_call(void) { return failed; }

static int begins(const char *path) { return strncmp(path, root, strlen(root)) == 0; }

static int fd_is_there(int fd) {
    char link[64], path[4096];
    if (!root[0]) return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    long n = syscall(SYS_readlinkat, AT_FDCWD, link, path, sizeof path - 1);
    if (n <= 0) return 0;
    path[n] = 0;
    return begins(path);
}

static int path_is_there(int dir, const char *path) {
    int fd;
    if (!root[0] || !path) return 0;
    if (sscanf(path, "/proc/self/fd/%d", &fd) == 1) return fd_is_there(fd);
    if (path[0] == '/') return begins(path);
    return dir == AT_FDCWD || fd_is_there(dir); /* the current folder is the one */
}

static int fails(int there, const char *call) {
    if (!there || __atomic_add_fetch(&seen, 1, __ATOMIC_SEQ_CST) != wanted) return 0;
    snprintf(failed, sizeof failed, "%s", call);
    errno = reason;
    return 1;
}

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))
#define WRAP(type, name, there, arguments, ...)                  \
    type name arguments {                                        \
        static __typeof__(&name) real;                           \
        if (!real) real = REAL(name);                            \
        if (fails(there, #name)) return -1;                      \
        return real(__VA_ARGS__);                                \
    }
#define WRAP_OPEN(name, there, arguments, last, ...)             \
    int name arguments {                                         \
        static int (*real)();                                    \
        va_list list;                                            \
        va_start(list, last);                                    \
        int mode = va_arg(list, int);                            \
        va_end(list);                                            \
        if (!real) real = (int (*)())dlsym(RTLD_NEXT, #name);    \
        if (fails(there, #name)) return -1;                      \
        return real(__VA_ARGS__, mode);                          \
    }

WRAP_OPEN(open, path_is_there(AT_FDCWD, p), (const char *p, int f, ...), f, p, f)
WRAP_OPEN(open64, path_is_there(AT_FDCWD, p), (const char *p, int f, ...), f, p, f)
WRAP_OPEN(openat, path_is_there(d, p), (int d, const char *p, int f, ...), f, d, p, f)
WRAP_OPEN(openat64, path_is_there(d, p), (int d, const char *p, int f, ...), f, d, p, f)
WRAP(ssize_t, read, fd_is_there(fd), (int fd, void *b, size_t n), fd, b, n)
WRAP(ssize_t, pread, fd_is_there(fd), (int fd, void *b, size_t n, off_t o), fd, b, n, o)
WRAP(ssize_t, pread64, fd_is_there(fd), (int fd, void *b, size_t n, off64_t o), fd, b, n, o)
WRAP(ssize_t, preadv, fd_is_there(fd), (int fd, const struct iovec *v, int n, off_t o), fd, v, n, o)
WRAP(ssize_t, preadv64, fd_is_there(fd), (int fd, const struct iovec *v, int n, off64_t o), fd, v, n, o)
WRAP(ssize_t, preadv64v2, fd_is_there(fd), (int fd, const struct iovec *v, int n, off64_t o, int f), fd, v, n, o, f)
WRAP(ssize_t, write, fd_is_there(fd), (int fd, const void *b, size_t n), fd, b, n)
WRAP(ssize_t, pwrite, fd_is_there(fd), (int fd, const void *b, size_t n, off_t o), fd, b, n, o)
WRAP(ssize_t, pwrite64, fd_is_there(fd), (int fd, const void *b, size_t n, off64_t o), fd, b, n, o)
WRAP(ssize_t, pwritev64, fd_is_there(fd), (int fd, const struct iovec *v, int n, off64_t o), fd, v, n, o)
WRAP(ssize_t, copy_file_range, fd_is_there(b), (int a, off64_t *i, int b, off64_t *o, size_t n, unsigned f), a, i, b, o,
     n, f)
WRAP(int, fsync, fd_is_there(fd), (int fd), fd)
WRAP(int, fdatasync, fd_is_there(fd), (int fd), fd)
WRAP(int, ftruncate64, fd_is_there(fd), (int fd, off64_t n), fd, n)
WRAP(int, fallocate, fd_is_there(fd), (int fd, int m, off_t o, off_t n), fd, m, o, n)
WRAP(off64_t, lseek64, fd_is_there(fd), (int fd, off64_t o, int w), fd, o, w)
WRAP(int, fchmod, fd_is_there(fd), (int fd, mode_t m), fd, m)
WRAP(int, fchown, fd_is_there(fd), (int fd, uid_t u, gid_t g), fd, u, g)
WRAP(int, flock, fd_is_there(fd), (int fd, int o), fd, o)
WRAP(int, mkdir, path_is_there(AT_FDCWD, p), (const char *p, mode_t m), p, m)
WRAP(int, rmdir, path_is_there(AT_FDCWD, p), (const char *p), p)
WRAP(int, unlink, path_is_there(AT_FDCWD, p), (const char *p), p)
WRAP(int, unlinkat, path_is_there(d, p), (int d, const char *p, int f), d, p, f)
WRAP(int, link, path_is_there(AT_FDCWD, b), (const char *a, const char *b), a, b)
WRAP(int, linkat, path_is_there(d, b), (int c, const char *a, int d, const char *b, int f), c, a, d, b, f)
WRAP(int, rename, path_is_there(AT_FDCWD, b), (const char *a, const char *b), a, b)
WRAP(int, renameat2, path_is_there(d, b), (int c, const char *a, int d, const char *b, unsigned f), c, a, d, b, f)
WRAP(int, stat64, path_is_there(AT_FDCWD, p), (const char *p, struct stat64 *s), p, s)
WRAP(int, lstat64, path_is_there(AT_FDCWD, p), (const char *p, struct stat64 *s), p, s)
WRAP(int, fstat64, fd_is_there(fd), (int fd, struct stat64 *s), fd, s)
WRAP(int, fstatat64, path_is_there(d, p), (int d, const char *p, struct stat64 *s, int f), d, p, s, f)

int close(int fd) { /* the descriptor is gone, whatever it says */
    int bad = fails(fd_is_there(fd), "close"), with = errno;
    int done = (int)syscall(SYS_close, fd);
    return bad ? (errno = with, -1) : done;
}

DIR *opendir(const char *path) {
    return fails(path_is_there(AT_FDCWD, path), "opendir") ? NULL : REAL(opendir)(path);
}
