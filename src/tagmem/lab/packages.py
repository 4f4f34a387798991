"""Debian packages brought into a folder: resolved and verified by apt, unpacked, never installed.

Each release of Debian that the lab takes packages from is a `World`: apt with its own state and an
empty list of installed packages, so that what it resolves is a package's whole closure, down to the
C library. Mirrors, proxies and credentials are those of the machine's own apt configuration; only
the suite is ours. No part of this needs root.
"""

from __future__ import annotations

import fcntl
import os
import platform
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote

from tagmem.base.errors import InvalidInput
from tagmem.base.units import format_size
from tagmem.lab.errors import LabFailed

Report = Callable[[str], None]
"""Is told what is being done, a line per step."""

APT_SECONDS_MAX = 1_200
"""One run of apt; a slow mirror needs minutes for a closure of packages."""
LISTS_AGE_SECONDS_MAX = 12 * 3_600
"""Package lists older than this are fetched again before anything is resolved from them."""
KEYRINGS = ("debian-archive-keyring.gpg", "debian-archive-keyring.pgp")
RELEASES = frozenset(
    {
        "bullseye",
        "bookworm",
        "trixie",
        "forky",
        "duke",
        "sid",
        "unstable",
        "testing",
        "stable",
        "oldstable",
    }
)
UNWANTED = ("./usr/share/doc", "./usr/share/man", "./usr/share/locale", "./usr/share/lintian")
"""What is left out when a package is unpacked."""

_URI_LINE = re.compile(r"'(?P<uri>[^']+)' (?P<file>\S+) (?P<size>\d+)(?: .*)?")


def silent(_line: str) -> None:
    """The Report of a caller that is not interested."""


def cache_dir() -> Path:
    """Where the lab keeps what it made: `$TAGMEM_CACHE/lab`, else `~/.cache/tagmem/lab`."""
    given = os.environ.get("TAGMEM_CACHE")
    if given:
        return Path(given).absolute() / "lab"
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "tagmem" / "lab"


@dataclass(frozen=True)
class Package:
    """One package of a closure, as apt names its file."""

    name: str
    version: str
    file: str
    size_bytes: int


def run(argv: Sequence[str], *, seconds: float, environment: dict[str, str] | None = None) -> str:
    """What a program wrote. Raises LabFailed, with its last lines, when it fails or is too slow."""
    try:
        done = subprocess.run(
            argv,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=seconds,
            env=environment,
            check=False,
        )
    except FileNotFoundError as error:
        raise LabFailed(f"{argv[0]} is not on this machine; the lab needs it") from error
    except subprocess.TimeoutExpired as error:
        raise LabFailed(f"{Path(argv[0]).name} took more than {seconds:g} s") from error
    if done.returncode:
        said = (done.stderr or done.stdout).decode(errors="replace").strip()
        tail = "\n".join(said.splitlines()[-8:])
        raise LabFailed(f"{' '.join(argv[:6])} … ended with {done.returncode}:\n{tail}")
    return done.stdout.decode(errors="replace")


def debian_mirror(targets: str) -> str:
    """The machine's Debian archive, out of what `apt-get indextargets` says.

    Raises LabFailed when none of its sources is one.
    """
    for paragraph in targets.split("\n\n"):
        fields = dict(line.partition(": ")[::2] for line in paragraph.splitlines())
        uri, suite = fields.get("Repo-URI", ""), fields.get("Release", "")
        base, _, pocket = suite.rstrip("/").partition("-")
        if uri and base in RELEASES and pocket in ("", "updates", "backports"):
            return uri
    raise LabFailed(
        "apt of this machine has no Debian archive among its sources (apt-get indextargets): the "
        "lab takes its guests and QEMUs from one"
    )


def keyring(folder: Path = Path("/usr/share/keyrings")) -> Path:
    """The keys of Debian's releases. Raises LabFailed when they are not installed."""
    for name in KEYRINGS:
        if (folder / name).is_file():
            return folder / name
    raise LabFailed(f"no {KEYRINGS[0]} in {folder}: install the package debian-archive-keyring")


