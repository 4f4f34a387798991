/* As publish.py, with the processor's own instructions and no library: h1 publishes a message, h2
 * waits for the word and reads. The first argument is the file of the tag, the second what is
 * forgotten ("nothing" is the right program).
 *
 *     cc -O2 -g -mclflushopt -o publish publish.c
 *     tagmem check-coherence --word 256 -- ./publish {dax} flush
 */
#include <fcntl.h>
#include <immintrin.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

enum { SIZE = 65536, DATA = 4096, WORD = 256, LENGTH = 200 };

static void flush(char *at, size_t length)
{
    for (size_t i = 0; i < length; i += 64)
        _mm_clflushopt(at + i);
}

static void publish(char *memory, const char *message, const char *forgotten)
{
    memcpy(memory + DATA, message, LENGTH);
    if (strcmp(forgotten, "flush") && strcmp(forgotten, "order"))
        flush(memory + DATA, LENGTH);
    if (strcmp(forgotten, "fence"))
        _mm_sfence();
    *(volatile uint64_t *)(memory + WORD) = 1;
    flush(memory + WORD, 8);
    _mm_sfence();
    if (!strcmp(forgotten, "order")) {
        flush(memory + DATA, LENGTH);
        _mm_sfence();
    }
}

static int read_it(char *memory, const char *message, const char *forgotten)
{
    static char copy[LENGTH];

    do {
        _mm_mfence();
        flush(memory + WORD, 8);
        _mm_mfence();
    } while (*(volatile uint64_t *)(memory + WORD) != 1);
    if (strcmp(forgotten, "invalidate")) {
        flush(memory + DATA, LENGTH);
        _mm_mfence();
    }
    memcpy(copy, memory + DATA, LENGTH);
    return memcmp(copy, message, LENGTH) == 0;
}

int main(int count, char **arguments)
{
    static char message[LENGTH];
    const char *host = getenv("TAGMEM_HOST");
    int fd = count == 3 ? open(arguments[1], O_RDWR) : -1;
    char *memory = mmap(NULL, SIZE, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);

    if (memory == MAP_FAILED || host == NULL)
        return 2;
    memset(message, 'x', LENGTH);
    if (!strcmp(host, "h1"))
        publish(memory, message, arguments[2]);
    else
        printf("%s\n", read_it(memory, message, arguments[2]) ? "right" : "wrong");
    return 0;
}
