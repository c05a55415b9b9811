"""Retrieval between sections: whether the tiles that look most alike express alike.

    python benchmarks/retrieval.py --embeddings store.zarr [--classes 5] [-k 5]

Classes are k-means of what was measured (principal components of the default recipe's targets, all sections together).
Each tile asks for the k likest tiles of the other sections, its own being left out (other patients' where there are
several); mMV@k is the share of tiles whose class their majority has (RetCCL: Wang et al., Medical Image Analysis 83,
2023; of equals the nearest decides), the mean over sections. Beside it chance: k tiles drawn from the same others, and
the class that is most common there.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from sklearn.cluster import KMeans
from sklearn.decomposition import PCA
from sklearn.metrics import f1_score

from nh2st_pipe.data.panels import choose_panel
from nh2st_pipe.data.targets import targets
from nh2st_pipe.recipes.train import load_train_recipe
from nh2st_pipe.searching.index import index_of
from nh2st_pipe.searching.scan import nearest_tiles
from nh2st_pipe.store.read import open_store

_SEED, _DRAWS, _COMPONENTS = 2021, 20, 20


def vote(classes: Sequence[int]) -> int:
    """Return the class that most have; of equals that of the first."""
    count = Counter(classes)
    most = max(count.values())
    return next(each for each in classes if count[each] == most)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--embeddings", required=True)
    parser.add_argument("--classes", type=int, default=5)
    parser.add_argument("-k", type=int, default=5)
    given = parser.parse_args()
    store = open_store(given.embeddings)
    index, recipe = index_of(store).slides, load_train_recipe("nh2st-context").targets
    names = [name for name in index if store.has_expression(name)]
    if len(names) < 2:
        sys.exit("at least two sections with expression are needed")
    slides = {name: store.read(name, first_view_only=True) for name in names}
    panel = choose_panel(list(slides.values()), recipe)
    measured = {name: targets(slide, panel, recipe).values for name, slide in slides.items()}
    every = np.nan_to_num(np.concatenate(list(measured.values())))
    parts = PCA(min(_COMPONENTS, *every.shape), random_state=_SEED).fit_transform(every)
    found = KMeans(given.classes, random_state=_SEED, n_init=10).fit_predict(parts)
    ends = np.cumsum([len(measured[name]) for name in names])
    of = dict(zip(names, np.split(found, ends[:-1]), strict=True))
    patients = {index[name].patient for name in names}
    draw, rows = np.random.default_rng(_SEED), []
    for name in names:
        others = [
            index[each]
            for each in names
            if each != name and (len(patients) == 1 or index[each].patient != index[name].patient)
        ]
        pool: NDArray[np.int64] = np.concatenate([of[each.slide_id] for each in others])
        near = nearest_tiles(np.array(index[name].vectors()), others, given.k)
        said = np.array([vote([int(of[of_slide][row]) for _, of_slide, row in tiles]) for tiles in near])
        truth = of[name]
        by_chance = [
            np.mean([vote(draw.choice(pool, given.k).tolist()) == each for each in truth]) for _ in range(_DRAWS)
        ]
        common = Counter(pool.tolist()).most_common(1)[0][0]
        macro = f1_score(truth, said, average="macro")
        rows.append((np.mean(said == truth), np.mean(by_chance), np.mean(truth == common), macro))
        print(f"{name}: mMV@{given.k} {rows[-1][0]:.3f}, by chance {rows[-1][1]:.3f}, {len(truth)} tiles")
    mean = np.mean(rows, axis=0)
    print(
        f"{len(names)} sections, {given.classes} classes: mMV@{given.k} {mean[0]:.3f}, macro-F1 {mean[3]:.3f}; tiles "
        f"drawn at random {mean[1]:.3f}, the most common class {mean[2]:.3f}"
    )


if __name__ == "__main__":
    main()
