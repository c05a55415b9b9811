from __future__ import annotations

from nh2st_pipe.demo import standing


def test_the_demo_says_where_its_head_stands() -> None:
    own = {"head": "ours", "local": 0.7, "neigh": 0.8, "noise": 0.1}
    ridge = {"head": "ridge", "local": 0.75, "neigh": 0.5, "noise": 0.1}
    mlp = {"head": "mlp", "local": 0.78, "neigh": 0.6, "noise": 0.1}
    behind, ahead = standing([own, ridge, mlp])
    assert behind == "on genes that follow the spot, ours (0.700) is behind ridge, mlp (mlp 0.780)"
    assert ahead == "on genes that follow its neighbours, ours is ahead of every baseline (0.800; mlp 0.600)"
