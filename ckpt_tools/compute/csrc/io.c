/* Files: reads and writes of all bytes that were asked for. */

#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <unistd.h>

#include "native.h"

#define PAGE 4096 /* no address is below it */

static int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

/* Bytes that were not fetched are an error: whoever reads them has not said that it needs them. */
static Status copy_all(const InMemory *file, char *to, int64_t n, int64_t offset) {
    while (n) {
        if (offset < 0 || offset >= file->nbytes) return ENDS_EARLY;
        int64_t block = offset / file->size, stop = least(offset + n, (block + 1) * file->size);
        stop = least(stop, file->nbytes);
        int64_t begin = file->blocks[block].begin, end = file->blocks[block].end;
        if (offset < begin || end < stop) {
            errno = EIO;
            return NOT_READ;
        }
        memcpy(to, (const char *)(uintptr_t)file->blocks[block].address + (offset - begin), (size_t)(stop - offset));
        to += stop - offset, n -= stop - offset, offset = stop;
    }
    return DONE;
}

Status read_all(int64_t fd, void *to, size_t n, int64_t offset) {
    if (fd <= -PAGE) return copy_all((const InMemory *)(uintptr_t)-fd, to, (int64_t)n, offset);
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
