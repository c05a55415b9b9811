from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from nh2st_pipe.core.errors import RunError, TrainError
from nh2st_pipe.data.samples import Part, ResidentCache, Samples
from nh2st_pipe.heads import registry
from nh2st_pipe.heads.base import FeatureScaler, HeadModel, Plan
from nh2st_pipe.heads.hypergraph import HypergraphConv, incidence, operator
from nh2st_pipe.heads.linear import Mean, Ridge
from nh2st_pipe.heads.nh2st import NH2ST, CrossAttention, contrastive_loss
from nh2st_pipe.heads.retrieval import KNN
from nh2st_pipe.recipes.train import FitRecipe, TrainRecipe, load_train_recipe
from nh2st_pipe.runs.model import load_model

GENES = [f"g{i}" for i in range(5)]


def resident(x: torch.Tensor, neighbours: torch.Tensor, target: torch.Tensor) -> Samples:
    return Samples(ResidentCache(x), torch.arange(len(x)), neighbours, target, target)


def everything(data: Samples) -> torch.Tensor:
    """N × V × d."""
    return data.gather(torch.arange(len(data)), slice(None))


PLAN = Plan(seed=1, steps=FitRecipe())


def samples(n: int = 30, views: int = 8, dim: int = 7, seed: int = 0) -> Samples:
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, views, dim)).astype(np.float16)
    neighbours = np.stack([np.r_[i, rng.permutation(np.delete(np.arange(n), i))[:8]] for i in range(n)])
    target = x.mean(1)[:, :5] + x[neighbours].mean((1, 2))[:, :5] + rng.normal(size=(n, 5)) * 0.1
    return resident(torch.from_numpy(x), torch.from_numpy(neighbours), torch.from_numpy(target.astype(np.float32)))


def small(**changes: Any) -> NH2ST:
    torch.manual_seed(1)
    options = {"width": 16, "hidden": 12, "decoder_hidden": 6, "heads": 4, **changes}
    return NH2ST(7, GENES, **options)


@given(n=st.integers(2, 9), edges=st.integers(1, 7), seed=st.integers(0, 999))
@settings(deadline=None, max_examples=30)
@pytest.mark.filterwarnings("ignore")
def test_hypergraph_convolution_is_pytorch_geometrics(n: int, edges: int, seed: int) -> None:
    from torch_geometric.nn import HypergraphConv as Reference

    torch.manual_seed(seed)
    h = (torch.rand(n, edges) < 0.5).float()
    h[0, edges - 1] = 1.0  # the reference counts edges up to the last that has a node
    reference, ours = Reference(6, 4), HypergraphConv(6, 4)
    with torch.no_grad():
        reference.bias.normal_()
        ours.project.weight.copy_(reference.lin.weight)
        ours.bias.copy_(reference.bias)
    x = torch.randn(n, 6)
    expected = reference(x, h.nonzero().T)
    assert torch.allclose(ours(x[None], operator(h[None]))[0], expected, atol=1e-5)


def test_hyperedges_hold_a_node_and_its_three_most_similar() -> None:
    x = torch.randn(4, 9, 6, generator=torch.Generator().manual_seed(0))
    h = incidence(x, 3)
    for spot in range(4):
        like = F.cosine_similarity(x[spot][:, None], x[spot][None], dim=-1)
        like.fill_diagonal_(-2)
        for edge in range(9):
            members = {edge, *like[edge].argsort(descending=True)[:3].tolist()}
            assert set(torch.nonzero(h[spot, :, edge])[:, 0].tolist()) == members
    assert (h.sum(1) == 4).all()
    assert torch.allclose(operator(h).sum(2), torch.ones(4, 9), atol=1e-6)


