"""Makes what a guest boots: Debian's stock kernel, and an initramfs of Debian's python3 and tools.

Three layers, because they change at different speeds. The packages, unpacked, change when Debian
does. The image that is cut from them (tens of megabytes) changes when this file does. Our own code,
which the guest agent is, changes with every edit: it is a small archive of its own that is laid
over the image at each boot. Each is cached by the hash of what it is made from, and none needs
root.
"""

from __future__ import annotations

import hashlib
import json
import lzma
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tagmem.base.units import format_size
from tagmem.lab.cpio import Archive
from tagmem.lab.errors import LabFailed
from tagmem.lab.packages import (
    Report,
    World,
    cache_dir,
    locked,
    run,
    silent,
    tree_bytes,
    unpack,
)

RELEASE = "trixie"
KERNEL_PACKAGE = "linux-image-amd64"
GUEST_PACKAGES = (
    "busybox-static",
    "cxl",
    "daxctl",
    "kexec-tools",
    "kmod",
    "libpython3-stdlib",
    "memcached",
    "ndctl",
    "python3-minimal",
)
PROGRAMS = (
    "usr/bin/busybox",
    "usr/bin/cxl",
    "usr/bin/daxctl",
    "usr/bin/kmod",
    "usr/bin/memcached",
    "usr/bin/ndctl",
    "usr/sbin/kexec",
)
MODULE_LINKS = ("depmod", "insmod", "lsmod", "modinfo", "modprobe", "rmmod")
LIBRARIES = "usr/lib/x86_64-linux-gnu"
LOADER = f"{LIBRARIES}/ld-linux-x86-64.so.2"
CODE_PLACE = "usr/lib/python3/dist-packages"
"""Where Debian's python3 finds modules without being told."""

MODULE_NAMES = frozenset(
    {
        "nfit",
        "virtio_blk",
        "virtio_net",
        "virtio_mem",
        "virtio_balloon",
        "virtio_console",
        "vsock",
        "vmw_vsock_virtio_transport",
        "qemu_fw_cfg",
        "uio_pci_generic",
        "vfio-pci",
        "vfio_iommu_type1",
        "ext4",
        "overlay",
        "kmem",
        "device_dax",
        "dax_pmem",
        "dax_cxl",
        "dax_hmem",
        "virtio_pmem",
        "nd_pmem",
        "nd_e820",
        "nd_btt",
        "libnvdimm",
        "tun",
        "kvm-intel",
        "kvm-amd",
        "vhost_vsock",
        "crc32c-cryptoapi",
    }
)
"""Drivers of the image, beside all of `cxl`, `dax` and `nvdimm`; what they depend on comes too."""
MODULE_FOLDERS = ("drivers/cxl/", "drivers/dax/", "drivers/nvdimm/")

# What a guest does not need of Python's library. hashlib and random do without OpenSSL.
_STDLIB_UNWANTED = frozenset(
    {
        "test",
        "idlelib",
        "ensurepip",
        "tkinter",
        "turtledemo",
        "turtle",
        "lib2to3",
        "pydoc_data",
        "unittest",
        "__phello__",
        "curses",
        "dbm",
        "sqlite3",
        "wsgiref",
        "venv",
        "_pyrepl",
        "xmlrpc",
        "sysconfig",
        "pydoc",
        "doctest",
        "LICENSE.txt",
        "EXTERNALLY-MANAGED",
        "sitecustomize",
        "_aix_support",
        "_ios_support",
        "_apple_support",
        "__pycache__",
        "lib-dynload",
        "ssl",
    }
)
_EXTENSION_UNWANTED = re.compile(
    r"_(?:codecs_|test|ctypes_test|tkinter|sqlite3|curses|ssl|hashlib|dbm|gdbm|xx)|readline|xx"
)

