/* Cache lines: write back, fence, invalidate.
 *
 * What Python cannot say, and nothing more: which range it is, and whether it may be touched, is
 * decided in lines.py before anything here is called. It is a plain shared library without any of
 * Python's ABI, loaded by ctypes.
 *
 * x86-64 (Intel SDM volume 2, CLWB, CLFLUSHOPT, CLFLUSH): CLWB writes a line back and may keep it,
 * CLFLUSHOPT writes it back and drops it; both are ordered by SFENCE against later stores, and by
 * MFENCE against later loads. CLFLUSH does the same and is ordered by itself. None of them needs a
 * writable mapping.
 * arm64 (Arm ARM C5.3, B2.8): DC CVAC cleans and DC CIVAC cleans and invalidates to the point of
 * coherency; DSB SY completes them. Linux allows both in user space (SCTLR_EL1.UCI).
 */
#include <stddef.h>
#include <stdint.h>

/* What tests name in their reports; lines.py has the same numbers. */
#define WAY_CLFLUSH 1u
#define WAY_CLFLUSHOPT 2u
#define WAY_CLWB 4u
#define WAY_ARM_DC 8u

#if defined(__x86_64__)
#include <cpuid.h>
#include <immintrin.h>

unsigned tagmem_lines_ways(void)
{
    /* CPUID ends in the hypervisor, where there is one: ask once. Two threads find the same. */
    static unsigned found;
    unsigned a, b, c, d, ways = 0;

    if (found)
        return found;
    if (__get_cpuid(1, &a, &b, &c, &d) && (d & (1u << 19)))
        ways |= WAY_CLFLUSH;
    if (__get_cpuid_count(7, 0, &a, &b, &c, &d)) {
        if (b & (1u << 23))
            ways |= WAY_CLFLUSHOPT;
        if (b & (1u << 24))
            ways |= WAY_CLWB;
    }
    found = ways;
    return ways;
}

size_t tagmem_lines_bytes(void)
{
    unsigned a, b, c, d;

    return __get_cpuid(1, &a, &b, &c, &d) ? (size_t)((b >> 8) & 0xff) * 8 : 0;
}

void tagmem_lines_fence(void)
{
    _mm_sfence();
}

static void order_loads(void)
{
    _mm_mfence();
}

__attribute__((target("clwb"))) static void each_clwb(uintptr_t at, uintptr_t end, size_t line)
{
    for (; at < end; at += line)
        _mm_clwb((void *)at);
}

__attribute__((target("clflushopt"))) static void each_clflushopt(uintptr_t at, uintptr_t end,
                                                                  size_t line)
{
    for (; at < end; at += line)
        _mm_clflushopt((void *)at);
}

static void each_clflush(uintptr_t at, uintptr_t end, size_t line)
{
    for (; at < end; at += line)
        _mm_clflush((const void *)at);
}

static void each(unsigned way, uintptr_t at, uintptr_t end, size_t line)
{
    if (way == WAY_CLWB)
        each_clwb(at, end, line);
    else if (way == WAY_CLFLUSHOPT)
        each_clflushopt(at, end, line);
    else
        each_clflush(at, end, line);
}

static int may_invalidate(unsigned way)
{
    return way == WAY_CLFLUSH || way == WAY_CLFLUSHOPT;
}

#elif defined(__aarch64__) && defined(__linux__)
unsigned tagmem_lines_ways(void)
{
    return WAY_ARM_DC;
}

size_t tagmem_lines_bytes(void)
{
    uint64_t ctr;

    /* CTR_EL0.DminLine: log2 of the words in the shortest data line of all caches. */
    __asm__("mrs %0, ctr_el0" : "=r"(ctr));
    return (size_t)4 << ((ctr >> 16) & 0xf);
}

void tagmem_lines_fence(void)
{
    __asm__ volatile("dsb sy" ::: "memory");
}

static void order_loads(void)
{
    __asm__ volatile("dsb sy" ::: "memory");
}

static void each(unsigned way, uintptr_t at, uintptr_t end, size_t line)
{
    (void)way;
    for (; at < end; at += line)
        __asm__ volatile("dc cvac, %0" ::"r"(at) : "memory");
}

static void each_invalidate(uintptr_t at, uintptr_t end, size_t line)
{
    for (; at < end; at += line)
        __asm__ volatile("dc civac, %0" ::"r"(at) : "memory");
}

static int may_invalidate(unsigned way)
{
    return way == WAY_ARM_DC;
}

#else /* no instructions are known: nothing is here, so nothing is ever called */

unsigned tagmem_lines_ways(void)
{
    return 0;
}

size_t tagmem_lines_bytes(void)
{
    return 0;
}

void tagmem_lines_fence(void)
{
}

static void order_loads(void)
{
}

static void each(unsigned way, uintptr_t at, uintptr_t end, size_t line)
{
    (void)way;
    (void)at;
    (void)end;
    (void)line;
}

static int may_invalidate(unsigned way)
{
    (void)way;
    return 0;
}

#endif

/* Lines that cover [at, at + length), from the first one's address; 0 for an empty range. */
static size_t covered(uintptr_t *at, size_t length, size_t line)
{
    uintptr_t begin = *at & ~(uintptr_t)(line - 1);

    if (length == 0)
        return 0;
    length += (size_t)(*at - begin);
    *at = begin;
    return (length + line - 1) / line;
}

static int is_one_that_is_here(unsigned way)
{
    return way != 0 && (way & (way - 1)) == 0 && (way & tagmem_lines_ways()) != 0;
}

/* Both return how many lines they went over, or -1 for a way that this processor does not have. */
int64_t tagmem_lines_write_back(unsigned way, uintptr_t at, size_t length, size_t line)
{
    size_t lines;

    if (!is_one_that_is_here(way))
        return -1;
    lines = covered(&at, length, line);
    each(way, at, at + lines * line, line);
    return (int64_t)lines;
}

int64_t tagmem_lines_invalidate(unsigned way, uintptr_t at, size_t length, size_t line)
{
    size_t lines;

    if (!is_one_that_is_here(way) || !may_invalidate(way))
        return -1;
    lines = covered(&at, length, line);
    order_loads();
#if defined(__aarch64__)
    each_invalidate(at, at + lines * line, line);
#else
    each(way, at, at + lines * line, line);
#endif
    order_loads();
    return (int64_t)lines;
}