def test_contrastive_loss_by_hand() -> None:
    rng = np.random.default_rng(0)
    image, gene = rng.normal(size=(3, 4)), rng.normal(size=(3, 4))
    total = 0.0
    for i in range(3):
        logits = []
        for j in range(3):
            cosine = image[i] @ gene[j] / np.linalg.norm(image[i]) / np.linalg.norm(gene[j])
            logits.append(cosine / 0.05 * (1.0 if i == j else 0.1))
        total -= logits[i] - np.log(np.exp(logits).sum())
    got = contrastive_loss(torch.tensor(image), torch.tensor(gene), 0.05, 0.1)
    assert float(got) == pytest.approx(total / 3)


def test_cross_attention_is_torchs_on_the_same_weights() -> None:
    torch.manual_seed(0)
    ours = CrossAttention(16, 4, 1.0, 0.0)
    theirs = torch.nn.MultiheadAttention(16, 4, batch_first=True)
    with torch.no_grad():
        theirs.in_proj_bias.normal_()
        theirs.out_proj.bias.normal_()
        ours.value.weight.copy_(theirs.in_proj_weight[32:])
        ours.value.bias.copy_(theirs.in_proj_bias[32:])
        ours.out.load_state_dict(theirs.out_proj.state_dict())
    q, kv = torch.randn(5, 16), torch.randn(5, 16)
    key = ours.norm_kv(kv)[:, None]
    x = q + theirs(torch.randn(5, 1, 16), key, key)[0][:, 0]  # whatever the query
    expected = ours.norm_out(x + ours.mlp(ours.norm_mlp(x)))
    assert torch.allclose(ours(q, kv), expected, atol=1e-6)


def test_losses_are_those_of_a_plain_forward_spot_by_spot() -> None:
    data, model = samples(), small(dropout=0.0)
    assert model.scaler is not None
    model.scaler.fit(data)
    rows, views = torch.tensor([3, 8, 8, 21]), torch.tensor([0, 5, 2, 7])
    operators = model.operators(data)
    got = model.losses(data, operators, rows, views)

    assert data.target is not None
    h_p: list[torch.Tensor] = []
    h_g: list[torch.Tensor] = []
    z_p: list[torch.Tensor] = []
    z_g: list[torch.Tensor] = []
    for row, view in zip(rows.tolist(), views.tolist(), strict=True):
        around = data.neighbours[row]
        image = model.scaler(data.gather(around, view))
        gene = model.gene_encoder(data.target[around])
        a = operator(incidence(data.gather(around, 0)[None], 3))
        h_p.append(model.query(image[0]))
        h_g.append(gene[0])
        for branch, x, out in ((model.image_neighbours, image, z_p), (model.gene_neighbours, gene, z_g)):
            x = F.relu(branch.first(x[None], a))
            out.append(F.relu(branch.second(x, a)).mean(1)[0])

    def compare(image: list[torch.Tensor], gene: list[torch.Tensor]) -> torch.Tensor:
        p, g = torch.stack(image), torch.stack(gene)
        p = model.cross[0](p, g)
        return contrastive_loss(p, model.cross[0](g, p), 0.05, 0.1)

    mse = F.mse_loss(model.decoder(torch.stack(h_p)), data.target[rows])
    query, neighbour = compare(h_p, h_g), compare(z_p, z_g)
    assert got["mse"].item() == pytest.approx(mse.item(), rel=1e-4)
    assert got["query"].item() == pytest.approx(query.item(), rel=1e-4)
    assert got["neighbour"].item() == pytest.approx(neighbour.item(), rel=1e-4)
    assert got["total"].item() == pytest.approx((mse + query + 0.5 * neighbour).item(), rel=1e-4)


def test_every_parameter_learns_and_prediction_is_the_mean_over_views() -> None:
    data, model = samples(), small(dropout=0.0)
    model.losses(data, model.operators(data), torch.arange(8), torch.arange(8))["total"].backward()
    # The neighbour branch's parameters included; only the prediction does without them.
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum()] == []
    rows = torch.arange(len(data))
    expected = torch.stack([model.eval().forward_view(data, rows, v) for v in range(8)]).mean(0)
    assert np.allclose(model.predict(data), expected.detach(), atol=1e-6)