# Of our own code, what an application and the agent in a guest may import.
GUEST_CODE = (
    "__init__.py",
    "base",
    "client",
    "guest",
    "io/__init__.py",
    "io/holders.py",
    "wire/__init__.py",
    "wire/guest.py",
)
_PROGRAM = """#!/usr/bin/python3
import sys
from tagmem.guest.__main__ import main
words = sys.argv[1:]
sys.exit(main(words[1:] if words[:1] == ["guest"] else words))
"""
"""The guest's `tagmem`: `run` and `guest`."""
HOST_CODE = ("__init__.py", "base", "client", "guest", "io", "ports.py", "presenter", "wire")
"""What a guest needs that is to be the host of another."""
_OURS = Path(__file__).parent.parent
_INIT = Path(__file__).with_name("init.sh")
_DEPENDS = re.compile(rb"(?:\A|\0)depends=([^\0]*)\0")


@dataclass(frozen=True)
class Image:
    """A kernel and the initramfs that fits it."""

    kernel: Path
    archive: Path
    release: str
    """The kernel's own name of its version, as `uname -r` says it."""
    packages: Path
    """The unpacked packages that it was cut from."""
    download_bytes: int
    unpacked_bytes: int


def present(cache: Path | None = None) -> Image | None:
    """The image if the cache has the one that this code would make."""
    cache = cache or cache_dir()
    folder = cache / "guest"
    try:
        document = json.loads((folder / "manifest.json").read_text())
        archive = cache / "images" / f"image-{_image_key(document)}.cpio"
        release = document["release"]
        if not (_has_all(document) and archive.is_file()):
            return None
        return Image(
            _kernel(folder, release),
            archive,
            release,
            folder / "root",
            document["download_bytes"],
            document["unpacked_bytes"],
        )
    except (OSError, ValueError, KeyError, TypeError):
        return None


def get(cache: Path | None = None, report: Report = silent, *, refresh: bool = False) -> Image:
    """The image, made if the cache does not have it.

    `refresh` looks for newer packages. Raises LabFailed when they are not within reach.
    """
    cache = cache or cache_dir()
    found = present(cache)
    if found is not None and not refresh:
        return found
    with locked(cache, report):
        found = present(cache)
        if found is not None and not refresh:
            return found
        _bring(cache, report, refresh=refresh)
        _make(cache, report)
    made = present(cache)
    if made is None:
        raise LabFailed(f"the guest image is not in {cache} after it was made")
    return made


def initrd(
    image: Image,
    folder: Path,
    cache: Path | None = None,
    *,
    source: Path | None = None,
    code: Sequence[str] = GUEST_CODE,
    files: Mapping[str, bytes] | None = None,
) -> Path:
    """Write `folder/initrd`: the image, our code of this moment over it, and `files` last.

    `source` is the package `tagmem` to take the code from, by default the one that runs, and `code`
    what of it is taken. `files`
    are by their path in the guest; what begins with `#!` may be executed.
    """
    parts = [image.archive, _code_archive(image, cache or cache_dir(), source or _OURS, code)]
    if files:
        extra = folder / "files.cpio"
        with extra.open("wb") as stream:
            archive = Archive(stream)
            for name, data in files.items():
                archive.file(name, data, 0o755 if data.startswith(b"#!") else 0o644)
            archive.close()
        parts.append(extra)
    whole = folder / "initrd"
    with whole.open("wb") as stream:
        for part in parts:
            with part.open("rb") as content:
                shutil.copyfileobj(content, stream, 1 << 20)
    return whole


# ---- packages


