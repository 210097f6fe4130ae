"""Pipeline schedules: torch's own step code is run to see its order and its waits; timelines agree with both."""

import pickle
import time
from collections import Counter
from unittest import mock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.pipelining import schedules as torch_schedules
from torch.distributed.pipelining.stage import _PipelineStageBase

from megadit.parallel.pipeline.partition import stage_indices
from megadit.parallel.pipeline.schedule import SCHEDULES
from megadit.planning.schedule import Action, Program, actions, in_flight, in_sequence, moments, orders

SHAPES = [("1f1b", 1), ("interleaved", 1), ("interleaved", 2), ("interleaved", 3), ("zbv", 2)]


# --- torch's schedules, run without a process group -------------------------------------------------------------------


class RecordingStage(_PipelineStageBase):
    """A stage that computes nothing and notes what it is asked to do."""

    def __init__(self, index, num_stages, rank, num_ranks, program, rank_of):
        self.stage_index, self.num_stages = index, num_stages
        self.group_rank, self.group_size, self.group = rank, num_ranks, None
        self.submod, self.has_backward = None, True
        self.program, self.rank_of = program, rank_of

    def message(self, direction, kind, sender, receiver, microbatch):
        elsewhere = self.rank_of.get(sender, None), self.rank_of.get(receiver, None)
        crosses = None not in elsewhere and elsewhere[0] != elsewhere[1]
        return [(direction, kind, sender, receiver, microbatch)] if crosses else []

    def get_fwd_recv_ops(self, microbatch):
        return self.message("recv", "F", self.stage_index - 1, self.stage_index, microbatch)

    def get_fwd_send_ops(self, microbatch):
        return self.message("send", "F", self.stage_index, self.stage_index + 1, microbatch)

    def get_bwd_recv_ops(self, microbatch):
        return self.message("recv", "B", self.stage_index + 1, self.stage_index, microbatch)

    def get_bwd_send_ops(self, microbatch):
        return self.message("send", "B", self.stage_index, self.stage_index - 1, microbatch)

    def forward_one_chunk(self, microbatch, *args, **kwargs):
        self.program.append(Action("F", self.stage_index, microbatch))

    def backward_one_chunk(self, microbatch, loss=None, full_backward=True, last_backward=False):
        self.program.append(Action("B" if full_backward else "I", self.stage_index, microbatch))

    def backward_weight_one_chunk(self, microbatch, last_backward=False):
        self.program.append(Action("W", self.stage_index, microbatch))

    def ignore(self, *args, **kwargs):
        return ()

    set_local_fwd_input = set_local_bwd_input = get_local_bwd_output = perform_reduce_grad = ignore
    _create_grad_recv_info = _prepare_forward_infra = _prepare_backward_infra = ignore


def torch_program(schedule, rank, num_ranks, stages_per_rank, num_microbatches):
    """What torch's code does in a step of one rank: Actions, ("post", messages) and ("wait", messages), in order."""
    program = []
    placed = {r: stage_indices(schedule, r, num_ranks, stages_per_rank) for r in range(num_ranks)}
    rank_of = {stage: r for r, stages in placed.items() for stage in stages}
    stages = [RecordingStage(index, len(rank_of), rank, num_ranks, program, rank_of) for index in placed[rank]]
    runs = SCHEDULES[schedule](
        stages[0] if schedule == "1f1b" else stages, num_microbatches, loss_fn=lambda output, target: 0.0
    )
    runs._initialize_stage = runs._initialize_stages = lambda *args: None  # would compute shapes

    def note(what):
        def noted(messages, desc=None):
            program.extend([(what, tuple(messages))] if messages else [])
            return messages

        return noted

    empty = [()] * num_microbatches, [{}] * num_microbatches, [0.0] * num_microbatches
    with (
        mock.patch.object(torch_schedules, "_batch_p2p", note("post")),
        mock.patch.object(torch_schedules, "_wait_batch_p2p", note("wait")),
    ):
        runs._step_microbatches(*empty, losses=[])
    return program


def torch_programs(schedule, num_ranks, stages_per_rank, num_microbatches):
    return [torch_program(schedule, rank, num_ranks, stages_per_rank, num_microbatches) for rank in range(num_ranks)]


