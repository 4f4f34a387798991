"""Short programs that experiments run in a guest, on its bare python3.

They look at the kernel's own files instead of asking the guest's agent, so that what they find is
there for everybody; and they stand apart from it, where an experiment needs somebody who does not
let go.
"""

from __future__ import annotations

WATCH = """
import glob, mmap, os, sys, time
how, tag, size, wait = sys.argv[1], sys.argv[2], int(sys.argv[3]), float(sys.argv[4])

def text(path):
    with open(path) as file:
        return file.read().strip()

def bars():
    return {p for p in glob.glob('/sys/bus/pci/devices/*')
            if (text(p + '/vendor'), text(p + '/device')) == ('0x1af4', '0x1110')}

def blocks():
    return {p for p in glob.glob('/sys/devices/system/memory/memory*/state') if text(p) == 'online'}

def dax():
    for p in glob.glob('/sys/bus/dax/devices/*'):
        uuid = os.path.join(os.path.realpath(p), '..', 'uuid')
        if os.path.exists(uuid) and text(uuid) == tag:
            return '/dev/' + os.path.basename(os.path.realpath(p))

def fresh():
    for p in sorted(set(glob.glob('/dev/dax*')) - before):
        try:
            return byte(p)
        except (OSError, ValueError):
            pass

def byte(path):
    fd = os.open(path, os.O_RDWR)
    memory = mmap.mmap(fd, size)
    os.close(fd)
    return memory[:8].hex() + ' ' + path

def look():
    if how == 'dax':
        path = dax()
        return path and byte(path)
    if how == 'new':
        return fresh()
    if how == 'bar':
        for p in bars() - before:
            with open(p + '/enable', 'w') as file:
                file.write('1')
            return byte(p + '/resource2')
        return None
    new = blocks() - before
    return new and '- ' + ' '.join(sorted(os.path.basename(os.path.dirname(p)) for p in new))

known = {'bar': bars, 'ram': blocks, 'new': lambda: set(glob.glob('/dev/dax*'))}
before = known[how]() if how in known else None
print('ready', flush=True)
end = time.monotonic() + wait
while time.monotonic() < end:
    try:
        seen = look()
    except (OSError, ValueError):
        seen = None
    if seen:
        print('seen', seen, flush=True)
        break
    time.sleep(0.004)
else:
    print('absent', flush=True)
"""
"""Waits for a tag (`dax`), a new BAR (`bar`) or new memory on line (`ram`), and reads a byte."""

HOLD = """
import mmap, os, sys, time
ready, told = os.pipe()
if os.fork():
    os.close(told)
    print(os.read(ready, 400).decode(), flush=True)
    os._exit(0)
os.setsid()
if os.fork():
    os._exit(0)
for fd in 0, 1, 2:
    os.dup2(os.open('/dev/null', os.O_RDWR), fd)
sys.excepthook = lambda kind, error, trace: os.write(told, repr(error).encode())
path, size, seconds = sys.argv[1], int(sys.argv[2]), float(sys.argv[3])
if path == '-':
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    for at in range(0, size, 4096):
        memory[at] = 1
else:
    memory = mmap.mmap(os.open(path, os.O_RDWR), size)
    memory[0:1]
os.write(told, str(os.getpid()).encode())
os.close(told)
time.sleep(seconds)
"""
"""A process that has the tag (or `-`: fills new RAM) and is none of the agent's; prints its pid."""

SILENCE = """
import os, signal, sys, time
apart, told = os.pipe()
if os.fork():
    os.close(told)
    os.read(apart, 1)
    os._exit(0)
os.setsid()
if os.fork():
    os._exit(0)
os.write(told, b'.')
for fd in 0, 1, 2:
    os.dup2(os.open('/dev/null', os.O_RDWR), fd)
agents = []
for name in os.listdir('/proc'):
    try:
        with open('/proc/' + name + '/cmdline', 'rb') as file:
            if name.isdecimal() and b'tagmem.guest' in file.read().split(b'\\0'):
                agents.append(int(name))
    except OSError:
        pass
time.sleep(0.3)
for pid in agents:
    os.kill(pid, signal.SIGSTOP)
time.sleep(float(sys.argv[1]))
for pid in agents:
    os.kill(pid, signal.SIGCONT)
"""
"""The guest's agent stops answering for so many seconds."""

