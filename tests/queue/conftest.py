"""Queues over every kind of database that a user may have: SQLite, and a Postgres that the tests start."""

import os
import pwd
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from queue_studies import Clock
from sqlalchemy import URL, make_url, text

from hrs.queue.database import Database
from hrs.queue.queue import Queue

BINARIES = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb")) or [
    Path(found) for found in [shutil.which("initdb")] if found
]


@pytest.fixture(scope="session")
def postgres() -> Iterator[URL]:
    """A Postgres server of our own on a socket in a temporary folder."""
    if not BINARIES:
        pytest.skip("Postgres is not installed (Debian: apt install postgresql)")
    user = None
    if os.getuid() == 0:  # Postgres refuses to run as root
        try:
            user = pwd.getpwnam("postgres").pw_name
        except KeyError:
            pytest.skip("Postgres does not run as root, and there is no user postgres")
    folder = Path(tempfile.mkdtemp(prefix="pg-", dir="/tmp"))  # paths of sockets must be short
    if user:
        shutil.chown(folder, user)
    binaries = BINARIES[-1].parent

    def call(*command: str) -> None:
        subprocess.run(command, check=True, user=user, stdout=subprocess.DEVNULL, cwd=folder)

    call(str(binaries / "initdb"), "-D", f"{folder}/data", "-A", "trust", "-U", "hrs", "-N")
    options = f"-k {folder} -c listen_addresses='' -c fsync=off -c max_connections=50"
    call(str(binaries / "pg_ctl"), "-D", f"{folder}/data", "-l", f"{folder}/log", "-o", options, "-w", "start")
    yield make_url(f"postgresql+psycopg://hrs@/postgres?host={folder}")
    call(str(binaries / "pg_ctl"), "-D", f"{folder}/data", "-m", "immediate", "stop")
    shutil.rmtree(folder)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture(params=["sqlite", "postgres"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> URL:
    """The URL of an empty database."""
    if request.param == "sqlite":
        return URL.create("sqlite", database=str(tmp_path / "queue.db"))
    server = request.getfixturevalue("postgres")
    name = f"t{abs(hash(request.node.nodeid)):x}"[:30]
    database = Database(server.update_query_dict({}))
    with database.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.execute(text(f"DROP DATABASE IF EXISTS {name}"))
        connection.execute(text(f"CREATE DATABASE {name}"))
    database.close()
    return server.set(database=name)


@pytest.fixture
def queue(url: URL, clock: Clock) -> Iterator[Queue]:
    database = Database(url)
    yield Queue(database, clock)
    database.close()