class World:
    """One release of Debian with its backports, as apt sees it from a folder of its own."""

    def __init__(
        self,
        release: str,
        folder: Path,
        report: Report = silent,
        *,
        pockets: Sequence[str] = ("updates", "backports"),
    ) -> None:
        self.release = release
        self.suites = (release, *(f"{release}-{pocket}" for pocket in pockets))
        self.folder = folder / release
        self._report = report

    @property
    def archives(self) -> Path:
        """Where downloaded packages lie until they are unpacked."""
        return self.folder / "cache" / "archives"

    @property
    def backports(self) -> str:
        """The suite of newer versions built for this release."""
        return f"{self.release}-backports"

    def refresh(self, *, age_seconds_max: float = LISTS_AGE_SECONDS_MAX) -> None:
        """Have package lists that are not older than that. Raises LabFailed when it cannot."""
        if platform.machine() != "x86_64":
            raise LabFailed(f"the lab's QEMUs and guests are amd64; this is {platform.machine()}")
        stamp = self.folder / "fresh"
        if stamp.exists() and time.time() - stamp.stat().st_mtime < age_seconds_max:
            return
        self._configure()
        self._report(f"fetching the package lists of {', '.join(self.suites)}")
        self._apt("apt-get", "update", "-qq", "-o", "APT::Update::Error-Mode=any")
        stamp.touch()

    def version(self, package: str, suite: str = "") -> str:
        """The version that the suite offers (backports when it is there), or an empty string."""
        self.refresh()
        out = self._apt("apt-cache", "policy", "-t", suite or self.backports, package)
        found = re.search(r"^ +Candidate: (\S+)$", out, re.MULTILINE)
        return found.group(1) if found and found.group(1) != "(none)" else ""

    def depends(self, package: str, version: str) -> list[str]:
        """The names in a package's Depends, first alternatives only."""
        self.refresh()
        out = self._apt("apt-cache", "show", f"{package}={version}")
        found = re.search(r"^Depends: (.*)$", out, re.MULTILINE)
        return re.findall(r"(?:^|, )([\w.+-]+)", found.group(1)) if found else []

    def closure(self, packages: Iterable[str], suite: str = "") -> list[Package]:
        """The packages with everything that they depend on; recommendations are left out."""
        self.refresh()
        chosen = ["-t", suite] if suite else []
        return parse_uris(
            self._apt("apt-get", "install", "--print-uris", "-y", "-qq", *chosen, *packages)
        )

    def exactly(self, packages: Iterable[str], suite: str) -> list[Package]:
        """These packages as the suite has them, without what they depend on."""
        self.refresh()
        return parse_uris(
            self._apt("apt-get", "download", "--print-uris", "-qq", "-t", suite, *packages)
        )

    def download(self, packages: Sequence[Package]) -> list[Path]:
        """The packages' files, checked by apt against the signed lists."""
        (self.archives / "partial").mkdir(parents=True, exist_ok=True)
        wanted = [package for package in packages if not (self.archives / package.file).exists()]
        if wanted:
            size = format_size(sum(package.size_bytes for package in wanted))
            self._report(f"downloading {len(wanted)} packages of {self.release}, {size}")
            names = [f"{package.name}={package.version}" for package in wanted]
            self._apt("apt-get", "download", "-qq", *names, folder=self.archives)
        files = [self.archives / package.file for package in packages]
        missing = [file.name for file in files if not file.is_file()]
        if missing:
            raise LabFailed(f"apt did not bring {', '.join(missing[:5])}")
        return files

    def clean(self) -> None:
        """Remove the downloaded files and apt's caches; what was unpacked from them stays."""
        shutil.rmtree(self.folder / "cache", ignore_errors=True)

    def _apt(self, program: str, *arguments: str, folder: Path | None = None) -> str:
        environment = {**os.environ, "APT_CONFIG": str(self.folder / "first.conf"), "LC_ALL": "C"}
        if folder is not None:
            # apt-get download writes where it stands.
            program = shutil.which(program) or program
            argv = ["env", "--chdir", str(folder), program, *arguments]
        else:
            argv = [program, *arguments]
        return run(argv, seconds=APT_SECONDS_MAX, environment=environment)

    def _configure(self) -> None:
        for part in ("state/lists/partial", "cache/archives/partial"):
            (self.folder / part).mkdir(parents=True, exist_ok=True)
        self.folder.chmod(0o700)  # a mirror's address may carry a password
        mirror = debian_mirror(run(["apt-get", "indextargets"], seconds=60))
        signed = f"[arch=amd64 signed-by={keyring()}]"
        lines = [f"deb {signed} {mirror} {suite} main\n" for suite in self.suites]
        (self.folder / "sources.list").write_text("".join(lines))
        (self.folder / "status").write_text("")
        # Apt reads the machine's apt.conf.d between the two, so ours has the last word and keeps
        # what it says of proxies and credentials.
        last = self.folder / "last.conf"
        (self.folder / "first.conf").write_text(f'Dir::Etc::main "{last}";\n')
        last.write_text(apt_configuration(self.folder, Path("/etc/apt/apt.conf").is_file()))


