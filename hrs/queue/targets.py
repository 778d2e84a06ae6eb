"""What a verb is applied to: a study, a run of one, or a stage, as a user names it."""

from dataclasses import dataclass

from sqlalchemy import Connection, select, update

from hrs.errors import HRSError
from hrs.queue.schema import members, runs, stages, studies


@dataclass(frozen=True, kw_only=True, slots=True)
class Target:
    """A study, a run of one, or a stage: what a verb is applied to."""

    name: str
    study: str = ""
    run: str = ""
    stage: str = ""

    def stage_keys(self, connection: Connection) -> list[str]:
        """Return the keys of its stages, sorted."""
        if self.stage:
            return [self.stage]
        query = select(members.c.stage_key).where(members.c.study_id == self.study).distinct()
        if self.run:
            query = query.where(members.c.run_key == self.run)
        return sorted(connection.execute(query).scalars())

    def set(self, connection: Connection, **values: int) -> None:
        """Set ``wanted`` or ``priority``."""
        if self.stage:
            own = {f"own_{name}": value for name, value in values.items()}
            connection.execute(update(stages).where(stages.c.key == self.stage).values(**own))
        elif self.run:
            where = (runs.c.study_id == self.study) & (runs.c.key == self.run)
            connection.execute(update(runs).where(where).values(**values))
        else:
            connection.execute(update(studies).where(studies.c.id == self.study).values(**values))


def find_target(connection: Connection, name: str) -> Target:
    """See :meth:`Queue.target`."""
    run_name, _, study_name = name.rpartition("@")
    study = connection.execute(
        select(studies).where((studies.c.title == study_name) | (studies.c.id == study_name))
    ).one_or_none()
    if study is not None and not run_name:
        return Target(name=study.title, study=study.id)
    if study is not None:
        found = connection.execute(
            select(runs)
            .where(runs.c.study_id == study.id)
            .where((runs.c.label == run_name) | runs.c.key.startswith(run_name, autoescape=True))
        ).all()
        if len(found) == 1:
            return Target(name=f"{found[0].label}@{study.title}", study=study.id, run=found[0].key)
        what = "no run" if not found else f"{len(found)} runs"
        raise HRSError(f"study {study.title} has {what} named {run_name}: see 'hrs queue show {study.title}'")
    keys = connection.execute(select(stages.c.key).where(stages.c.key.startswith(name, autoescape=True)).limit(2)).all()
    if len(keys) == 1:
        return Target(name=keys[0].key, stage=keys[0].key)
    if keys:
        raise HRSError(f"more than one stage has a key that begins with {name}: give more of it")
    titles = ", ".join(connection.execute(select(studies.c.title).order_by(studies.c.title).limit(5)).scalars())
    known = f"studies are {titles}" if titles else "the queue is empty"
    raise HRSError(f"nothing in the queue is named {name}: {known}; runs are RUN@STUDY, stages have keys")
