/* Every access of a program to a tag, told to `tagmem check-coherence` before it happens.
 *
 * Loaded by LD_PRELOAD, so that any program can be looked at as it is. A file that is named in
 * TAGMEM_TRACE_VIEWS ("device:inode:host,...") is mapped without permissions: each access faults,
 * is reported over a socket (TAGMEM_TRACE_SOCKET), waits for its turn, and is then let through for
 * one instruction (the trap flag), after which the page is closed again. What the instruction is,
 * and what it sees, is decided at the other end (check.py, instructions.py); nothing is judged here.
 *
 * Fences do not fault. So after an instruction for which the other end wants to know when it is
 * fenced, the program goes on instruction by instruction until SFENCE, MFENCE or GCC's full barrier
 * comes, or FENCE_STEPS_MAX is used up.
 *
 * Only x86-64 Linux has the means; elsewhere this file is empty, and check-coherence says so.
 */
#if defined(__x86_64__) && defined(__linux__)
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <sys/un.h>
#include <time.h>
#include <ucontext.h>
#include <unistd.h>

#define PAGE 4096ul
#define REGIONS_MAX 64
#define VIEWS_MAX 64
#define PAGES_OPEN_MAX 40
#define TRACE_MAX 1536
#define FENCE_STEPS_MAX 3000000u
#define TRAP_FLAG 0x100
#define FAULT_WRITE 2
#define OUTSIDE (~0ul)
#define LOST 125 /* exit code when the other end has gone */

/* Numbers that trace.py has as well. */
enum kind { ACCESS = 1, DONE = 2, FENCE = 3, PAUSE = 4, UNFENCED = 5, HELLO = 6 };
enum answer { GO = 'g', GO_TO_FENCE = 'f' };

struct event {
    uint32_t kind, host;
    uint64_t offset, pc, caller, source, target;
    uint32_t write, pid, tid, trace_bytes;
    uint8_t code[16];
    char trace[TRACE_MAX];
};

struct region {
    uintptr_t at;
    size_t length;
    uint64_t offset;
    uint32_t host;
    int protection;
};

struct thread {
    int socket, opened, hunting;
    unsigned left;
    uint32_t host;
    uintptr_t open[PAGES_OPEN_MAX];
    int protections[PAGES_OPEN_MAX];
};

static struct region regions[REGIONS_MAX];
static struct { dev_t device; ino_t inode; uint32_t host; } views[VIEWS_MAX];
static int views_count, trace_pipe[2] = {-1, -1}, trace_signal, ready;
static volatile int trace_lock;
static __thread struct thread self __attribute__((tls_model("initial-exec"))) = {.socket = -1};

static void *(*real_mmap)(void *, size_t, int, int, int, off_t);
static int (*real_munmap)(void *, size_t);
static int (*real_sigaction)(int, const struct sigaction *, struct sigaction *);
static int (*real_clock_nanosleep)(clockid_t, int, const struct timespec *, struct timespec *);

/* ---- what is mapped */

static struct region *region_at(uintptr_t at)
{
    for (int i = 0; i < REGIONS_MAX; i++)
        if (regions[i].length && at - regions[i].at < regions[i].length)
            return &regions[i];
    return NULL;
}

static void forget(uintptr_t at, size_t length)
{
    for (int i = 0; i < REGIONS_MAX; i++) {
        struct region *r = &regions[i];
        if (r->length && at <= r->at && r->at + r->length <= at + length)
            r->length = 0;
    }
}

static void remember(uintptr_t at, size_t length, uint64_t offset, uint32_t host, int protection)
{
    for (int i = 0; i < REGIONS_MAX; i++)
        if (!regions[i].length) {
            regions[i] = (struct region){at, (length + PAGE - 1) & ~(PAGE - 1), offset, host,
                                         protection};
            mprotect((void *)at, length, PROT_NONE);
            return;
        }
    static const char full[] = "tagmem: too many mappings of a tag to trace\n";
    (void)!write(2, full, sizeof full - 1);
    _exit(LOST);
}

