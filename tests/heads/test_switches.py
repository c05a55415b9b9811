"""NH2ST's own ingredients inside nh2st-context, each against plain arithmetic, one spot at a time."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from nh2st_pipe.heads import registry
from nh2st_pipe.heads.attention import Attention, nearest_of
from nh2st_pipe.heads.blocks import hypergraph_mean
from nh2st_pipe.heads.context import Context
from nh2st_pipe.heads.contrast import Contrast
from nh2st_pipe.heads.hypergraph import incidence, operator
from nh2st_pipe.heads.members import Members, Surroundings
from nh2st_pipe.recipes.train import AttentionPart, ContrastPart
from tests.heads.test_context import GENES, TEST, TRAIN, recipe, samples_of

SWITCHES: dict[str, dict[str, Any]] = {
    "attention": {"network": {"attention": {"neighbours": 5, "heads": 2, "key": 4, "value": 3}}},
    "contrast": {"network": {"contrast": {"weight": 0.5, "width": 4}}},
    "hypergraph": {"hypergraph": True},
}


NETWORK = {"components": 4, "width": 8, "epochs": 3, "lr": 0.05}


def with_switch(name: str) -> Any:
    return recipe(**{**SWITCHES[name], "network": {**NETWORK, **SWITCHES[name].get("network", {})}})


def test_attention_is_softmax_of_likeness_less_distance() -> None:
    torch.manual_seed(0)
    made = Attention(2, 6, 5, AttentionPart(neighbours=4, heads=3, key=4, value=2, dropout=0.0))
    assert made.nearness.tolist() == [[0, -1, -2]] * 2  # the first head looks closest
    own, around = torch.randn(2, 7, 6), torch.randn(9, 6)
    place, distance = torch.randint(9, (2, 7, 4)), torch.rand(2, 7, 4) * 3
    got = made(own, around, place, distance)
    for m in range(2):
        for b in range(7):
            seen = []
            for h in range(3):
                q = (own[m, b] @ made.query_weight[m])[4 * h : 4 * h + 4]
                k = (around[place[m, b]] @ made.key_weight[m])[:, 4 * h : 4 * h + 4]
                v = (around[place[m, b]] @ made.value_weight[m])[:, 2 * h : 2 * h + 2]
                logits = k @ q / 2 - 0.5 * made.nearness[m, h].exp() * distance[m, b] ** 2
                seen.append(logits.softmax(0) @ v)
            assert torch.allclose(got[m, b], torch.cat(seen) @ made.out_weight[m], atol=1e-5)


def test_the_nearest_are_found_in_pitches_and_a_spot_stands_in_for_those_it_lacks() -> None:
    rng = np.random.default_rng(0)
    xy = rng.uniform(0, 900, (12, 2))
    found = nearest_of(xy, 5, torch.device("cpu"))
    every = np.linalg.norm(xy[:, None] - xy[None], axis=2)
    pitch = np.median(np.sort(every, 1)[:, 1])
    for spot in range(12):
        assert found.rows[spot].tolist() == np.argsort(every[spot])[:5].tolist()
        assert np.allclose(found.distance[spot], np.sort(every[spot])[:5] / pitch, atol=1e-4)
    few = nearest_of(xy[:2], 4, torch.device("cpu"))
    assert few.rows.tolist() == [[0, 1, 0, 0], [1, 0, 1, 1]]
    torch.manual_seed(0)
    made = Attention(1, 6, 5, AttentionPart(neighbours=4, dropout=0.0))
    x = torch.randn(2, 6)
    without = made(x[None], x, few.rows[None, :, :2], few.distance[None, :, :2])
    together = made(x[None], x, few.rows[None], few.distance[None])
    assert torch.allclose(together, without)  # what stands in is too far to be seen
    together.sum().backward()
    assert all(bool(torch.isfinite(p.grad).all()) for p in made.parameters() if p.grad is not None)
    assert nearest_of(xy[:1], 3, torch.device("cpu")).rows.tolist() == [[0, 0, 0]]


def test_the_contrastive_loss_by_hand() -> None:
    torch.manual_seed(0)
    made = Contrast(2, 6, 5, ContrastPart(width=3, temperature=0.2))
    hidden, target = torch.randn(2, 4, 6), torch.randn(2, 4, 5)
    got = made(hidden, target)
    for m in range(2):
        image = F.normalize(hidden[m] @ made.image[m], dim=1).detach().numpy()
        gene = F.normalize(target[m] @ made.gene[m], dim=1).detach().numpy()
        total = 0.0
        for i in range(4):
            alike = np.array([(image[i] @ image[j] + gene[i] @ gene[j]) / 2 / 0.2 for j in range(4)])
            soft = np.exp(alike) / np.exp(alike).sum()
            for one, other in ((image, gene), (gene, image)):
                logits = np.array([one[i] @ other[j] / 0.2 for j in range(4)])
                total -= float((soft * (logits - np.log(np.exp(logits).sum()))).sum())
        assert float(got[m].detach()) == pytest.approx(total / 8, rel=1e-4)


def test_the_hypergraph_block_is_two_convolutions_without_weights() -> None:
    data = samples_of(TRAIN, torch.float32)
    neighbours = torch.from_numpy(
        np.concatenate([nearest_of(p.xy, 5, torch.device("cpu")).rows.numpy() + p.start for p in data.parts])
    )
    data = type(data)(data.cache, data.rows, neighbours, data.target, data.raw, data.depth, data.parts)
    part = data.parts[1]
    mean = hypergraph_mean(data, part, 3)
    x = torch.randn(part.stop - part.start, 4)
    got = torch.from_numpy(mean @ x.double().numpy()).float()
    for spot in range(len(x)):
        around = neighbours[part.start + spot]
        a = operator(incidence(data.gather(around, 0)[None], 3))[0]
        assert torch.allclose(got[spot], (a @ (a @ x[around - part.start])).mean(0), atol=1e-5)


@pytest.mark.parametrize("name", SWITCHES)
def test_a_switch_changes_what_is_learnt_and_is_kept_with_the_model(name: str, tmp_path: Any) -> None:
    train, test = samples_of(TRAIN, torch.float32), samples_of(TEST, torch.float32)
    plain = registry.fit(recipe(network=NETWORK), train, GENES, {}).model
    model = registry.fit(with_switch(name), train, GENES, {}).model
    assert isinstance(model, Context)
    assert not np.allclose(model.predict(test), plain.predict(test), atol=1e-4)
    model.save_pretrained(tmp_path / "model")
    again = Context.from_pretrained(tmp_path / "model")
    assert np.array_equal(again.predict(test), model.predict(test))
    both = samples_of([*TEST, *TRAIN], torch.float32)
    assert np.allclose(model.predict(both)[: len(test)], model.predict(test), atol=1e-5)
    fresh = Context.build(with_switch(name), 6, GENES, {})
    torch.manual_seed(with_switch(name).seed)
    first = dict(Context.build(with_switch(name), 6, GENES, {}).named_parameters())
    assert fresh.state_dict().keys() == model.state_dict().keys()
    still = [key for key, value in model.named_parameters() if torch.equal(value, first[key])]
    assert still == []


def test_attention_in_parts_is_attention_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    members = Members(2, 8, 5, 3, attention=(4, AttentionPart(neighbours=3))).eval()
    xy = np.random.default_rng(0).uniform(0, 9, (11, 2))
    around = Surroundings(torch.randn(11, 4), nearest_of(xy, 3, torch.device("cpu")))
    x = torch.randn(11, 8)
    other = torch.randn(11, 8)
    whole, _ = members.agreed([x], around)
    rows = torch.arange(11).expand(2, -1)
    trained = [members.decode(members.encode(view.expand(2, -1, -1), 0.0, rows, around)) for view in (x, other)]
    assert torch.allclose(whole, trained[0].mean(0), atol=1e-6), "prediction sees what training saw"
    both, spread = members.agreed([x, other], around)
    assert torch.allclose(both, (trained[0] + trained[1]).mean(0) / 2, atol=1e-6)
    assert spread is not None
    assert torch.allclose(spread, ((trained[0] + trained[1]) / 2).std(0, correction=0), atol=1e-6)
    monkeypatch.setattr("nh2st_pipe.heads.members._AT_ONCE", 4)
    monkeypatch.setattr("nh2st_pipe.heads.members._FEWEST_AT_ONCE", 1)
    assert torch.allclose(members.agreed([x], around)[0], whole, atol=1e-6)