def play(programs, duration, transfer):
    """Seconds until all programs are through, and the start of each action.

    A transfer starts when both of its ranks have posted it.
    """
    clocks, done, posted, starts = [0.0] * len(programs), [0] * len(programs), {}, {}

    def other(message):
        return ("recv" if message[0] == "send" else "send", *message[1:])

    def arrival(message):
        return max(posted[message], posted[other(message)]) + transfer(message[2], message[3])

    moved = True
    while moved:
        moved = False
        for rank, program in enumerate(programs):
            while done[rank] < len(program):
                step = program[done[rank]]
                if isinstance(step, Action):
                    starts[step] = clocks[rank]
                    clocks[rank] += duration(*step[:2])
                elif step[0] == "post":
                    posted.update(dict.fromkeys(step[1], clocks[rank]))
                elif all(other(message) in posted for message in step[1]):
                    clocks[rank] = max(clocks[rank], *map(arrival, step[1]))
                else:
                    break
                done[rank] += 1
                moved = True
    assert done == [len(program) for program in programs]
    return max(clocks), starts


# --- orders -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("schedule", "stages_per_rank"), SHAPES)
@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4, 8])
def test_orders_are_those_that_torch_runs(schedule, stages_per_rank, num_ranks):
    for num_microbatches in (num_ranks, num_ranks + 1, 2 * num_ranks - 1, 2 * num_ranks, 3 * num_ranks, 33):
        rounds = max(1, num_microbatches // num_ranks)
        if schedule == "interleaved" and num_microbatches % rounds:
            continue  # torch refuses
        programs = torch_programs(schedule, num_ranks, stages_per_rank, num_microbatches)
        ran = [[step for step in program if isinstance(step, Action)] for program in programs]
        assert orders(schedule, num_ranks, stages_per_rank, num_microbatches) == ran


@pytest.mark.parametrize(("schedule", "stages_per_rank"), SHAPES)
def test_every_stage_does_everything_once(schedule, stages_per_rank):
    kinds = "FIW" if schedule == "zbv" else "FB"
    for rank, order in enumerate(orders(schedule, 4, stages_per_rank, 8)):
        stages = stage_indices(schedule, rank, 4, stages_per_rank)
        assert sorted(order) == sorted(
            Action(kind, stage, microbatch) for kind in kinds for stage in stages for microbatch in range(8)
        )


# --- timelines --------------------------------------------------------------------------------------------------------


def equal(kind, stage):
    """Seconds if all stages cost the same and the backward pass, of two halves, twice the forward pass."""
    return 2.0 if kind == "B" else 1.0


def at_once(sender, receiver):
    return 0.0


@pytest.mark.parametrize("num_ranks", [1, 2, 4, 8])
@pytest.mark.parametrize("rounds", [1, 2, 8])
@pytest.mark.parametrize("stages_per_rank", [1, 2, 3])
def test_bubbles_of_the_papers(num_ranks, rounds, stages_per_rank):
    """(p - 1) / (v m + p - 1) of the time: arXiv 2104.04473, section 2.2, where it is of the ideal time instead."""
    microbatches = rounds * num_ranks
    schedule = "1f1b" if stages_per_rank == 1 else "interleaved"
    line = Program(schedule, num_ranks, stages_per_rank, microbatches).timeline(equal, at_once)
    waits = num_ranks - 1
    assert line.bubble == pytest.approx(waits / (stages_per_rank * microbatches + waits), abs=1e-12)
    assert line.imbalance == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("num_ranks", [1, 2, 4, 8])
def test_zbv_has_no_bubble_but_for_its_staggered_start(num_ranks):
    """With equal F, I and W no rank waits once it has begun (arXiv 2401.10241, section 6); rank r begins at r."""
    microbatches = 2 * num_ranks
    line = Program("zbv", num_ranks, 2, microbatches).timeline(equal, at_once)
    for rank, spans in enumerate(line.ranks):
        assert spans[0].start == rank
        assert spans[-1].end - spans[0].start == 6 * microbatches
    assert line.bubble == pytest.approx((num_ranks - 1) / (6 * microbatches + num_ranks - 1), abs=1e-12)


shapes = st.sampled_from(SHAPES).flatmap(
    lambda shape: st.tuples(st.just(shape), st.integers(1, 4), st.integers(1, 3), st.randoms(use_true_random=False))
)


def random_times(random, num_stages):
    """Durations by kind and stage; transfers by the pair of stages, whichever of them sends."""
    seconds = {(kind, stage): random.uniform(0.2, 2) for kind in "FBIW" for stage in range(num_stages)}
    sent = [random.uniform(0, 1) for _ in range(num_stages)]
    return lambda kind, stage: seconds[kind, stage], lambda sender, receiver: sent[min(sender, receiver)]


@settings(deadline=None)
@given(shapes)
def test_1f1b_takes_as_long_as_torch_would_wait(case):
    (_, _), num_ranks, rounds, random = case
    duration, transfer = random_times(random, num_ranks)
    total, _ = play(torch_programs("1f1b", num_ranks, 1, num_ranks * rounds), duration, transfer)
    line = Program("1f1b", num_ranks, 1, num_ranks * rounds).timeline(duration, transfer)
    assert line.total == pytest.approx(total, rel=1e-12)


@pytest.mark.parametrize(("schedule", "stages_per_rank"), [("interleaved", 2), ("interleaved", 3), ("zbv", 2)])
@pytest.mark.parametrize("seconds", [0.0, 0.05, 0.25])
def test_prefetching_schedules_take_as_long_as_torch_would_wait(schedule, stages_per_rank, seconds):
    for num_ranks, rounds in ((2, 2), (4, 3), (8, 2)):
        shape = schedule, num_ranks, stages_per_rank, num_ranks * rounds

        def transfer(sender, receiver):
            return seconds

        total, starts = play(torch_programs(*shape), equal, transfer)
        line = Program(*shape).timeline(equal, transfer)
        assert line.total == pytest.approx(total, rel=1e-12)
        if not seconds:
            assert {span.action: span.start for spans in line.ranks for span in spans} == starts


def settled(ordered, duration, transfer):
    """The earliest starts by brute force: every constraint is applied again and again until none moves a start."""
    rank_of = {action.stage: rank for rank, order in enumerate(ordered) for action in order}
    all_actions = [action for order in ordered for action in order]
    constraints = [(before, after, 0.0) for order in ordered for before, after in zip(order, order[1:], strict=False)]
    for after in all_actions:
        for before in all_actions:
            if before.microbatch != after.microbatch:
                continue
            delay = transfer(before.stage, after.stage) if rank_of[before.stage] != rank_of[after.stage] else 0.0
            forward = (before.kind, after.kind) == ("F", "F") and before.stage == after.stage - 1
            backward = before.kind in "BI" and after.kind in "BI" and before.stage == after.stage + 1
            own = before.stage == after.stage and (before.kind, after.kind) in (("F", "B"), ("F", "I"), ("I", "W"))
            if forward or backward or own:
                constraints.append((before, after, delay))
    starts = dict.fromkeys(all_actions, 0.0)
    for _ in range(len(all_actions) + 1):
        late = [
            (after, starts[before] + duration(*before[:2]) + delay)
            for before, after, delay in constraints
            if starts[before] + duration(*before[:2]) + delay > starts[after]
        ]
        if not late:
            return starts
        for after, start in late:
            starts[after] = max(starts[after], start)
    raise AssertionError("the constraints form a circle")


@settings(deadline=None, max_examples=30)
@given(shapes)
def test_every_action_starts_as_early_as_its_constraints_allow(case):
    (schedule, stages_per_rank), num_ranks, rounds, random = case
    program = Program(schedule, num_ranks, stages_per_rank, num_ranks * rounds)
    duration, transfer = random_times(random, num_ranks * stages_per_rank)
    if schedule == "1f1b":
        transfer = at_once  # else it starts late, as torch does
    line, ordered = program.timeline(duration, transfer), program.orders
    starts = settled(ordered, duration, transfer)
    assert [[span.action for span in spans] for spans in line.ranks] == ordered
    for spans in line.ranks:
        for action, start, end in spans:
            assert start == pytest.approx(starts[action], rel=1e-12)
            assert end == start + duration(*action[:2])
    busiest, mean = max(line.busy), sum(line.busy) / num_ranks
    assert line.bubble == pytest.approx(1 - busiest / line.total)
    assert (1 - line.bubble) * (1 - line.imbalance) == pytest.approx(mean / line.total)


def test_an_uneven_stage_is_imbalance_and_no_bubble():
    line = Program("1f1b", 2, 1, 1000).timeline(lambda kind, stage: 1.0 + stage, at_once)
    assert line.imbalance == pytest.approx(0.25)  # the mean rank does 3/4 of what the busiest does
    assert line.bubble == pytest.approx(0, abs=1e-3)


def test_orders_that_wait_for_one_another_are_refused():
    program = Program("1f1b", 2, 1, 2)
    first, second = program.orders
    wrong = [[first[0], *first[2:], first[1]], [second[0], *second[2:], second[1]]]
    with pytest.raises(ValueError, match=r"these actions wait for one another: 0B0, 1F1"):
        in_sequence(wrong, program.pairs, program.edges)


def test_a_timeline_is_fast_enough_to_search_with():
    seconds = []
    for schedule in ("interleaved", "zbv"):
        for _ in range(3):
            begin = time.process_time()
            Program(schedule, 8, 2, 64).timeline(equal, lambda sender, receiver: 0.1)
            seconds.append(time.process_time() - begin)
    assert min(seconds) < 0.05


# --- microbatches in flight -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_ranks", [1, 2, 4, 8])
@pytest.mark.parametrize("rounds", [1, 2, 4])
def test_1f1b_keeps_a_microbatch_for_each_rank_from_here_to_the_end(num_ranks, rounds):
    """arXiv 2006.09503: the first stage keeps as many as there are ranks, the last one keeps one."""
    for rank, order in enumerate(orders("1f1b", num_ranks, 1, num_ranks * rounds)):
        assert max(kept[rank].whole for kept in in_flight(order)) == num_ranks - rank
        assert all(kept[rank].weights == 0 for kept in in_flight(order))


def test_interleaved_keeps_more_than_1f1b():
    """arXiv 2104.04473, section 2.2 and Megatron's estimate: 1 + (p - 1) / (p v) as much on the first rank."""
    for num_ranks, stages_per_rank in ((2, 2), (4, 2), (4, 3), (8, 2)):
        order = actions("interleaved", 0, num_ranks, stages_per_rank, 4 * num_ranks)
        chunks = max(sum(stage.whole for stage in kept.values()) for kept in in_flight(order))
        assert chunks == num_ranks * stages_per_rank + num_ranks - 1


def test_zbv_keeps_what_1f1b_keeps():
    """arXiv 2401.10241, table 4: p whole microbatches on every rank, that is 2 p of its two stages'."""
    for num_ranks in (1, 2, 4, 8):
        for order in orders("zbv", num_ranks, 2, 3 * num_ranks):
            kept = [sum(stage.whole for stage in stages.values()) for stages in in_flight(order)]
            assert max(kept) == 2 * num_ranks


def test_a_microbatch_is_kept_until_its_weights_have_their_gradients():
    order = [Action(kind, stage, 0) for kind, stage in (("F", 0), ("F", 1), ("I", 1), ("W", 1), ("I", 0), ("W", 0))]
    kept = in_flight(order)
    assert [tuple(during[1]) for during in kept] == [(0, 0), (1, 0), (1, 0), (0, 1), (0, 0), (0, 0)]
    # Stage 0's "I" does nothing, so that its "W" needs everything.
    assert [tuple(during[0]) for during in kept] == [(1, 0)] * 6


@pytest.mark.parametrize(("schedule", "stages_per_rank"), SHAPES)
def test_nothing_is_kept_after_the_last_action(schedule, stages_per_rank):
    for order in orders(schedule, 4, stages_per_rank, 8):
        last = order[-1]
        left = {stage: tuple(kept) for stage, kept in in_flight(order)[-1].items()}
        own = (0, 1) if last.kind == "W" and last.stage > 0 else (1, 0)
        assert left == {stage: own if stage == last.stage else (0, 0) for stage in left}


@pytest.mark.parametrize(("schedule", "stages_per_rank"), SHAPES)
def test_moments_are_all_that_differ_in_what_is_kept(schedule, stages_per_rank):
    for order in orders(schedule, 4, stages_per_rank, 12):
        during = in_flight(order)
        found = moments(order)
        told = [(moment.kind, moment.stage, moment.kept) for moment in found]
        everything = [(action.kind, action.stage, kept) for action, kept in zip(order, during, strict=True)]
        assert all(each in told for each in everything)
        assert all(told.count(each) == 1 for each in told)
        for moment in found:
            last = max(place for place, each in enumerate(everything) if each == moment[:3])
            assert moment.before == Counter(action[:2] for action in order[:last])
        assert len(found) < len(order)


def test_a_timeline_is_pickled_without_its_actions():
    line = Program("zbv", 8, 2, 256).timeline(equal, at_once)
    pickled = pickle.dumps(line)
    assert len(pickled) < 2000
    assert pickle.loads(pickled).ranks == line.ranks
