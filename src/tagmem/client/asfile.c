/* A DAX device that a program takes for a file.
 *
 * Linux's device-dax knows mmap(MAP_SHARED) and nothing else: ftruncate, fallocate, fsync and msync
 * fail on it (drivers/dax/device.c), so a program that sizes its "memory file" before it maps it
 * gives up. Loaded with LD_PRELOAD, this answers those calls for DAX devices alone, and only as far
 * as the answer is true: the size that a device has may be asked for, another one is refused; what
 * was stored is in the memory already, so there is nothing to write out. Everything else is passed
 * on as it is.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>
#include <unistd.h>

/* Bytes of the DAX device that `fd` is; -1: it is something else. errno stays. */
static long long dax_bytes(int fd)
{
    struct stat status;
    char path[96], target[PATH_MAX], text[32];
    long long bytes = -1;
    int before = errno;

    if (fstat(fd, &status) == 0 && S_ISCHR(status.st_mode)) {
        unsigned int major_number = major(status.st_rdev), minor_number = minor(status.st_rdev);
        snprintf(path, sizeof path, "/sys/dev/char/%u:%u/subsystem", major_number, minor_number);
        ssize_t length = readlink(path, target, sizeof target - 1);
        if (length > 4 && memcmp(target + length - 4, "/dax", 4) == 0) {
            snprintf(path, sizeof path, "/sys/dev/char/%u:%u/size", major_number, minor_number);
            int file = open(path, O_RDONLY | O_CLOEXEC);
            if (file >= 0) {
                length = read(file, text, sizeof text - 1);
                if (length > 0) {
                    text[length] = 0;
                    bytes = atoll(text);
                }
                close(file);
            }
        }
    }
    errno = before;
    return bytes;
}

static void *next(const char *name)
{
    void *found = dlsym(RTLD_NEXT, name);
    if (found == NULL) {
        fprintf(stderr, "tagmem: the C library has no %s\n", name);
        abort();
    }
    return found;
}

int ftruncate(int fd, off_t length)
{
    long long bytes = dax_bytes(fd);
    if (bytes < 0)
        return ((int (*)(int, off_t))next("ftruncate"))(fd, length);
    if (length == bytes)
        return 0;
    errno = EINVAL;
    return -1;
}

int ftruncate64(int fd, off64_t length)
{
    return ftruncate(fd, (off_t)length);
}

int posix_fallocate(int fd, off_t offset, off_t length)
{
    long long bytes = dax_bytes(fd);
    if (bytes < 0)
        return ((int (*)(int, off_t, off_t))next("posix_fallocate"))(fd, offset, length);
    if (offset < 0 || length <= 0)
        return EINVAL;
    return length <= bytes && offset <= bytes - length ? 0 : ENOSPC;
}

int posix_fallocate64(int fd, off64_t offset, off64_t length)
{
    return posix_fallocate(fd, (off_t)offset, (off_t)length);
}

int fsync(int fd)
{
    if (dax_bytes(fd) >= 0)
        return 0;
    return ((int (*)(int))next("fsync"))(fd);
}

int fdatasync(int fd)
{
    if (dax_bytes(fd) >= 0)
        return 0;
    return ((int (*)(int))next("fdatasync"))(fd);
}

/* Whether an address lies in a mapping of a DAX device, as the kernel lists them. */
static int maps_dax(const void *address)
{
    FILE *maps = fopen("/proc/self/maps", "re");
    char line[PATH_MAX + 128];
    int found = 0;

    if (maps == NULL)
        return 0;
    while (!found && fgets(line, sizeof line, maps) != NULL) {
        unsigned long start, end;
        if (sscanf(line, "%lx-%lx", &start, &end) == 2 && (unsigned long)address >= start
            && (unsigned long)address < end) {
            found = strstr(line, " /dev/dax") != NULL;
            break;
        }
    }
    fclose(maps);
    return found;
}

int msync(void *address, size_t length, int flags)
{
    int result = ((int (*)(void *, size_t, int))next("msync"))(address, length, flags);
    if (result != 0 && errno == EINVAL && maps_dax(address))
        return 0;
    return result;
}