/* ---- what is said */

static void say(struct event *event)
{
    size_t length = offsetof(struct event, trace) + event->trace_bytes;
    ssize_t sent;

    event->pid = (uint32_t)getpid();
    event->tid = (uint32_t)syscall(SYS_gettid);
    if (self.socket < 0) {
        struct sockaddr_un address = {.sun_family = AF_UNIX};
        const char *path = getenv("TAGMEM_TRACE_SOCKET");
        int fd = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0);

        strncpy(address.sun_path, path ? path : "", sizeof address.sun_path - 1);
        if (fd < 0 || connect(fd, (struct sockaddr *)&address, sizeof address) < 0)
            _exit(LOST);
        /* Out of the way of programs that count on low numbers. */
        self.socket = fcntl(fd, F_DUPFD_CLOEXEC, 500);
        if (self.socket < 0)
            self.socket = fd;
        else
            close(fd);
    }
    do
        sent = send(self.socket, event, length, MSG_NOSIGNAL);
    while (sent < 0 && errno == EINTR);
    if (sent < 0)
        _exit(LOST);
}

static char hear(void)
{
    char answer = 0;
    ssize_t got;

    do
        got = recv(self.socket, &answer, 1, 0);
    while (got < 0 && errno == EINTR);
    if (got != 1)
        _exit(LOST);
    return answer;
}

/* The Python stack, by faulthandler, whose handler may run at any point of a program. */
static void stack(struct event *event)
{
    ssize_t got;

    if (trace_pipe[0] < 0)
        return;
    while (__atomic_exchange_n(&trace_lock, 1, __ATOMIC_ACQUIRE))
        ;
    raise(trace_signal);
    got = read(trace_pipe[0], event->trace, TRACE_MAX);
    event->trace_bytes = got > 0 ? (uint32_t)got : 0;
    if (got == TRACE_MAX) {
        char rest[512];
        while (read(trace_pipe[0], rest, sizeof rest) > 0)
            ;
    }
    __atomic_store_n(&trace_lock, 0, __ATOMIC_RELEASE);
}

static void pipes(void)
{
    int fresh[2];

    if (pipe2(fresh, O_CLOEXEC | O_NONBLOCK) < 0)
        return;
    for (int i = 0; i < 2; i++) {
        if (trace_pipe[i] < 0)
            trace_pipe[i] = fcntl(fresh[i], F_DUPFD_CLOEXEC, 500);
        else
            dup3(fresh[i], trace_pipe[i], O_CLOEXEC);
        close(fresh[i]);
    }
}

static void arm_python(void)
{
    int (*initialized)(void) = (int (*)(void))dlsym(RTLD_DEFAULT, "Py_IsInitialized");
    int (*ensure)(void) = (int (*)(void))dlsym(RTLD_DEFAULT, "PyGILState_Ensure");
    void (*release)(int) = (void (*)(int))dlsym(RTLD_DEFAULT, "PyGILState_Release");
    int (*run)(const char *) = (int (*)(const char *))dlsym(RTLD_DEFAULT, "PyRun_SimpleString");
    char code[200];
    int state;

    if (trace_pipe[0] >= 0 || !initialized || !ensure || !release || !run || !initialized())
        return;
    pipes();
    trace_signal = SIGRTMIN + 13;
    snprintf(code, sizeof code,
             "import faulthandler\n"
             "faulthandler.register(%d, file=%d, all_threads=False, chain=False)\n",
             trace_signal, trace_pipe[1]);
    state = ensure();
    run(code);
    release(state);
}

/* ---- faults and steps */

static void copy_code(uint8_t *to, uintptr_t pc)
{
    size_t safe = PAGE - (pc & (PAGE - 1));

    if (safe >= 16) {
        memcpy(to, (void *)pc, 16);
        return;
    }
    struct iovec mine = {to, 16};
    struct iovec theirs[2] = {{(void *)pc, safe}, {(void *)(pc + safe), 16 - safe}};
    process_vm_readv(getpid(), &mine, 1, theirs, 2, 0);
}

