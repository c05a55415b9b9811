"""Steps recorded once and replayed: what goes into them, tried with something that stands in for a CUDA graph."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch

from nh2st_pipe.heads import nh2st, repeated
from nh2st_pipe.heads.attention import Attention
from nh2st_pipe.heads.repeated import Repeated, adamw, set_rate
from nh2st_pipe.recipes.train import AttentionPart

GPU, CPU = torch.device("cuda"), torch.device("cpu")


class Recorded:
    """Does on a CPU what a CUDA graph does: it has its work done again on the tensors it was recorded with."""

    made: list[Recorded] = []  # noqa: RUF012

    def __init__(self, device: torch.device) -> None:
        self.work: Callable[[], None] | None = None
        self.beside_count = self.replays = 0
        self.made.append(self)

    @contextmanager
    def beside(self) -> Iterator[None]:
        self.beside_count += 1
        yield

    def record(self, work: Callable[[], None]) -> None:
        assert self.work is None
        self.work = work

    def replay(self) -> None:
        assert self.work is not None
        self.replays += 1
        self.work()


def test_each_batch_is_done_once_and_those_of_another_shape_plainly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(repeated, "_Graph", Recorded)
    Recorded.made.clear()
    seen = list[tuple[list[int], list[int]]]()
    one = Repeated(lambda a, b: seen.append((a.tolist(), b.tolist())), GPU)
    batches = [(torch.arange(3) + 10 * i, torch.arange(3) * i) for i in range(6)]
    batches.insert(4, (torch.tensor([7, 8]), torch.tensor([0, 1])))
    for a, b in batches:
        one(a, b)
        a.zero_()  # what was recorded with has to be a copy
    graph = Recorded.made[0]
    assert [a for a, _ in seen] == [
        [0, 1, 2],
        [10, 11, 12],
        [20, 21, 22],
        [30, 31, 32],
        [7, 8],
        [40, 41, 42],
        [50, 51, 52],
    ]
    assert (graph.beside_count, graph.replays) == (3, 3)


def test_nothing_is_recorded_on_a_cpu_or_where_embeddings_are_read_from_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(repeated, "_Graph", Recorded)
    Recorded.made.clear()
    Repeated(lambda: None, CPU)
    Repeated(lambda: None, GPU, resident=False)
    assert not Recorded.made


def test_the_learning_rate_is_set_in_place_where_it_is_a_tensor() -> None:
    model = torch.nn.Linear(2, 2)
    optimiser = adamw(model, 0.1, 0.0, CPU)
    set_rate(optimiser, 0.05)
    assert optimiser.param_groups[0]["lr"] == 0.05
    rate = optimiser.param_groups[0]["lr"] = torch.tensor(0.1)
    set_rate(optimiser, 0.02)
    assert optimiser.param_groups[0]["lr"] is rate
    assert rate.item() == pytest.approx(0.02)


def test_all_places_and_the_distinct_ones_give_the_same_neighbourhoods() -> None:
    wanted = torch.tensor([[4, 2, 4], [2, 9, 4]])
    distinct, place = nh2st._distinct(wanted)
    everything = wanted.flatten()
    assert distinct.tolist() == [2, 4, 9]
    a, b = distinct[:, None] * torch.ones(5), everything[:, None] * torch.ones(5)
    assert torch.equal(nh2st._placed(a, place, 2, 3), nh2st._placed(b, None, 2, 3))
    assert torch.equal(nh2st._own(a, place, 3), nh2st._own(b, None, 3))


def test_attention_sees_the_same_of_neighbours_one_by_one() -> None:
    torch.manual_seed(0)
    attention = Attention(2, 6, 5, AttentionPart(neighbours=3, components=6, heads=2, key=3, value=4, dropout=0.0))
    own, around, distance = torch.randn(2, 4, 6), torch.randn(7, 6), torch.rand(2, 4, 3)
    place = torch.randint(7, (2, 4, 3))
    assert torch.allclose(
        attention(own, around, place, distance), attention(own, around[place], None, distance), atol=1e-6
    )