def _bring(cache: Path, report: Report, *, refresh: bool) -> None:
    """Have the packages unpacked in `guest/root`."""
    folder = cache / "guest"
    manifest = folder / "manifest.json"
    if manifest.is_file() and not refresh and _has_all(json.loads(manifest.read_text())):
        return
    world = World(RELEASE, cache / "apt", report)
    if refresh:
        world.refresh(age_seconds_max=0)
    release, kernel_names = _kernel_packages(world)
    closure = world.closure(GUEST_PACKAGES)
    kernel = world.exactly(kernel_names, world.backports)
    names = [f"{package.name}={package.version}" for package in (*closure, *kernel)]
    if manifest.is_file() and json.loads(manifest.read_text()).get("packages") == names:
        world.clean()
        return
    partial = cache / "guest.partial"
    shutil.rmtree(partial, ignore_errors=True)
    files = world.download([*closure, *kernel])
    report(f"unpacking the guest's packages, kernel {release}")
    unpack(files[: len(closure)], partial / "root")
    unpack(files[len(closure) :], partial / "root")
    document = {
        "release": release,
        "packages": names,
        "asked": sorted(GUEST_PACKAGES),
        "download_bytes": sum(package.size_bytes for package in (*closure, *kernel)),
        "unpacked_bytes": tree_bytes(partial),
    }
    _kernel(partial, release)
    (partial / "manifest.json").write_text(json.dumps(document, indent=1))
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)
    world.clean()


def _has_all(document: Mapping[str, object]) -> bool:
    """Whether the unpacked packages are at least those that this code asks for."""
    asked = document.get("asked")
    return isinstance(asked, list) and set(GUEST_PACKAGES) <= set(asked)


def _kernel_packages(world: World) -> tuple[str, list[str]]:
    """The newest stock kernel within reach: its release and the packages that it consists of."""
    version = world.version(KERNEL_PACKAGE)
    if not version:
        raise LabFailed(f"{world.backports} has no {KERNEL_PACKAGE}")
    prefix = "linux-image-"
    names = [name for name in world.depends(KERNEL_PACKAGE, version) if name.startswith(prefix)]
    if not names:
        raise LabFailed(f"{KERNEL_PACKAGE} {version} depends on no kernel")
    release = names[0].removeprefix(prefix)
    wanted, pending = [], [names[0]]
    while pending:
        name = pending.pop()
        if name not in wanted:
            wanted.append(name)
            # Newer kernels come in parts: linux-binary, linux-modules, linux-base of one release.
            parts = world.depends(name, world.version(name))
            pending += [part for part in parts if part.endswith(f"-{release}")]
    return release, wanted


def _kernel(folder: Path, release: str) -> Path:
    places = (f"usr/lib/modules/{release}/vmlinuz", f"boot/vmlinuz-{release}")
    for place in places:
        if (folder / "root" / place).is_file():
            return folder / "root" / place
    raise LabFailed(f"the kernel packages of {release} have no {' nor '.join(places)}")


# ---- the image


def _image_key(document: Mapping[str, object]) -> str:
    """Names an image by what it is made from: packages, this code, its first process."""
    digest = hashlib.sha256(json.dumps(document["packages"]).encode())
    for path in (Path(__file__), Path(__file__).with_name("cpio.py"), _INIT):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def _make(cache: Path, report: Report) -> None:
    folder = cache / "guest"
    document = json.loads((folder / "manifest.json").read_text())
    images = cache / "images"
    images.mkdir(exist_ok=True)
    for left in (*cache.glob("stage.*"), *cache.glob("images/*.partial")):
        # Of a process that was killed; the lock says that nobody else is at it.
        shutil.rmtree(left) if left.is_dir() else left.unlink()
    target = images / f"image-{_image_key(document)}.cpio"
    report("making the guest image")
    with tempfile.TemporaryDirectory(dir=cache, prefix="stage.") as name:
        stage = Path(name)
        _stage(folder / "root", stage, document["release"])
        partial = target.with_suffix(".partial")
        with partial.open("wb") as stream:
            archive = Archive(stream)
            for place in ("dev", "proc", "sys", "run", "tmp", "root", "mnt", "etc"):
                archive.directory(place)
            archive.character_device("dev/console", 5, 1)
            archive.character_device("dev/null", 1, 3, 0o666)
            archive.file("init", _INIT.read_bytes(), 0o755)
            archive.file("etc/passwd", b"root:x:0:0:root:/root:/bin/sh\n")
            archive.file("etc/group", b"root:x:0:\n")
            archive.file("etc/hostname", b"guest\n")
            archive.tree(stage)
            archive.close()
        partial.rename(target)
    _prune(images, "image-*.cpio", keep=3)
    report(f"the guest image is ready, {format_size(target.stat().st_size)}")


