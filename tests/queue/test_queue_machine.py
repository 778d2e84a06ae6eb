"""Whatever is done in whatever order, the queue's tables agree with what they are computed from."""

from collections import defaultdict

import pytest
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from properties import examples
from queue_studies import Clock, study
from sqlalchemy import URL, select

from hrs.queue.database import Database
from hrs.queue.queue import LeaseLost, Queue
from hrs.queue.records import Claim
from hrs.queue.schema import attempts, inputs, members, runs, stages, studies
from hrs.queue.states import SETTLED, Outcome, State, Wanted
from hrs.queue.targets import Target

NAMES = st.lists(st.sampled_from("abc"), min_size=1, max_size=3, unique=True)


class QueueMachine(RuleBasedStateMachine):
    """Users, workers, reapers and zombies on one queue."""

    def __init__(self) -> None:
        super().__init__()
        self.clock = Clock()
        self.queue = Queue(Database(URL.create("sqlite")), self.clock)
        self.worker = self.queue.add_worker("host", 1)
        self.claims: list[Claim] = []
        self.published: dict[str, int] = defaultdict(int)
        self.expected: dict[str, int] = defaultdict(int)

    def teardown(self) -> None:
        self.queue.database.close()

    @rule(title=st.sampled_from("st"), names=NAMES, priority=st.integers(-2, 2))
    def submit(self, title: str, names: list[str], priority: int) -> None:
        self.queue.submit(study(title, *sorted(names), priority=priority), extend=True)

    @initialize(names=NAMES)
    def first(self, names: list[str]) -> None:
        self.submit("s", names, 0)

    @rule(place=st.integers(0, 20))
    def claim(self, place: int) -> None:
        candidates = self.queue.candidates()
        if candidates:
            self.claims.append(self.queue.claim(candidates[place % len(candidates)].key, self.worker))

    @rule(n=st.integers(1, 4))
    def progress(self, n: int) -> None:
        """Work through the queue for a while."""
        for candidate in self.queue.candidates(n):
            self.claims.append(self.queue.claim(candidate.key, self.worker))
            self.end(len(self.claims) - 1, Outcome.FINISHED)

    @precondition(lambda self: self.claims)
    @rule(place=st.integers(0, 20), ending=st.sampled_from(list(Outcome)))
    def end(self, place: int, ending: Outcome) -> None:
        claim = self.claims.pop(place % len(self.claims))
        key = claim.stage.key
        if ending is Outcome.FINISHED:
            self.expected[key] += 1
            self.queue.finish(claim, lambda: self.publish(key))
        else:
            resources = claim.stage.resources if claim.rung < 2 else None
            self.queue.give_up(claim, ending, "", resources=resources)

    def publish(self, key: str) -> None:
        self.published[key] += 1

    @rule(place=st.integers(0, 20), again=st.booleans())
    def zombie(self, place: int, again: bool) -> None:
        """A holder is taken for dead and comes back, perhaps after somebody else has claimed its stage."""
        candidates = self.queue.candidates()
        if not candidates:
            return
        claim = self.queue.claim(candidates[place % len(candidates)].key, self.worker)
        self.queue.give_up(claim, Outcome.LOST, "reaped")
        self.clock.time += 1000
        if again and claim.stage.key in [spec.key for spec in self.queue.candidates()]:
            self.claims.append(self.queue.claim(claim.stage.key, self.worker))
        with pytest.raises(LeaseLost):
            self.queue.finish(claim, lambda: self.publish(claim.stage.key))

    def some_target(self, place: int) -> Target | None:
        with self.queue.database.read() as connection:
            found = [Target(name=row.title, study=row.id) for row in connection.execute(select(studies))]
            found += [Target(name="", study=r.study_id, run=r.key) for r in connection.execute(select(runs))]
            found += [Target(name="", stage=row.key) for row in connection.execute(select(stages))]
        return found[place % len(found)] if found else None

    @rule(place=st.integers(0, 40), wanted=st.sampled_from(list(Wanted)))
    def want(self, place: int, wanted: Wanted) -> None:
        if target := self.some_target(place):
            self.queue.want(wanted, target)

    @rule(place=st.integers(0, 40))
    def retry(self, place: int) -> None:
        if target := self.some_target(place):
            self.queue.retry(target)

    @rule(place=st.integers(0, 40), priority=st.integers(-3, 3))
    def prioritise(self, place: int, priority: int) -> None:
        if target := self.some_target(place):
            self.queue.prioritise(priority, target)

    @rule(place=st.integers(0, 20), state=st.sampled_from([State.QUEUED, State.FINISHED]))
    def adopt_or_disown(self, place: int, state: State) -> None:
        with self.queue.database.read() as connection:
            known = connection.execute(select(stages.c.key).where(stages.c.state == state).order_by(stages.c.key)).all()
        if known:
            key = known[place % len(known)].key
            if state is State.QUEUED:
                self.queue.adopt(key)
            else:
                self.queue.disown(key, "gone")

    @rule(seconds=st.integers(1, 100))
    def wait(self, seconds: int) -> None:
        self.clock.time += seconds

    @invariant()
    def tables_agree(self) -> None:
        with self.queue.database.read() as connection:
            rows = {row.key: row for row in connection.execute(select(stages))}
            needs, wants = defaultdict(set), defaultdict(list)
            for row in connection.execute(select(inputs)):
                needs[row.stage_key].add(row.input_key)
            of_study = {row.id: row for row in connection.execute(select(studies))}
            of_run = {(row.study_id, row.key): row for row in connection.execute(select(runs))}
            for row in connection.execute(select(members)):
                run = of_run.get((row.study_id, row.run_key))
                wants[row.stage_key].append(max(of_study[row.study_id].wanted, run.wanted if run else 0))
            opened = connection.execute(select(attempts).where(attempts.c.ended.is_(None))).all()
        for key, row in rows.items():
            missing = sum(rows[other].state != State.FINISHED for other in needs[key])
            assert row.n_missing == missing, key
            wanted = max(row.own_wanted, min(wants[key]))
            assert row.wanted == wanted, key
            if row.state not in (*SETTLED - {State.CANCELLED}, State.RUNNING):
                resting = State.WAITING if missing else State.QUEUED
                expected = {Wanted.RUN: resting, Wanted.PAUSE: State.PAUSED, Wanted.CANCEL: State.CANCELLED}
                assert row.state == expected[Wanted(wanted)], key
        running = {(key, row.token) for key, row in rows.items() if row.state == State.RUNNING}
        assert {(row.stage_key, row.token) for row in opened} == running and len(opened) == len(running)
        assert running == {(claim.stage.key, claim.token) for claim in self.claims}
        assert self.published == self.expected


@pytest.mark.hypothesis
def test_any_sequence_of_events() -> None:
    run_state_machine_as_test(
        QueueMachine, settings=settings(examples(60), phases=[Phase.generate], stateful_step_count=40)
    )