def test_scaling_is_robust_and_clipped() -> None:
    data = samples()
    x = everything(data).clone()
    x[:, :, 0] = 3.0  # never varies
    x[:, :, 1] += 1000.0
    data = resident(x, data.neighbours, data.target)  # type: ignore[arg-type]
    scaler = FeatureScaler(7, 8.0)
    scaler.fit(data)
    flat = x.flatten(0, 1).double()
    std = flat.std(0, unbiased=False)
    assert torch.allclose(scaler.mean.double(), flat.mean(0), rtol=1e-5)
    expected = torch.maximum(std, 0.1 * std.median())
    assert torch.allclose(scaler.scale.double(), expected, rtol=1e-2)
    assert scaler(x).abs().max() <= 8.0
    assert float(scaler(torch.full((7,), 6e4, dtype=torch.float16)).max()) == 8.0


@pytest.mark.parametrize("context", [False, True])
@pytest.mark.parametrize("views", [1, 8])
@pytest.mark.parametrize("wide", [False, True])
def test_ridge_solves_its_normal_equations(
    context: bool, views: int, wide: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = samples(views=views)
    if wide:  # as where there are fewer rows than values: by products of rows
        monkeypatch.setattr(Ridge, "_products_of", Ridge._dual)
        monkeypatch.setattr("nh2st_pipe.heads.linear._BLOCK_VALUES", 3 * len(data) * views)
    model = Ridge(7, GENES, context=context, alpha=20.0)
    model.fit(data, PLAN)
    x = (everything(data).double() - model.scaler.mean) / model.scaler.scale  # type: ignore[operator]
    x = x.clamp(-8, 8)
    if context:
        x = torch.cat((x, x[data.neighbours].mean(1)), 2)
    rows = x.flatten(0, 1).numpy()
    assert data.target is not None
    y = np.repeat(data.target.double().numpy(), views, axis=0)
    centred = rows - rows.mean(0)
    weight = np.linalg.solve(centred.T @ centred + 20.0 * views * np.eye(rows.shape[1]), centred.T @ (y - y.mean(0)))
    expected = ((x.numpy() - rows.mean(0)) @ weight + y.mean(0)).mean(1)
    assert np.allclose(model.predict(data), expected, atol=1e-4)


@pytest.mark.parametrize(("n", "dim", "way"), [(9, 40, "_dual"), (41, 40, "_primal")])
def test_ridge_takes_the_smaller_matrix(n: int, dim: int, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    taken = list[str]()
    for name in ("_dual", "_primal"):
        plain = getattr(Ridge, name)

        def noting(*arguments: Any, name: str = name, plain: Any = plain) -> Any:
            taken.append(name)
            return plain(*arguments)

        monkeypatch.setattr(Ridge, name, noting)
    Ridge(dim, GENES, alpha=5.0).fit(samples(n=n, views=1, dim=dim), PLAN)
    assert taken == [way]


def test_mean_is_the_mean() -> None:
    data, model = samples(), Mean(GENES)
    model.fit(data, PLAN)
    assert data.target is not None
    assert np.allclose(model.predict(data), data.target.mean(0))


@pytest.mark.parametrize("k", [1, 4, 99])
def test_retrieval_is_the_mean_of_the_most_alike_training_spots(k: int) -> None:
    data, new = samples(), samples(n=20, seed=3)
    model = KNN(7, GENES, k=k)
    model.fit(data, PLAN)

    def keys(of: Samples) -> torch.Tensor:
        return F.normalize(model.scaler(everything(of)).mean(1))

    assert data.target is not None
    nearest = (keys(new) @ keys(data).T).argsort(dim=1, descending=True)[:, :k]
    assert np.allclose(model.predict(new), data.target[nearest].mean(1), atol=1e-6)


@pytest.mark.parametrize("kind", ["knn", "ridge-context", "mlp"])
def test_heads_fitted_together_are_those_fitted_alone(kind: str) -> None:
    data, given = samples(), recipe(kind)
    key, values = {"knn": ("head.k", (3, 12)), "mlp": ("head.network.epochs", (2, 5))}.get(
        kind, ("head.alpha", (1, 90))
    )
    recipes = [given.chosen({key: value}) for value in values]
    together = [model.predict(data) for model in registry.fit_each(recipes, data, GENES, {})]
    alone = [registry.fit(each, data, GENES, {}).model.predict(data) for each in recipes]
    assert not np.allclose(alone[0], alone[1], atol=1e-3)
    assert all(np.allclose(one, other, atol=1e-4) for one, other in zip(together, alone, strict=True))


def recipe(kind: str) -> TrainRecipe:
    values = load_train_recipe(kind).model_dump()
    if kind == "nh2st":
        values["head"] |= {"width": 16, "hidden": 12, "decoder_hidden": 6, "heads": 4}
        values["fit"] |= {"epochs": 3, "lr": 1e-3}
    return TrainRecipe.model_validate(values)


@pytest.mark.parametrize("kind", ["mean", "knn", "mlp", "ridge", "ridge-context", "nh2st"])
def test_a_saved_head_predicts_the_same(kind: str, tmp_path: Path) -> None:
    data = samples()
    trained = registry.fit(recipe(kind), data, GENES, {"store": {"x": 1}})
    trained.model.save_pretrained(tmp_path / "model")
    assert sorted(p.name for p in (tmp_path / "model").iterdir()) == ["README.md", "config.json", "model.safetensors"]
    loaded = load_model(tmp_path)
    assert loaded.genes == GENES
    assert loaded.about["store"] == {"x": 1}
    assert np.array_equal(loaded.predict(data), trained.model.predict(data))
    direct = type(trained.model).from_pretrained(str(tmp_path / "model"))
    assert np.array_equal(direct.predict(data), trained.model.predict(data))


def test_a_head_with_missing_weights_is_never_loaded(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    registry.fit(recipe("nh2st"), samples(), GENES, {}).model.save_pretrained(tmp_path / "model")
    path = tmp_path / "model" / "model.safetensors"
    state = load_file(path)
    del state["query.weight"]
    save_file(state, path)
    with pytest.raises(RunError, match=r"cannot be loaded: .*query\.weight"):
        load_model(tmp_path)
    path.write_bytes(b"cut")
    with pytest.raises(RunError, match="cannot be loaded"):
        load_model(tmp_path)
    (tmp_path / "model" / "config.json").write_text(json.dumps({"kind": "novel"}))
    with pytest.raises(RunError, match="a head of kind 'novel'; this version knows mean, ridge, hest-ridge, knn"):
        load_model(tmp_path)
    with pytest.raises(RunError, match="there is no run at"):
        load_model(tmp_path / "none")
    with pytest.raises(RunError, match="holds no trained model"):
        load_model(tmp_path.parent)


def test_the_best_watched_epoch_is_kept_and_patience_ends_training() -> None:
    values = recipe("nh2st").model_dump()
    values["fit"] |= {"epochs": 60, "patience": 4, "lr": 3e-3}
    watched = samples(seed=5)
    trained = registry.fit(TrainRecipe.model_validate(values), samples(), GENES, {}, watched=watched)
    scores = [row["watched_pcc"] for row in trained.history]
    assert trained.best_epoch == int(np.argmax(scores)) + 1
    assert len(scores) == min(60, trained.best_epoch + 4)
    from nh2st_pipe.evaluation.metrics import mean_pcc

    assert watched.target is not None
    assert mean_pcc(trained.model.predict(watched), watched.target.numpy(), []) == pytest.approx(max(scores))


def test_the_same_seed_gives_the_same_model_bit_for_bit() -> None:
    for kind in ("nh2st", "mlp", "knn"):
        one, two = (registry.fit(recipe(kind), samples(), GENES, {}).model.state_dict() for _ in range(2))
        assert all(torch.equal(one[name], two[name]) for name in one)
    one = registry.fit(recipe("nh2st"), samples(), GENES, {}).model.state_dict()
    values = {**recipe("nh2st").model_dump(), "seed": 7}
    other = registry.fit(TrainRecipe.model_validate(values), samples(), GENES, {}).model.state_dict()
    assert not torch.equal(one["query.weight"], other["query.weight"])


def test_a_loss_that_is_no_number_stops_training() -> None:
    values = recipe("nh2st").model_dump()
    values["fit"]["lr"] = 1e30
    with pytest.raises(TrainError, match="not a number from epoch 1 on"):
        registry.fit(TrainRecipe.model_validate(values), samples(), GENES, {})


@pytest.mark.parametrize(
    "kind", ["mean", "knn", "mlp", "ridge", "ridge-context", "nh2st", "nh2st-context", "landmarks"]
)
def test_a_gene_that_a_slide_lacks_is_learnt_from_the_others(kind: str) -> None:
    """Not as if it were zero there, and its absence moves no other gene of a head that is solved."""
    data = samples(n=60, views=2)
    assert data.target is not None
    target = data.target + 3.0
    parts = tuple(Part(f"s{i}", 20 * i, 20 * i + 20, np.random.default_rng(i).normal(size=(20, 2))) for i in range(3))
    depth = torch.full((60,), 100.0, dtype=torch.float64)
    neighbours = torch.arange(60)[:, None].repeat(1, 9)  # no neighbourhood reaches over a slide's end
    whole = replace(data, parts=parts, depth=depth, neighbours=neighbours, target=target, raw=target)
    lacking = target.clone()
    lacking[20:40, 1] = float("nan")
    masked = replace(whole, target=lacking, raw=lacking)
    values = recipe("nh2st-context" if kind == "landmarks" else kind).model_dump()
    if kind == "landmarks":
        values["head"] |= {"network": None, "kernel": {"exact_up_to": 10, "landmarks": 40, "rank": 5}}
    elif kind == "nh2st-context":
        values["head"]["kernel"]["rank"] = 5
        values["head"]["network"] |= {"epochs": 3, "components": 4}
    elif kind == "nh2st":
        values["fit"]["epochs"] = 3
    given = TrainRecipe.model_validate(values)
    one = registry.fit(given, masked, GENES, {}).model.predict(whole)
    assert np.isfinite(one).all()
    level = float(one[:, 1].mean())
    assert level > 2.5  # as zeros they would bring it down to about 2
    two = registry.fit(given, whole, GENES, {}).model.predict(whole)
    assert not np.allclose(one[:, 1], two[:, 1], atol=1e-4)
    if kind in ("mean", "knn", "ridge", "ridge-context", "landmarks"):
        assert np.allclose(one[:, [0, 2, 3, 4]], two[:, [0, 2, 3, 4]], atol=1e-4)
    if kind in ("ridge", "ridge-context"):  # exactly what the slides that have it say
        kept = torch.ones(60, dtype=torch.bool)
        kept[20:40] = False
        model = registry.head_class("ridge").build(given, 7, GENES, {})
        assert isinstance(model, Ridge)
        assert isinstance(model.scaler, FeatureScaler)
        scaler = model.scaler
        scaler.fit(whole)
        model.scaler = torch.nn.Sequential(scaler)  # fitted on all
        model.fit(whole.subset(kept), PLAN)
        assert np.allclose(model.predict(whole)[:, 1], one[:, 1], atol=1e-4)


@pytest.mark.parametrize("kind", ["nh2st", "mlp"])
def test_training_learns_what_the_spot_shows(kind: str) -> None:
    values = recipe(kind).model_dump()
    if kind == "nh2st":
        values["fit"] |= {"epochs": 40, "lr": 5e-3}
    else:
        values["head"]["network"] |= {"epochs": 80, "lr": 1e-2, "dropout": 0.1}
    data = samples(n=60, views=1)
    model: HeadModel = registry.fit(TrainRecipe.model_validate(values), data, GENES, {}).model
    assert data.target is not None
    floor = float(data.target.var(0, unbiased=False).mean())
    assert float(((torch.from_numpy(model.predict(data)) - data.target) ** 2).mean()) < 0.5 * floor