def _stage(root: Path, stage: Path, release: str) -> None:
    for name in ("bin", "sbin", "lib", "lib64"):
        (stage / "usr" / name).mkdir(parents=True)
        (stage / name).symlink_to(f"usr/{name}")
    python = _python(root)
    programs = [*PROGRAMS, f"usr/bin/{python}"]
    for program in programs:
        _copy(root, stage, program)
    (stage / "usr/bin/python3").symlink_to(python)
    for link in MODULE_LINKS:
        (stage / "usr/sbin" / link).symlink_to("../bin/kmod")
    extensions = _stage_stdlib(root, stage, python)
    dynamic = [program for program in programs if program != "usr/bin/busybox"]
    for library in _libraries(root, [*dynamic, *extensions]):
        _copy(root, stage, library)
    (stage / "usr/lib64/ld-linux-x86-64.so.2").symlink_to(f"/{LOADER}")
    for applet in run([str(root / "usr/bin/busybox"), "--list-full"], seconds=30).split():
        place = stage / "usr" / applet.removeprefix("usr/")
        if place.parent.is_dir() and not (place.exists() or place.is_symlink()):
            place.symlink_to("/usr/bin/busybox")
    _stage_modules(root, stage, release)


def _python(root: Path) -> str:
    names = sorted(path.name for path in (root / "usr/bin").glob("python3.*[0-9]"))
    if not names:
        raise LabFailed("the guest's packages have no python3")
    return names[-1]


def _copy(root: Path, stage: Path, name: str) -> None:
    """A file under its own name; of a link, what it leads to."""
    source, target = root / name, stage / name
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy2(source.resolve(), target)


def _stage_stdlib(root: Path, stage: Path, python: str) -> list[str]:
    """Python's library, compiled, without its sources; its extension modules' names."""
    library = f"usr/lib/{python}"
    target = stage / library
    shutil.copytree(
        root / library,
        target,
        ignore=lambda _, names: [
            n for n in names if n.removesuffix(".py") in _STDLIB_UNWANTED or n.startswith("config-")
        ],
    )
    _compile(root, stage, library, "-b")
    for path in target.rglob("*.py"):
        path.unlink()
    extensions = [
        f"{library}/lib-dynload/{path.name}"
        for path in sorted((root / library / "lib-dynload").glob("*.so"))
        if not _EXTENSION_UNWANTED.match(path.name)
    ]
    for name in extensions:
        _copy(root, stage, name)
    return extensions


def _compile(root: Path, stage: Path, folder: str, *options: str) -> None:
    """Compile with the guest's own python: in the guest, under emulation, it would take long."""
    libraries = str(root / LIBRARIES)
    argv = [str(root / LOADER), "--library-path", libraries, str(root / "usr/bin" / _python(root))]
    argv += ["-S", "-m", "compileall", "-q", "-f", "--invalidation-mode", "unchecked-hash"]
    argv += ["-s", str(stage), "-p", "/", *options, str(stage / folder)]
    # Without a fixed seed, sets are written in another order each time.
    environment = {"PYTHONHOME": str(root / "usr"), "PYTHONHASHSEED": "0"}
    run(argv, seconds=300, environment=environment)


def _libraries(root: Path, names: Iterable[str]) -> list[str]:
    """The shared libraries that these files need, the loader included, as the loader finds them."""
    found = {LOADER, f"{LIBRARIES}/libgcc_s.so.1"}
    argv = [str(root / LOADER), "--library-path", str(root / LIBRARIES), "--list"]
    for name in names:
        listed = run([*argv, str(root / name)], seconds=30)
        for path in re.findall(r"=> (\S+) \(0x", listed):
            if path.startswith(str(root)):
                found.add(os.path.relpath(path, root))
    return sorted(name for name in found if (root / name).exists())