static uint64_t offset_of(uintptr_t at)
{
    struct region *r = region_at(at);

    return r ? r->offset + (at - r->at) : OUTSIDE;
}

static void on_fault(int number, siginfo_t *info, void *context)
{
    ucontext_t *at = context;
    greg_t *registers = at->uc_mcontext.gregs;
    uintptr_t address = (uintptr_t)info->si_addr;
    struct region *r = region_at(address);
    int kept = errno;

    if (!r || self.opened == PAGES_OPEN_MAX) {
        /* A fault of the program's own: it comes again, and ends it. */
        struct sigaction plain = {.sa_handler = SIG_DFL};
        real_sigaction(number, &plain, NULL);
        return;
    }
    struct event event = {
        .kind = ACCESS,
        .host = r->host,
        .offset = r->offset + (address - r->at),
        .pc = (uint64_t)registers[REG_RIP],
        .source = offset_of((uintptr_t)registers[REG_RSI]),
        .target = offset_of((uintptr_t)registers[REG_RDI]),
        .write = !!(registers[REG_ERR] & FAULT_WRITE),
    };
    event.caller = *(uint64_t *)registers[REG_RSP];
    copy_code(event.code, event.pc);
    stack(&event);
    self.host = r->host;
    say(&event);
    if (hear() == GO_TO_FENCE) {
        self.hunting = 1;
        self.left = FENCE_STEPS_MAX;
    }
    uintptr_t page = address & ~(PAGE - 1);
    self.open[self.opened] = page;
    self.protections[self.opened++] = r->protection;
    mprotect((void *)page, PAGE, r->protection);
    registers[REG_EFL] |= TRAP_FLAG;
    errno = kept;
}

static int is_fence(uintptr_t pc)
{
    const uint8_t *code = (const uint8_t *)pc;

    if ((pc & (PAGE - 1)) > PAGE - 6)
        return 0; /* not read over the end of a page; no compiler puts one there often */
    if (code[0] == 0x0f && code[1] == 0xae)
        return code[2] >= 0xf0; /* MFENCE F0, SFENCE F8 */
    if (code[0] == 0xf0) {
        /* LOCK OR $0,(%rsp): a full barrier, as compilers write it. */
        code += 1 + (code[1] == 0x48);
        return code[0] == 0x83 && code[1] == 0x0c && code[2] == 0x24;
    }
    return 0;
}

static void on_step(int number, siginfo_t *info, void *context)
{
    greg_t *registers = ((ucontext_t *)context)->uc_mcontext.gregs;
    int kept = errno;

    (void)number;
    (void)info;
    if (self.opened) {
        struct event done = {.kind = DONE, .host = self.host};
        while (self.opened) {
            self.opened--;
            mprotect((void *)self.open[self.opened], PAGE, PROT_NONE);
        }
        say(&done);
    }
    if (self.hunting) {
        struct event found = {.kind = FENCE, .host = self.host, .pc = registers[REG_RIP]};
        int fence = is_fence((uintptr_t)registers[REG_RIP]);

        if (fence || --self.left == 0) {
            self.hunting = 0;
            if (!fence)
                found.kind = UNFENCED;
            say(&found);
            hear();
        }
    }
    if (!self.hunting)
        registers[REG_EFL] &= ~TRAP_FLAG;
    errno = kept;
}

/* A process says that it is there before it does anything, so that its turn can be waited for. */
static void hello(void)
{
    struct event event = {.kind = HELLO};

    say(&event);
    hear();
}

static void in_child(void)
{
    if (self.socket >= 0)
        close(self.socket);
    self.socket = -1;
    trace_lock = 0;
    if (trace_pipe[0] >= 0)
        pipes();
    hello();
}

