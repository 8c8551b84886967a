"""A PostgreSQL server of one's own: an unprivileged child process on a socket in a temporary folder, no TCP."""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

FAST = ("fsync=on", "max_connections=20", "shared_buffers=16MB", "listen_addresses=")
ONE_SYNC = "recovery_init_sync_method=syncfs"
"""After a crash PostgreSQL syncs each of its files, 300 for each test's database: half a minute on a busy disk."""
SINCE_VERSION = 14


def find_programs() -> Path | None:
    """The folder of initdb and postgres; Debian keeps them out of PATH."""
    found = shutil.which("initdb")
    folders = (
        [Path(found).resolve().parent] if found else sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)
    )
    return next((folder for folder in folders if (folder / "postgres").exists()), None)


class PostgreSql:
    """`start`, `stop`, `kill` (as a power cut would), `url(database)`, `close`."""

    def __init__(self, programs: Path) -> None:
        self._programs = programs
        self.folder = Path(tempfile.mkdtemp(prefix="hv-pg-"))
        self._user = self._unprivileged()
        if self._user is not None:
            shutil.chown(self.folder, self._user)
        self._process: subprocess.Popen[bytes] | None = None
        self._databases = 0
        self._run(
            "initdb", "-D", str(self._cluster), "-U", "hv", "-A", "trust", "--no-sync", "-E", "UTF8", "--locale=C"
        )

    @property
    def _cluster(self) -> Path:
        return self.folder / "cluster"

    def start(self) -> None:
        settings = (*FAST, ONE_SYNC) if self._version() >= SINCE_VERSION else FAST
        options = [word for setting in settings for word in ("-c", setting)]
        with (self.folder / "log").open("ab") as log:
            self._process = subprocess.Popen(
                [self._programs / "postgres", "-D", self._cluster, "-k", self.folder, *options],
                stdout=log,
                stderr=log,
                cwd=self.folder,
                user=self._user,
            )
        deadline_s = time.monotonic() + 30
        while subprocess.run(
            [self._programs / "pg_isready", "-q", "-h", self.folder], check=False, capture_output=True
        ).returncode:
            assert time.monotonic() < deadline_s, (self.folder / "log").read_text()
            assert self._process.poll() is None, (self.folder / "log").read_text()
            time.sleep(0.05)

    def kill(self) -> None:
        """Immediate shutdown: no checkpoint, no goodbye; the next start recovers from the write-ahead log."""
        self._end("immediate")

    def stop(self) -> None:
        self._end("fast")

    def new_database(self) -> str:
        """The address of a fresh, empty database."""
        self._databases += 1
        name = f"hv{self._databases}"
        self._run("createdb", "-h", str(self.folder), "-U", "hv", name)
        return self.url(name)

    def drop_database(self, url: str) -> None:
        """Each holds 15 MB and 300 files: together they would take minutes to remove at the end."""
        name = url.partition("@/")[2].partition("?")[0]
        self._run("dropdb", "-h", str(self.folder), "-U", "hv", "--force", name)

    def url(self, name: str) -> str:
        return f"postgresql://hv@/{name}?host={self.folder}"

    def close(self) -> None:
        if self._process is not None and self._process.poll() is None:
            self.kill()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _end(self, mode: str) -> None:
        assert self._process is not None
        self._run("pg_ctl", "stop", "-D", str(self._cluster), "-m", mode, "-w")
        self._process.wait(30)

    def _version(self) -> int:
        words = subprocess.run([self._programs / "postgres", "--version"], check=True, capture_output=True, text=True)
        return int(words.stdout.split()[2].split(".")[0])

    def _run(self, program: str, *arguments: str) -> None:
        done = subprocess.run(
            [self._programs / program, *arguments],
            capture_output=True,
            text=True,
            check=False,
            cwd=self.folder,
            user=self._user,
        )
        assert done.returncode == 0, f"{program}: {done.stdout}{done.stderr}"

    @staticmethod
    def _unprivileged() -> str | None:
        """PostgreSQL refuses to run as root."""
        if os.geteuid() != 0:
            return None
        names = {entry.pw_name for entry in pwd.getpwall()}
        return "postgres" if "postgres" in names else "nobody"
