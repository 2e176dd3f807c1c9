/* Files: reads and writes of all bytes that were asked for. */

#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <unistd.h>

#include "native.h"

Status read_all(int64_t fd, void *to, size_t n, int64_t offset) {
    char *p = to;
    while (n) {
        ssize_t got = pread((int)fd, p, n, offset);
        if (got < 0 && errno == EINTR) continue;
        if (got < 0) return NOT_READ;
        if (got == 0) return ENDS_EARLY;
        p += got, offset += got, n -= (size_t)got;
    }
    return DONE;
}

Status write_all(int64_t fd, const void *from, size_t n, int64_t offset) {
    const char *p = from;
    while (n) {
        ssize_t done = pwrite((int)fd, p, n, offset);
        if (done < 0 && errno == EINTR) continue;
        if (done < 0) return NOT_WRITTEN;
        p += done, offset += done, n -= (size_t)done;
    }
    return DONE;
}

void start_disk(int fd, int64_t offset, int64_t nbytes) {
#ifdef SYNC_FILE_RANGE_WRITE
    sync_file_range(fd, offset, nbytes, SYNC_FILE_RANGE_WRITE); /* an error here is an error of fsync, too */
#else
    (void)fd, (void)offset, (void)nbytes;
#endif
}
