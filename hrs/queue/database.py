"""The queue's database: SQLite below the storage root, made at first use without a server, or any that a URL names.

Every transaction that writes takes the write lock when it begins: a deferred one that writes later fails at once with
SQLITE_BUSY_SNAPSHOT if another process wrote in between, whatever the timeout.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sqlalchemy import URL, Connection, Engine, create_engine, event, make_url, text
from sqlalchemy.exc import ArgumentError, DatabaseError, NoSuchModuleError, OperationalError, SQLAlchemyError
from sqlalchemy.pool import ConnectionPoolEntry

from hrs.errors import HRSError
from hrs.queue.schema import prepare

ENVIRONMENT = "HRS_QUEUE"
"""Names the URL of another database, for example postgresql+psycopg://user@host/hrs."""

BUSY_SECONDS = 60.0
"""How long a transaction waits for another process's."""


def queue_url(root: Path) -> URL:
    """Return the URL that ``HRS_QUEUE`` names, else that of a SQLite file below the storage root.

    Raises:
        HRSError: if the variable holds no URL.
    """
    chosen = os.environ.get(ENVIRONMENT)
    if not chosen:
        return URL.create("sqlite", database=str(root / "queue.db"))
    try:
        return make_url(chosen)
    except ArgumentError as error:
        raise HRSError(
            f"{ENVIRONMENT}={chosen} is not a database URL: unset it, or name one such as "
            "postgresql+psycopg://user@host/hrs"
        ) from error


class Database:
    """Transactions on one database, whose tables exist afterwards.

    Raises:
        HRSError: if it cannot be opened, or was written by something else.
    """

    def __init__(self, url: URL) -> None:
        self.url = url.render_as_string(hide_password=False)
        """For another process that should open it, too."""
        self.name = url.render_as_string(hide_password=True)
        try:
            self.engine = _engine(url)
        except (NoSuchModuleError, ModuleNotFoundError) as error:
            raise HRSError(
                f"queue database {self.name} needs a driver that is missing ({error}): pip install 'hrs[postgres]'"
            ) from error
        self.is_sqlite = self.engine.dialect.name == "sqlite"
        with self.write() as connection:
            if not self.is_sqlite:
                connection.execute(text("SELECT pg_advisory_xact_lock(20261201)"))
            prepare(connection, f"queue database {self.name}")

    @contextmanager
    def write(self) -> Iterator[Connection]:
        """Open a transaction that excludes other writers of the rows it reads; commits at the end."""
        with self._speaking(), self.engine.connect() as connection:
            connection = connection.execution_options(hrs_write=True)
            with connection.begin():
                yield connection

    @contextmanager
    def read(self) -> Iterator[Connection]:
        """Open a transaction that only reads, and sees one moment."""
        with self._speaking(), self.engine.connect() as connection:
            if not self.is_sqlite:
                connection = connection.execution_options(isolation_level="REPEATABLE READ")
            with connection.begin():
                yield connection

    def close(self) -> None:
        """Close all connections."""
        self.engine.dispose()

    @contextmanager
    def _speaking(self) -> Iterator[None]:
        """Turn what the database raises into one sentence."""
        try:
            yield
        except OperationalError as error:
            cause = str(error.orig).strip()
            remedy = "see whether it is reachable and writable"
            if "locked" in cause:
                remedy = f"another process has held it for {BUSY_SECONDS:.0f} s; nothing is lost, try again"
            elif "full" in cause:
                remedy = "the disk is full: free some space and try again"
            elif "readonly" in cause or "read-only" in cause:
                remedy = "make it writable, or set HRS_STORAGE or HRS_QUEUE to another place"
            raise HRSError(f"queue database {self.name} cannot be used ({cause}): {remedy}") from error
        except DatabaseError as error:
            cause = str(error.orig).strip()
            if "malformed" in cause or "not a database" in cause:
                raise HRSError(
                    f"queue database {self.name} is damaged ({cause}): move the file away and submit the studies "
                    "again; finished work is found in the storage"
                ) from error
            raise
        except SQLAlchemyError as error:
            if isinstance(error, TimeoutError):
                raise HRSError(f"queue database {self.name} does not answer: try again") from error
            raise


def _engine(url: URL) -> Engine:
    if url.get_backend_name() != "sqlite":
        return create_engine(url, pool_pre_ping=True)
    if url.database:
        Path(url.database).parent.mkdir(parents=True, exist_ok=True)
    engine = create_engine(url, connect_args={"timeout": BUSY_SECONDS})

    @event.listens_for(engine, "connect")
    def _configure(connection: object, _: ConnectionPoolEntry) -> None:
        connection.isolation_level = None  # type: ignore[attr-defined]  # the driver must not begin by itself
        cursor = connection.cursor()  # type: ignore[attr-defined]
        cursor.execute(f"PRAGMA busy_timeout = {int(1000 * BUSY_SECONDS)}")
        cursor.execute("PRAGMA journal_mode = WAL")
        cursor.execute("PRAGMA synchronous = FULL")
        cursor.execute("PRAGMA foreign_keys = ON")
        cursor.close()

    @event.listens_for(engine, "begin")
    def _begin(connection: Connection) -> None:
        writes = connection.get_execution_options().get("hrs_write", False)
        connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")

    return engine
