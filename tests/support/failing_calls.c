/* The k-th system call that concerns a folder fails, or is met by a signal; preloaded into a process by forks.py. */
#define _GNU_SOURCE
#include <dirent.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/sendfile.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <sys/syscall.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

#define MOST 8192 /* calls that are recorded */

static char root[4096];
static long seen, wanted;
static int reason, lacking;
static char record[MOST][128];

/* Let call number `at` fail with an error number, or, if that is negative, send this process a signal before it. */
void start_failing(const char *folder, long at, int with) {
    snprintf(root, sizeof root, "%s", folder);
    seen = 0, wanted = at, reason = with;
}
long calls_seen(void) { return root[0] = 0, seen; }
const char *call_number(long number) { return number < 1 || number > MOST ? "" : record[number - 1]; }
/* 1: no files without a name. 2: nor hard links, nor an exchange of two names. */
void lack(int what) { lacking = what; }

static int begins(const char *path) { return strncmp(path, root, strlen(root)) == 0; }

static const char *fd_is_there(int fd) {
    static __thread char path[4096];
    char link[64];
    if (!root[0]) return NULL;
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    long n = syscall(SYS_readlinkat, AT_FDCWD, link, path, sizeof path - 1);
    if (n <= 0) return NULL;
    path[n] = 0;
    return begins(path) ? path + strlen(root) : NULL;
}

static const char *path_is_there(int dir, const char *path) {
    int fd, used;
    if (!root[0] || !path) return NULL;
    if (sscanf(path, "/proc/self/fd/%d%n", &fd, &used) == 1) {
        if (!fd_is_there(fd)) return NULL;
        return path[used] ? path + used : fd_is_there(fd);
    }
    if (path[0] == '/') return begins(path) ? path + strlen(root) : NULL;
    return dir == AT_FDCWD || fd_is_there(dir) ? path : NULL; /* the current folder is the one */
}