__attribute__((constructor)) static void begin(void)
{
    const char *list = getenv("TAGMEM_TRACE_VIEWS");
    unsigned long device, inode, host;
    int used;

    real_mmap = dlsym(RTLD_NEXT, "mmap");
    real_munmap = dlsym(RTLD_NEXT, "munmap");
    real_sigaction = dlsym(RTLD_NEXT, "sigaction");
    real_clock_nanosleep = dlsym(RTLD_NEXT, "clock_nanosleep");
    while (list && views_count < VIEWS_MAX &&
           sscanf(list, "%lu:%lu:%lu%n", &device, &inode, &host, &used) == 3) {
        views[views_count].device = device;
        views[views_count].inode = inode;
        views[views_count++].host = (uint32_t)host;
        list += used;
        list += *list == ',';
    }
    if (!views_count)
        return;
    struct sigaction fault = {.sa_sigaction = on_fault, .sa_flags = SA_SIGINFO | SA_RESTART};
    struct sigaction step = {.sa_sigaction = on_step, .sa_flags = SA_SIGINFO | SA_RESTART};
    real_sigaction(SIGSEGV, &fault, NULL);
    real_sigaction(SIGTRAP, &step, NULL);
    pthread_atfork(NULL, NULL, in_child);
    ready = 1;
    hello();
}

/* ---- in place of libc's */

void *mmap(void *at, size_t length, int protection, int flags, int fd, off_t offset)
{
    if (!real_mmap)
        return (void *)syscall(SYS_mmap, at, length, protection, flags, fd, offset);
    void *mapped = real_mmap(at, length, protection, flags, fd, offset);
    struct stat status;

    if (mapped == MAP_FAILED || !ready)
        return mapped;
    forget((uintptr_t)mapped, length);
    if (fd < 0 || !(flags & MAP_SHARED) || fstat(fd, &status) < 0)
        return mapped;
    for (int i = 0; i < views_count; i++)
        if (views[i].device == status.st_dev && views[i].inode == status.st_ino) {
            arm_python();
            remember((uintptr_t)mapped, length, (uint64_t)offset, views[i].host, protection);
            break;
        }
    return mapped;
}

void *mmap64(void *at, size_t length, int protection, int flags, int fd, off_t offset)
{
    return mmap(at, length, protection, flags, fd, offset);
}

int munmap(void *at, size_t length)
{
    if (ready)
        forget((uintptr_t)at, (length + PAGE - 1) & ~(PAGE - 1));
    return real_munmap ? real_munmap(at, length) : (int)syscall(SYS_munmap, at, length);
}

static int is_ours(int number)
{
    return ready && (number == SIGSEGV || number == SIGTRAP);
}

int sigaction(int number, const struct sigaction *action, struct sigaction *old)
{
    if (!real_sigaction)
        real_sigaction = dlsym(RTLD_NEXT, "sigaction");
    if (!is_ours(number))
        return real_sigaction(number, action, old);
    if (old)
        memset(old, 0, sizeof *old);
    return 0;
}

/* Sleeping is waiting for somebody else's turn: it takes no time here, and a turn. */
static int pause_instead(void)
{
    struct event event = {.kind = PAUSE, .host = self.host};

    if (self.socket < 0)
        return 0;
    say(&event);
    hear();
    return 1;
}

int clock_nanosleep(clockid_t clock, int flags, const struct timespec *request,
                    struct timespec *left)
{
    if (pause_instead())
        return 0;
    return real_clock_nanosleep(clock, flags, request, left);
}

int nanosleep(const struct timespec *request, struct timespec *left)
{
    if (pause_instead())
        return 0;
    return (int)syscall(SYS_nanosleep, request, left);
}

int usleep(useconds_t microseconds)
{
    struct timespec request = {microseconds / 1000000, (long)(microseconds % 1000000) * 1000};

    return nanosleep(&request, NULL);
}
#else
typedef int tagmem_no_tracer_here;
#endif