# ---- kernel modules


def _stage_modules(root: Path, stage: Path, release: str) -> None:
    tree = root / "usr/lib/modules" / release
    target = stage / "usr/lib/modules" / release
    chosen = choose_modules(tree / "kernel")
    for path in chosen:
        place = target / "kernel" / path.relative_to(tree / "kernel")
        place = place.with_name(_module_name(path) + ".ko")
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(_module_bytes(path))
    for name in ("modules.builtin", "modules.order", "modules.builtin.modinfo"):
        if (tree / name).is_file():
            shutil.copy2(tree / name, target / name)
    depmod = root / "usr/sbin/depmod"
    if not depmod.is_symlink():
        depmod.symlink_to("../bin/kmod")  # its name is how kmod knows what to be
    argv = [str(root / LOADER), "--library-path", str(root / LIBRARIES), str(depmod)]
    run([*argv, "-b", str(stage), release], seconds=120)


def choose_modules(tree: Path) -> list[Path]:
    """The modules of a kernel that a guest gets, with all that they depend on."""
    files = {_key(_module_name(path)): path for path in tree.rglob("*.ko*")}
    pending = [
        name
        for name, path in files.items()
        if name in map(_key, MODULE_NAMES)
        or path.relative_to(tree).as_posix().startswith(MODULE_FOLDERS)
    ]
    chosen: dict[str, Path] = {}
    while pending:
        name = pending.pop()
        if name in chosen or name not in files:
            continue
        chosen[name] = files[name]
        depends = _DEPENDS.search(_module_bytes(files[name]))
        if depends is not None:
            pending += [_key(word) for word in depends.group(1).decode().split(",") if word]
    return sorted(chosen.values())


def _module_name(path: Path) -> str:
    return path.name.partition(".ko")[0]


def _key(name: str) -> str:
    return name.replace("-", "_")


def _module_bytes(path: Path) -> bytes:
    data = path.read_bytes()
    return lzma.decompress(data) if path.suffix == ".xz" else data


# ---- our code


def _code_archive(image: Image, cache: Path, source: Path, code: Sequence[str]) -> Path:
    files = list(_code_files(source, code))
    digest = hashlib.sha256(image.release.encode() + _PROGRAM.encode())
    for name, path in files:
        digest.update(f"{name}\0".encode() + path.read_bytes() + b"\0")
    target = cache / "images" / f"code-{digest.hexdigest()[:16]}.cpio"
    if target.is_file():
        os.utime(target)
        return target
    with tempfile.TemporaryDirectory(dir=cache, prefix="code.") as folder:
        stage = Path(folder)
        for name, path in files:
            place = stage / CODE_PLACE / name
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, place)
        _compile(image.packages, stage, CODE_PLACE)
        program = stage / "usr/bin/tagmem"
        program.parent.mkdir(parents=True)
        program.write_text(_PROGRAM)
        program.chmod(0o755)
        descriptor, partial = tempfile.mkstemp(dir=target.parent, prefix="partial.")
        with os.fdopen(descriptor, "wb") as stream:
            archive = Archive(stream)
            archive.tree(stage)
            archive.close()
    os.rename(partial, target)
    _prune(cache / "images", "code-*.cpio", keep=8)
    return target


def _code_files(source: Path, code: Sequence[str]) -> Iterable[tuple[str, Path]]:
    for name in code:
        top = source / name
        found = sorted(top.rglob("*")) if top.is_dir() else [top]
        for path in found:
            if path.is_file() and path.suffix in (".py", ".so"):
                yield f"tagmem/{path.relative_to(source).as_posix()}", path


def _prune(folder: Path, pattern: str, *, keep: int) -> None:
    """Keep the newest. A guest that boots from an older one has it open or read already."""
    files = sorted(folder.glob(pattern), key=lambda path: path.stat().st_mtime, reverse=True)
    for path in files[keep:]:
        path.unlink(missing_ok=True)