static int fails(const char *there, const char *call) {
    long number;
    if (!there) return 0;
    number = __atomic_add_fetch(&seen, 1, __ATOMIC_SEQ_CST);
    if (number <= MOST) snprintf(record[number - 1], sizeof record[0], "%s %s", call, there);
    if (number != wanted) return 0;
    if (reason < 0) return kill(getpid(), -reason), 0;
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
#define WRAP_LACKED(name, there, with, arguments, ...)           \
    int name arguments {                                         \
        static __typeof__(&name) real;                           \
        if (!real) real = REAL(name);                            \
        if (lacking > 1 && there) return errno = with, -1;       \
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
        if (lacking && (f & O_TMPFILE) == O_TMPFILE && there)    \
            return errno = EOPNOTSUPP, -1;                       \
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
WRAP(ssize_t, pwritev64v2, fd_is_there(fd), (int fd, const struct iovec *v, int n, off64_t o, int f), fd, v, n, o, f)
WRAP(ssize_t, copy_file_range, fd_is_there(b), (int a, off64_t *i, int b, off64_t *o, size_t n, unsigned f), a, i, b, o,
     n, f)
WRAP(ssize_t, sendfile64, fd_is_there(b), (int b, int a, off64_t *o, size_t n), b, a, o, n)
WRAP(ssize_t, writev, fd_is_there(fd), (int fd, const struct iovec *v, int n), fd, v, n)
WRAP(int, fsync, fd_is_there(fd), (int fd), fd)
WRAP(int, fdatasync, fd_is_there(fd), (int fd), fd)
WRAP(int, ftruncate64, fd_is_there(fd), (int fd, off64_t n), fd, n)
WRAP(int, truncate64, path_is_there(AT_FDCWD, p), (const char *p, off64_t n), p, n)
WRAP(int, fallocate, fd_is_there(fd), (int fd, int m, off_t o, off_t n), fd, m, o, n)
WRAP(off64_t, lseek64, fd_is_there(fd), (int fd, off64_t o, int w), fd, o, w)
WRAP(int, fchmod, fd_is_there(fd), (int fd, mode_t m), fd, m)
WRAP(int, fchown, fd_is_there(fd), (int fd, uid_t u, gid_t g), fd, u, g)
WRAP(int, access, path_is_there(AT_FDCWD, p), (const char *p, int m), p, m)
WRAP(int, faccessat, path_is_there(d, p), (int d, const char *p, int m, int f), d, p, m, f)
WRAP(int, statvfs64, path_is_there(AT_FDCWD, p), (const char *p, struct statvfs64 *s), p, s)
WRAP(int, fstatvfs64, fd_is_there(fd), (int fd, struct statvfs64 *s), fd, s)
WRAP(int, mkdirat, path_is_there(d, p), (int d, const char *p, mode_t m), d, p, m)
WRAP(ssize_t, readlinkat, path_is_there(d, p), (int d, const char *p, char *b, size_t n), d, p, b, n)
WRAP(ssize_t, readlink, path_is_there(AT_FDCWD, p), (const char *p, char *b, size_t n), p, b, n)
WRAP(int, flock, fd_is_there(fd), (int fd, int o), fd, o)
WRAP(int, mkdir, path_is_there(AT_FDCWD, p), (const char *p, mode_t m), p, m)
WRAP(int, rmdir, path_is_there(AT_FDCWD, p), (const char *p), p)
WRAP(int, unlink, path_is_there(AT_FDCWD, p), (const char *p), p)
WRAP(int, unlinkat, path_is_there(d, p), (int d, const char *p, int f), d, p, f)
WRAP_LACKED(link, path_is_there(AT_FDCWD, b), EPERM, (const char *a, const char *b), a, b)
WRAP_LACKED(linkat, path_is_there(d, b), EPERM, (int c, const char *a, int d, const char *b, int f), c, a, d, b, f)
WRAP(int, rename, path_is_there(AT_FDCWD, b), (const char *a, const char *b), a, b)
WRAP(int, renameat, path_is_there(d, b), (int c, const char *a, int d, const char *b), c, a, d, b)
WRAP_LACKED(renameat2, path_is_there(d, b), EINVAL, (int c, const char *a, int d, const char *b, unsigned f), c, a, d,
            b, f)
WRAP(int, stat64, path_is_there(AT_FDCWD, p), (const char *p, struct stat64 *s), p, s)
WRAP(int, lstat64, path_is_there(AT_FDCWD, p), (const char *p, struct stat64 *s), p, s)
WRAP(int, fstat64, fd_is_there(fd), (int fd, struct stat64 *s), fd, s)
WRAP(int, fstatat64, path_is_there(d, p), (int d, const char *p, struct stat64 *s, int f), d, p, s, f)

int close(int fd) { /* the descriptor is gone, whatever it says */
    int bad = fails(fd_is_there(fd), "close"), with = errno;
    int done = (int)syscall(SYS_close, fd);
    return bad ? (errno = with, -1) : done;
}

void *mmap64(void *a, size_t n, int p, int f, int fd, off64_t o) {
    static __typeof__(&mmap64) real;
    if (!real) real = REAL(mmap64);
    return fd >= 0 && fails(fd_is_there(fd), "mmap64") ? MAP_FAILED : real(a, n, p, f, fd, o);
}

FILE *fopen64(const char *path, const char *mode) {
    return fails(path_is_there(AT_FDCWD, path), "fopen64") ? NULL : REAL(fopen64)(path, mode);
}

DIR *fdopendir(int fd) { return fails(fd_is_there(fd), "fdopendir") ? NULL : REAL(fdopendir)(fd); }

struct dirent64 *readdir64(DIR *folder) {
    return fails(fd_is_there(dirfd(folder)), "readdir64") ? NULL : REAL(readdir64)(folder);
}

DIR *opendir(const char *path) { /* the entries of an open folder were read at once, in so small a one */
    return fails(path_is_there(AT_FDCWD, path), "opendir") ? NULL : REAL(opendir)(path);
}
