"""Tables of the queue's database, and their migration.

``studies`` are named comparisons, ``runs`` their members, ``stages`` the pieces of work. A stage is known by its
content key, so that studies share it; ``members`` says which study and which run need which stage. ``attempts`` are
tries at stages, ``workers`` the processes that make them. ``events`` is append-only. ``measurements`` are peaks of
memory and seconds by shape and device.
"""

from collections.abc import Callable

from sqlalchemy import (
    JSON,
    BigInteger,
    Column,
    Connection,
    Float,
    ForeignKey,
    Index,
    Integer,
    MetaData,
    SmallInteger,
    String,
    Table,
    Text,
    inspect,
    select,
)

from hrs.errors import HRSError

metadata = MetaData()

_SERIAL = BigInteger().with_variant(Integer, "sqlite")  # SQLite counts up INTEGER keys only

meta = Table("hrs_queue", metadata, Column("version", Integer, nullable=False))

studies = Table(
    "studies",
    metadata,
    Column("id", String(32), primary_key=True),
    Column("title", String(200), nullable=False, unique=True),
    Column("definition", JSON, nullable=False),
    Column("wanted", SmallInteger, nullable=False, default=0),
    Column("priority", Integer, nullable=False, default=0),
    Column("created", Float, nullable=False),
)

runs = Table(
    "runs",
    metadata,
    Column("study_id", ForeignKey("studies.id", ondelete="CASCADE"), primary_key=True),
    Column("key", String(32), primary_key=True),
    Column("label", String(200), nullable=False),
    Column("position", Integer, nullable=False),
    Column("definition", JSON, nullable=False),
    Column("wanted", SmallInteger, nullable=False, default=0),
    Column("priority", Integer, nullable=False, default=0),
)

stages = Table(
    "stages",
    metadata,
    Column("key", String(64), primary_key=True),
    Column("kind", String(40), nullable=False),
    Column("label", String(200), nullable=False),
    Column("function", String(200), nullable=False),
    Column("payload", JSON, nullable=False),
    Column("resources", JSON, nullable=False),
    Column("state", String(12), nullable=False),
    Column("own_wanted", SmallInteger, nullable=False, default=0),
    Column("own_priority", Integer, nullable=False, default=0),
    # Of the stage and of all runs and studies that need it together; kept so that a claim reads one index.
    Column("wanted", SmallInteger, nullable=False, default=0),
    Column("rank", Float, nullable=False, default=0.0),
    Column("minutes", Float, nullable=False, default=0.0),
    Column("n_missing", Integer, nullable=False, default=0),
    Column("not_before", Float, nullable=False, default=0.0),
    Column("created", Float, nullable=False),
    Column("token", Integer, nullable=False, default=0),
    Column("rung", Integer, nullable=False, default=0),
    Column("n_lost", Integer, nullable=False, default=0),
    Column("reached", Float, nullable=False, default=0.0),
    Column("message", Text, nullable=False, default=""),
    Index("stages_to_claim", "state", "wanted", "rank", "minutes"),
)

inputs = Table(
    "inputs",
    metadata,
    Column("stage_key", ForeignKey("stages.key", ondelete="CASCADE"), primary_key=True),
    Column("input_key", ForeignKey("stages.key", ondelete="CASCADE"), primary_key=True, index=True),
)

members = Table(
    "members",
    metadata,
    Column("study_id", ForeignKey("studies.id", ondelete="CASCADE"), primary_key=True),
    Column("run_key", String(32), primary_key=True),
    Column("stage_key", ForeignKey("stages.key", ondelete="CASCADE"), primary_key=True, index=True),
)
"""``run_key`` is empty for stages of the study itself, such as its report."""

workers = Table(
    "workers",
    metadata,
    Column("id", String(32), primary_key=True),
    Column("host", String(200), nullable=False),
    Column("pid", Integer, nullable=False),
    Column("started", Float, nullable=False),
)

attempts = Table(
    "attempts",
    metadata,
    Column("id", _SERIAL, primary_key=True),
    Column("stage_key", ForeignKey("stages.key", ondelete="CASCADE"), nullable=False, index=True),
    Column("token", Integer, nullable=False),
    Column("worker_id", ForeignKey("workers.id"), nullable=False),
    Column("device", String(200), nullable=False, default=""),
    Column("reserved", JSON, nullable=False),
    Column("claimed", Float, nullable=False),
    Column("beats", Integer, nullable=False, default=0),
    Column("seen", Float, nullable=False),
    Column("progress", JSON),
    Column("ended", Float),
    Column("outcome", String(12)),
    Column("message", Text, nullable=False, default=""),
    Index("attempts_open", "ended", "stage_key"),
)

events = Table(
    "events",
    metadata,
    Column("id", _SERIAL, primary_key=True),
    Column("time", Float, nullable=False),
    Column("stage_key", String(64), nullable=False, default=""),
    Column("study_id", String(32), nullable=False, default=""),
    Column("kind", String(20), nullable=False),
    Column("message", Text, nullable=False, default=""),
    Index("events_of_stage", "stage_key", "id"),
)

measurements = Table(
    "measurements",
    metadata,
    Column("id", _SERIAL, primary_key=True),
    Column("shape", String(64), nullable=False),
    Column("device", String(200), nullable=False),
    Column("micro_batch", Integer, nullable=False),
    Column("tenants", Integer, nullable=False, default=1),
    Column("peak_bytes", BigInteger),
    Column("seconds_per_step", Float),
    Column("time", Float, nullable=False),
    Index("measurements_of", "shape", "device"),
)

_MIGRATIONS: list[Callable[[Connection], None]] = []
"""Entry n changes a database of version n + 1 to version n + 2."""

VERSION = len(_MIGRATIONS) + 1


def prepare(connection: Connection, name: str) -> None:
    """Create the tables, or bring those of an older version up to date.

    Args:
        connection: inside a transaction that excludes other writers.
        name: of the database, for errors.

    Raises:
        HRSError: if a newer version of this software wrote the database, or something else did.
    """
    found = set(inspect(connection).get_table_names())
    if meta.name not in found:
        if found & set(metadata.tables):
            raise HRSError(f"{name} holds tables of something else: name another database with HRS_QUEUE")
        metadata.create_all(connection)
        connection.execute(meta.insert().values(version=VERSION))
        return
    version = connection.execute(select(meta.c.version)).scalar_one()
    if version > VERSION:
        raise HRSError(
            f"{name} was written by a newer version of hrs (schema {version}, this one knows {VERSION}): update hrs"
        )
    for migrate in _MIGRATIONS[version - 1 :]:
        migrate(connection)
    if version < VERSION:
        connection.execute(meta.update().values(version=VERSION))