def apt_configuration(folder: Path, has_main: bool) -> str:
    """What makes apt work within a folder, for any user, without hooks that touch the machine."""
    settings = {
        "Dir::Etc::sourcelist": folder / "sources.list",
        "Dir::Etc::sourceparts": "/dev/null",
        "Dir::Etc::preferences": "/dev/null",
        "Dir::Etc::preferencesparts": "/dev/null",
        "Dir::State": folder / "state",
        "Dir::State::status": folder / "status",
        "Dir::Cache": folder / "cache",
        "Dir::Cache::pkgcache": "pkgcache.bin",
        "Dir::Cache::srcpkgcache": "srcpkgcache.bin",
        "APT::Architecture": "amd64",
        "APT::Install-Recommends": "false",
        "APT::Sandbox::User": "root",  # the folder is ours, not _apt's; means nothing to others
        "Acquire::GzipIndexes": "true",
        "Acquire::Languages": "none",
        "Acquire::Retries": "3",
        "Debug::NoLocking": "1",
    }
    hooks = ("APT::Update::Pre-Invoke", "APT::Update::Post-Invoke", "DPkg::Pre-Install-Pkgs")
    cleared = (
        *hooks,
        "APT::Update::Post-Invoke-Success",
        "DPkg::Post-Invoke",
        "APT::Architectures",
    )
    lines = ['#include "/etc/apt/apt.conf";'] if has_main else []
    lines += [f"#clear {name};" for name in cleared]
    lines += [f'{name} "{value}";' for name, value in settings.items()]
    return "\n".join(lines) + "\n"


def parse_uris(printed: str) -> list[Package]:
    """What `--print-uris` listed. Raises LabFailed for an empty answer."""
    packages = []
    for line in printed.splitlines():
        found = _URI_LINE.fullmatch(line.strip())
        if found is None:
            continue
        parts = found["file"].removesuffix(".deb").split("_")
        if len(parts) < 3:
            raise LabFailed(f"apt named a file that is no package: {line[:200]}")
        packages.append(Package(parts[0], unquote(parts[1]), found["file"], int(found["size"])))
    if not packages:
        raise LabFailed("apt found nothing to download")
    return packages


def unpack(files: Iterable[Path], root: Path, only: Sequence[str] = ()) -> None:
    """Unpack packages into one tree, as a system with merged /usr has it.

    `only` are shell patterns (`./usr/lib/*`) of members to take; all when it is empty.
    """
    root.mkdir(parents=True, exist_ok=True)
    for name in ("bin", "sbin", "lib", "lib64"):
        (root / "usr" / name).mkdir(parents=True, exist_ok=True)
        if not (root / name).is_symlink():
            (root / name).symlink_to(f"usr/{name}")
    tar = ["tar", "-x", "-C", str(root), "--no-same-owner", "--keep-directory-symlink"]
    tar += [f"--exclude={pattern}" for pattern in UNWANTED]
    if only:
        tar += ["--wildcards", *only]
    for file in files:
        with subprocess.Popen(
            ["dpkg-deb", "--fsys-tarfile", str(file)], stdout=subprocess.PIPE
        ) as source:
            try:
                done = subprocess.run(tar, stdin=source.stdout, capture_output=True, check=False)
            finally:
                if source.stdout is not None:
                    source.stdout.close()
        if done.returncode or (source.returncode and not only):
            said = done.stderr.decode(errors="replace").strip().splitlines()
            raise LabFailed(f"{file.name} cannot be unpacked: {said[-1] if said else 'damaged'}")


def upstream_version(version: str) -> tuple[int, int]:
    """(10, 0) out of `1:10.0.2+ds-2+deb13u1~bpo12+1`. Raises InvalidInput where there is none."""
    found = re.match(r"(?:\d+:)?(\d+)\.(\d+)", version)
    if found is None:
        raise InvalidInput("version", "a Debian version such as 1:10.0.2+ds-2", version)
    return int(found.group(1)), int(found.group(2))


@contextmanager
def locked(cache: Path, report: Report = silent) -> Iterator[None]:
    """Be the only process that fills the cache; wait for another one that does."""
    cache.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(cache / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            report(f"waiting for another process that is filling {cache}")
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def tree_bytes(folder: Path) -> int:
    """What a tree's files take, each counted once."""
    return sum(
        os.lstat(os.path.join(top, name)).st_size
        for top, _, names in os.walk(folder)
        for name in names
    )
