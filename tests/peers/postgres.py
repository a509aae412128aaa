"""A real PostgreSQL for the tests, which may be ended and started again."""

import contextlib
import itertools
import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

_STARTS_S = 60
_OWNER = "postgres"
_SETTINGS = ("fsync=off", "listen_addresses=", "max_connections=200", "timezone=Asia/Kolkata")

_DISCONNECT = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = '{}'"


class Postgres:
    """Reached by a Unix socket in `folder`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._as_user = _as_user()
        self._numbers = itertools.count()
        self._free: list[str] = []
        self._process: subprocess.Popen[bytes] | None = None
        user = _user()
        if user:
            os.chown(folder, user.pw_uid, user.pw_gid)
        self._run("initdb", "--no-sync", "--auth=trust", f"--username={_OWNER}", "--encoding=UTF8")
        self.start()

    def start(self) -> None:
        """Nothing is done if it runs. It ends with the thread that calls this."""
        if self._process:
            return
        settings = [f"-c{it}" for it in (*_SETTINGS, f"unix_socket_directories={self.folder}")]
        with (self.folder / "log").open("ab") as log:
            self._process = subprocess.Popen(
                [*self._as_user, str(_program("postgres")), "-D", str(self._data), *settings],
                stdout=log,
                stderr=log,
                cwd=self.folder,
                start_new_session=True,
            )
        deadline = time.monotonic() + _STARTS_S
        while not self._answers():
            assert self._process.poll() is None, (self.folder / "log").read_text()
            assert time.monotonic() < deadline, "PostgreSQL did not start"
            time.sleep(0.02)

    def stop(self) -> None:
        """At once, as a crash does."""
        if self._process:
            self._process.send_signal(signal.SIGQUIT)
            self._process.wait(30)
            self._process = None

    @contextlib.contextmanager
    def hanging(self) -> Iterator[None]:
        """It takes connections and says nothing."""
        server = psutil.Process(self.pid)
        processes = [server, *server.children(recursive=True)]
        try:
            for process in processes:
                process.suspend()
            yield
        finally:
            for process in processes:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.resume()

    @property
    def pid(self) -> int:
        """Of the process whose children the others are."""
        assert self._process
        return self._process.pid

    def url(self, database: str) -> str:
        return f"postgresql://{_OWNER}@/{database}?host={self.folder}"

    @contextlib.contextmanager
    def database(self) -> Iterator[str]:
        """The name of an empty one."""
        if self._free:
            name = self._free.pop()
            self.sql(_DISCONNECT.format(name), "postgres")
            self.sql("DROP SCHEMA public CASCADE; CREATE SCHEMA public", name)
        else:
            name = f"test{next(self._numbers)}"
            self.sql(f"CREATE DATABASE {name}", "postgres")
        yield name
        self._free.append(name)

    def sql(self, statement: str, database: str) -> list[str]:
        """The lines that psql prints: a row each, `|` between its columns."""
        done = subprocess.run(
            [
                *(str(_program("psql")), "--no-psqlrc", "--quiet", "--tuples-only", "--no-align"),
                *("--set=ON_ERROR_STOP=1", f"--host={self.folder}", f"--username={_OWNER}"),
                *(f"--dbname={database}", "--file=-"),
            ],
            input=statement,
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.splitlines()

    @property
    def _data(self) -> Path:
        return self.folder / "data"

    def _answers(self) -> bool:
        command = [str(_program("pg_isready")), "--quiet", f"--host={self.folder}"]
        return subprocess.run(command, timeout=60).returncode == 0

    def _run(self, program: str, *arguments: str) -> None:
        command = [*self._as_user, str(_program(program)), "-D", str(self._data), *arguments]
        done = subprocess.run(command, cwd=self.folder, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


@contextlib.contextmanager
def started() -> Iterator[Postgres]:
    # Not below pytest's own folder, which another user can't enter; a socket's path is short.
    with tempfile.TemporaryDirectory(prefix="r3mes-pg-") as name:
        running = Postgres(Path(name))
        try:
            yield running
        finally:
            running.stop()


@pytest.fixture(scope="session")
def postgres() -> Iterator[Postgres]:
    with started() as running:
        yield running


def _program(name: str) -> Path:
    """Debian keeps the server's programs out of the path."""
    found = sorted(
        Path("/usr/lib/postgresql").glob(f"*/bin/{name}"), key=lambda it: float(it.parts[4])
    )
    if found:
        return found[-1]
    if in_path := shutil.which(name):
        return Path(in_path)
    raise RuntimeError("the tests need PostgreSQL, 14 or later: apt-get install postgresql")


def _user() -> pwd.struct_passwd | None:
    """Whose the server is: it refuses to be root's."""
    if os.geteuid() != 0:
        return None
    for name in (_OWNER, "nobody"):
        with contextlib.suppress(KeyError):
            return pwd.getpwnam(name)
    raise RuntimeError("the tests' PostgreSQL needs a user who is not root")


def _as_user() -> list[str]:
    """It ends with the tests, also if those are killed."""
    command = ["setpriv", "--pdeathsig", "QUIT"]
    if user := _user():
        ids = (f"--reuid={user.pw_uid}", f"--regid={user.pw_gid}", "--clear-groups")
        command += ids
    return command
