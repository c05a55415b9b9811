"""How long a report takes, what it weighs, and how fast a choice of gene is drawn.

    python benchmarks/report.py [--slides 10] [--spots 3000] [--genes 250]

A run of generated slides, their values smooth over the slide with noise, is reported on, and where there is a Chromium,
genes are chosen one after another in the page. The report is held against reading the run's predictions alone.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
import time
from pathlib import Path

import anndata
import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1]))

from nh2st_pipe.heads.base import Prediction
from nh2st_pipe.reporting.page import report
from nh2st_pipe.runs.predictions import write_prediction
from nh2st_pipe.store.read import SlideData
from nh2st_pipe.tiles.neighbours import nearest_spots


def make_slide(name: str, n_spots: int, seed: int) -> SlideData:
    """Return a slide of spots on a grid, without embeddings."""
    side = int(np.ceil(np.sqrt(n_spots)))
    row, col = (axis.ravel()[:n_spots] for axis in np.mgrid[:side, :side])
    xy = np.stack((col, row), 1) * 200.0 + 300.0
    rng = np.random.default_rng(seed)
    small = rng.integers(120, 255, (24, 24, 3), dtype=np.uint8)
    picture = np.asarray(Image.fromarray(small).resize((900, 900), Image.Resampling.BICUBIC))
    scale = 900 / (xy.max() + 300)
    factors = {"tissue_hires_scalef": scale, "spot_diameter_fullres": 110.0}
    return SlideData(
        slide_id=name,
        patient=name,
        extra={},
        barcodes=[f"{name}_{r}x{c}" for r, c in zip(row, col, strict=True)],
        xy=xy,
        array_row=row,
        array_col=col,
        views=np.zeros((n_spots, 1, 2), np.float16),
        neighbours=nearest_spots(xy, 6)[0],
        counts=None,
        genes=[],
        uns={"spatial": {name: {"images": {"hires": picture}, "scalefactors": factors}}},
    )


def make_predictions(folder: Path, n_slides: int, n_spots: int, n_genes: int) -> None:
    """Write predictions with truth."""
    genes = [f"G{i}" for i in range(n_genes)]
    for number in range(n_slides):
        slide = make_slide(f"s{number}", n_spots, number)
        rng = np.random.default_rng(number)
        place = slide.xy / slide.xy.max()
        waves = np.sin(place @ rng.normal(0, 6, (2, n_genes)) + rng.uniform(0, 6, n_genes))
        truth = (1 + waves + rng.normal(0, 0.4, waves.shape)).clip(0).astype(np.float32)
        predicted = (1 + 0.7 * waves + rng.normal(0, 0.05, waves.shape)).astype(np.float32)
        about = {"recipe": "bench", "out_of_fold": True, "fold": slide.slide_id}
        pcc = {"cv_pcc": dict.fromkeys(genes, 0.5)}
        write_prediction(folder / f"s{number}.h5ad", slide, genes, Prediction(predicted), truth, None, about, pcc)


def in_browser(page: Path, chosen: int) -> None:
    """Say how long choices of genes take to be drawn, all maps, scatter and small maps together."""
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if found is None:
        print("no Chromium here: not drawn")
        return
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found, args=["--no-sandbox"])
        tab = browser.new_page(viewport={"width": 1280, "height": 900})
        began = time.perf_counter()
        tab.goto(page.as_uri())
        while tab.evaluate(
            "current === null || at('multiples-state').textContent !== '' || !at('multiples').children.length"
        ):
            time.sleep(0.02)
        print(f"opened and all slides unpacked: {time.perf_counter() - began:.2f} s")
        for words, script in (("maps and scatter", "drawMultiples = () => {};"), ("with all slides' small maps", "")):
            times = tab.evaluate(
                f"""async (n) => {{
                    {"const kept = drawMultiples; " + script if script else ""}
                    const times = [];
                    for (let g = 0; g < n; g++) {{
                        const began = performance.now();
                        state.gene = g; state.spot = null; markGene(false);
                        await draw();
                        canvasRead();
                        times.push(performance.now() - began);
                    }}
                    {"drawMultiples = kept;" if script else ""}
                    return times;
                    function canvasRead() {{
                        panels.forEach(({{ canvas }}) => canvas.getContext("2d").getImageData(0, 0, 1, 1));
                    }}
                }}""",
                chosen,
            )
            print(f"a choice of gene, {words}: median {np.median(times):.0f} ms, longest {max(times):.0f} ms")
        browser.close()


def main() -> None:
    """Measure and print."""
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--slides", type=int, default=10)
    arguments.add_argument("--spots", type=int, default=3000)
    arguments.add_argument("--genes", type=int, default=250)
    asked = arguments.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "predictions"
        folder.mkdir()
        make_predictions(folder, asked.slides, asked.spots, asked.genes)
        began = time.perf_counter()
        for file in folder.glob("*.h5ad"):
            anndata.read_h5ad(file)
        read = time.perf_counter() - began
        began = time.perf_counter()
        page = report(folder)
        took = time.perf_counter() - began
        size = page.stat().st_size / 1e6
        print(f"{asked.slides} slides × {asked.spots:,} spots × {asked.genes} genes: report {took:.1f} s, "
              f"{took / read:.1f} times reading the predictions; {size:.1f} MB")  # fmt: skip
        in_browser(page, 30)


if __name__ == "__main__":
    main()