THERE = """
import os, sys, time
path, begun = sys.argv[1], time.monotonic()
while not os.path.exists(path):
    if time.monotonic() - begun > 5:
        sys.exit(path + ' is not there: ' + ' '.join(os.listdir('/dev')))
    time.sleep(0.01)
print(os.path.realpath(path), round((time.monotonic() - begun) * 1000))
"""
"""Waits until a path is there; where it leads, and after how many milliseconds."""

COPY = """
import mmap, os, struct, sys, time
path, size = sys.argv[1], int(sys.argv[2])
PAD = 64 * 4096

def anonymous():
    memory = mmap.mmap(-1, size + PAD, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_HUGEPAGE)
    for at in range(0, size, 4096):
        memory[at] = 1
    return memory

def far(memory):
    import ctypes
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    with open('/proc/self/pagemap', 'rb') as file:
        file.seek(start // 4096 * 8)
        entries = struct.unpack('<%dQ' % (size // 4096), file.read(size // 4096 * 8))
    return sum((e & (1 << 55) - 1) << 12 >= 1 << 32 for e in entries) / len(entries)

def once(target, source):
    begun = time.perf_counter()
    target[:] = source
    return size / (time.perf_counter() - begun) / 1e6

first, second = anonymous(), anonymous()
if path == '-':
    tagged = anonymous()
else:
    fd = os.open(path, os.O_RDWR)
    tagged = mmap.mmap(fd, size)
share = far(first)
# Emulators look pages up by low bits of their address: buffers a power of two apart collide.
one = memoryview(first)[17 * 4096:][:size]
two = memoryview(second)[41 * 4096:][:size]
tag = memoryview(tagged)[:size]
own, out, into = [], [], []
for _ in range(8):
    own.append(once(two, one))
    out.append(once(two, tag))
    into.append(once(tag, one))
print(*(sorted(rates[1:])[3] for rates in (own, out, into)), share)
"""
"""MB/s of RAM to RAM, tag to RAM, RAM to tag (medians of seven); the share of RAM above 4 GiB."""

PAGES = """
import ctypes, mmap, os, sys
libc = ctypes.CDLL(None, use_errno=True)
libc.process_vm_readv.restype = ctypes.c_ssize_t

class Vector(ctypes.Structure):
    _fields_ = [('base', ctypes.c_void_p), ('length', ctypes.c_size_t)]

fd = os.open(sys.argv[1], os.O_RDWR)
memory = mmap.mmap(fd, int(sys.argv[2]))
source = ctypes.addressof(ctypes.c_char.from_buffer(memory))
memory[0]
target = ctypes.create_string_buffer(4096)
here = Vector(ctypes.addressof(target), 4096)
there = Vector(source, 4096)
count = libc.process_vm_readv(os.getpid(), ctypes.byref(here), ctypes.c_ulong(1),
                              ctypes.byref(there), ctypes.c_ulong(1), ctypes.c_ulong(0))
print(count, os.strerror(ctypes.get_errno()) if count < 0 else 'ok')
"""
"""Whether the kernel can get at the pages behind a mapping, as O_DIRECT has to."""

KERNEL = """
import os
def text(path):
    with open(path) as file:
        return file.read().strip()
print(os.uname().release)
print(text('/proc/sys/kernel/tainted'))
print(text('/proc/version'))
"""

ONLINE = """
import sys
with open('/sys/devices/system/memory/auto_online_blocks', 'w') as file:
    file.write(sys.argv[1])
with open('/sys/devices/system/memory/auto_online_blocks') as file:
    print(file.read().strip())
"""
"""What the guest's kernel does with memory that is plugged in."""

SEARCH = """
import os, sys
tag = sys.argv[1]
forms = [tag.encode(), tag.replace('-', '').encode()]
read = 0
for top in ('/sys/devices',):
    for folder, _, names in os.walk(top):
        for name in names:
            if name not in ('uuid', 'serial', 'label', 'id', 'unique_id', 'acpi_index', 'alt_name'):
                continue
            try:
                with open(os.path.join(folder, name), 'rb') as file:
                    data = file.read(4096)
            except OSError:
                continue
            read += 1
            if any(form in data for form in forms):
                print('found', os.path.join(folder, name))
print('read', read)
"""
"""Looks for a tag in whatever the kernel says of identities."""
