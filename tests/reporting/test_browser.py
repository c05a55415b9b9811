"""What a person sees of a report, in headless Chromium; passed over where there is none."""

from __future__ import annotations

import csv
import io
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from playwright.sync_api import Browser, Error, Page, sync_playwright

from nh2st_pipe.evaluation.reference import Familiarity
from nh2st_pipe.heads.base import Prediction
from nh2st_pipe.reporting.page import report
from nh2st_pipe.runs.predictions import write_prediction
from tests.reporting.test_page import GENES, HOSTILE, SIDE, make_run, slide_data, values

QUIET = ("--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update")


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """Chromium: the system's, or Playwright's own."""
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    with sync_playwright() as playwright:
        if found is None and not Path(playwright.chromium.executable_path).is_file():
            pytest.skip("there is no Chromium on this machine (make browser gets one)")
        yield (started := playwright.chromium.launch(executable_path=found, args=[*QUIET]))
        started.close()


@pytest.fixture(scope="module")
def run_page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of a run of two slides."""
    return report(make_run(tmp_path_factory.mktemp("report") / "run"))


@pytest.fixture(scope="module")
def prediction_page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of predictions without truth: KRT19 is not to be trusted, and the last two tiles are unlike others."""
    folder = tmp_path_factory.mktemp("predictions")
    predicted, _ = values(3)
    far = np.array([5.0] * (SIDE**2 - 2) + [99.9, 100.0], np.float32)
    write_prediction(
        folder / "new.h5ad",
        slide_data("new"),
        GENES,
        Prediction(predicted, spread=(np.abs(predicted) / 9).astype(np.float32)),
        None,
        None,
        {"recipe": "nh2st", "out_of_fold": False, "interval_level": 0.9, "intervals": "intervals at 90% …"},
        {"cv_pcc": dict.fromkeys(GENES, 0.3), "trusted": {GENES[0]: True, GENES[1]: False, GENES[2]: True}},
        half_width=dict.fromkeys(GENES, 0.25),
        familiar=Familiarity((far / 50).astype(np.float32), far),
    )
    return report(folder)


@pytest.fixture
def seen(browser: Browser) -> Iterator[Page]:
    """A page of 1280 px; a test in which its script fails, or it asks anything of the network, fails."""
    context = browser.new_context(viewport={"width": 1280, "height": 900}, accept_downloads=True)
    page = context.new_page()
    faults: list[str] = []
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.on("console", lambda message: faults.append(message.text) if message.type == "error" else None)
    page.on("request", lambda asked: faults.append(asked.url) if asked.url.startswith("http") else None)
    page.on("dialog", lambda dialog: faults.append(dialog.message))
    yield page
    context.close()
    assert faults == []


def opened(page: Page, path: Path, words: str = "") -> Page:
    page.goto(path.as_uri() + words)
    until(page, "current !== null && at('shown').ariaBusy === 'false'")
    return page


def until(page: Page, condition: str) -> None:
    """Wait for a condition; Playwright's own way of waiting is refused by the page, which runs no text as a script."""
    for _ in range(250):
        if page.evaluate(condition):
            return
        page.wait_for_timeout(20)
    raise AssertionError(condition)


def colour(page: Page, key: str, spot: int) -> list[int]:
    """Return the colour of the middle of a spot on a map."""
    found: list[int] = page.evaluate(
        """([key, i]) => {
            const { canvas } = panels.find((panel) => panel.key === key);
            const box = canvas.getBoundingClientRect();
            const { scale, ox, oy } = placed(current.slide, box.width, box.height, state.view);
            const dense = canvas.width / box.width;
            const [x, y] = [ox + current.slide.x[i] * scale, oy + current.slide.y[i] * scale];
            const pen = canvas.getContext("2d");
            return [...pen.getImageData(Math.round(x * dense), Math.round(y * dense), 1, 1).data].slice(0, 3);
        }""",
        [key, spot],
    )
    return found


def expected(page: Page, key: str, spot: int) -> list[int]:
    """Return the colour that a spot's value has on its map's scale."""
    found: list[int] = page.evaluate(
        """([key, i]) => {
            const { from, to } = current.scales[key];
            const q = Math.max(0, Math.min(255, Math.round(((current.found.of[key][i] - from) / (to - from)) * 255)));
            return LUTS[paletteOf(key)][q].match(/\\d+/g).map(Number);
        }""",
        [key, spot],
    )
    return found


def opaque(page: Page) -> None:
    page.evaluate("() => { document.getElementById('opacity').value = 100; draw(); }")
    page.wait_for_timeout(50)


@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (390, "dark")])
def test_the_verdict_comes_first_and_nothing_sticks_out(
    browser: Browser, run_page: Path, width: int, scheme: Any
) -> None:
    context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
    page = opened(context.new_page(), run_page)
    assert page.locator("h2").first.inner_text() == "Verdict"
    assert "PCC 0.410" in page.inner_text("#headline")
    assert "Best by mean PCC is nh2st (0.410)" in page.inner_text("#sentences")
    assert page.evaluate("document.documentElement.scrollWidth") == width
    assert page.evaluate("document.documentElement.dataset.theme") == scheme
    light = page.evaluate("getComputedStyle(document.body).backgroundColor")
    page.click("#theme")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") != light
    context.close()


def test_the_best_of_each_column_is_bold_and_this_run_is_tagged(seen: Page, run_page: Path) -> None:
    opened(seen, run_page)
    own, _, ridge = seen.locator("#heads tbody tr").all()
    assert "this run" in own.inner_text()
    assert "this run" not in ridge.inner_text()
    assert "0.410" in own.locator("td.best").all_inner_texts()
    assert "0.370" not in ridge.locator("td.best").all_inner_texts()
    assert own.locator("svg circle").count() == 2, "a dot for each fold"


def test_maps_have_the_colours_of_their_values(seen: Page, run_page: Path) -> None:
    opened(seen, run_page)
    opaque(seen)
    for key in ("target", "predicted", "difference"):
        for spot in (0, 5, 15):
            assert colour(seen, key, spot) == pytest.approx(expected(seen, key, spot), abs=2)
    target = seen.evaluate("Array.from(current.found.of.target)")
    assert target == pytest.approx(values(1)[1][:, 0].tolist(), abs=0.01)
    shared = seen.evaluate("[current.scales.target.from, current.scales.predicted.from]")
    assert shared[0] == shared[1]
    seen.select_option("#scale", "own")
    own = seen.evaluate("[current.scales.target.from, current.scales.predicted.from]")
    assert own[0] != own[1]
    before = colour(seen, "target", 0)
    seen.keyboard.press("h")
    assert colour(seen, "target", 0) != before, "the H&E alone"
    seen.keyboard.press("h")
    assert colour(seen, "target", 0) == before


def test_gene_and_slide_stand_in_the_address(seen: Page, run_page: Path) -> None:
    opened(seen, run_page)
    assert "gene=ACTB" in seen.url
    seen.click("#genes button:text-is('KRT19')")
    seen.keyboard.press("]")
    assert seen.url.endswith("#gene=KRT19&slide=s2")
    assert seen.inner_text("#chosen") == "KRT19 on slide s2"
    seen.goto("about:blank")
    again = opened(seen, run_page, "#gene=KRT19&slide=s2")
    assert again.inner_text("#chosen") == "KRT19 on slide s2"
    again.evaluate("location.hash = '#gene=KRT91&slide=s9'")
    until(again, "document.querySelector('#warnings .asked') !== null")
    asked = again.inner_text("#warnings")
    assert "no gene KRT91; nearest: KRT19" in asked
    assert "no slide s9" in asked


def test_keys_go_through_genes_and_find_one(seen: Page, run_page: Path) -> None:
    opened(seen, run_page)
    seen.keyboard.press("j")
    assert "KRT19" in seen.inner_text("#chosen")
    seen.keyboard.press("k")
    assert "ACTB" in seen.inner_text("#chosen")
    seen.keyboard.press("/")
    seen.keyboard.type("krt")
    assert seen.inner_text("#found") == "1 of 3 genes"
    seen.keyboard.press("Enter")
    assert "KRT19" in seen.inner_text("#chosen")
    assert seen.evaluate("document.activeElement.textContent") == "KRT19"


def test_the_gene_table_sorts_by_what_is_clicked(seen: Page, run_page: Path) -> None:
    opened(seen, run_page)
    names = seen.locator("#genes tbody tr td:first-child")
    seen.click("#genes th button >> nth=0")
    assert names.all_inner_texts() == sorted(GENES, key=str.lower)
    seen.click("#genes th button >> nth=0")
    assert names.all_inner_texts() == sorted(GENES, key=str.lower, reverse=True)
    assert seen.get_attribute("#genes th >> nth=0", "aria-sort") == "descending"


def test_a_spot_is_told_of_and_shown_on_every_map_and_the_scatter(seen: Page, run_page: Path) -> None:
    opened(seen, run_page)
    box = seen.locator("canvas[data-map=target]").bounding_box()
    assert box is not None
    place = seen.evaluate(
        "() => { const c = panels[0].canvas.getBoundingClientRect();"
        " const { scale, ox, oy } = placed(current.slide, c.width, c.height, state.view);"
        " return [ox + current.slide.x[6] * scale, oy + current.slide.y[6] * scale]; }"
    )
    seen.locator("canvas[data-map=target]").hover(position={"x": place[0], "y": place[1]})
    assert seen.evaluate("state.spot") == 6
    tip = seen.inner_text("#tip")
    predicted, target = values(1)
    assert tip.startswith("b6\n")
    told = [float(line.split(" ")[1]) for line in tip.split("\n")[1:3]]
    assert told == pytest.approx([target[6, 0], predicted[6, 0]], abs=0.01)
    assert seen.inner_text("#spot") == " · ".join(tip.split("\n"))
    seen.mouse.move(1, 1)
    assert seen.evaluate("state.spot") is None
    seen.locator("canvas[data-map=predicted]").focus()
    for key, spot in (("ArrowRight", "b0"), ("ArrowRight", "b1"), ("ArrowDown", f"b{SIDE + 1}")):
        seen.keyboard.press(key)
        assert seen.inner_text("#spot").startswith(f"{spot} ")
    found = "[current.scatter.X(current.found.of.target[9]), current.scatter.Y(current.found.of.predicted[9])]"
    dot = seen.evaluate(found)
    seen.locator("#scatter").hover(position={"x": dot[0], "y": dot[1]})
    assert seen.evaluate("state.spot") == 9


def test_zooming_keeps_the_place_under_the_pointer(seen: Page, run_page: Path) -> None:
    opened(seen, run_page)
    canvas = seen.locator("canvas[data-map=predicted]")
    under = """(() => {
        const box = panels[1].canvas.getBoundingClientRect();
        const { scale, ox, oy } = placed(current.slide, box.width, box.height, state.view);
        return [(90 - ox) / scale, (70 - oy) / scale];
    })()"""
    before = seen.evaluate(under)
    canvas.dblclick(position={"x": 90, "y": 70})
    assert seen.evaluate("state.view.k") == 2
    assert seen.evaluate(under) == pytest.approx(before, abs=1)
    canvas.hover(position={"x": 90, "y": 70})
    seen.mouse.down()
    box = canvas.bounding_box()
    assert box is not None
    seen.mouse.move(box["x"] + 110, box["y"] + 90)
    seen.mouse.up()
    assert seen.evaluate(under) != pytest.approx(before, abs=1), "dragged"
    seen.keyboard.press("0")
    assert seen.evaluate("state.view") == {"k": 1, "x": 0.5, "y": 0.5}


def test_what_is_not_to_be_trusted_is_covered_until_it_is_asked_for(seen: Page, prediction_page: Path) -> None:
    opened(seen, prediction_page, "#gene=ACTB")
    opaque(seen)
    assert "2 of 3 genes are to be trusted" in seen.inner_text("#sentences")
    assert "2 of 16 tiles (12.5%) are unlike the training tiles" in seen.inner_text("#sentences")
    assert "2 of 16 tiles are unlike" in seen.inner_text("#note")
    assert seen.locator(".map canvas").count() == 3, "predicted, spread, percentile"
    assert colour(seen, "predicted", 2) == pytest.approx(expected(seen, "predicted", 2), abs=2)
    covered = colour(seen, "predicted", 14)
    assert seen.locator(".veil:visible").count() == 0
    seen.keyboard.press("j")
    assert "KRT19" in seen.inner_text("#chosen")
    assert seen.locator(".veil:visible").count() == 2
    assert "KRT19 is not to be trusted: PCC 0.30" in seen.inner_text(".veil:visible >> nth=0")
    assert colour(seen, "predicted", 2) != pytest.approx(expected(seen, "predicted", 2), abs=2)
    seen.click(".veil:visible button >> nth=0")
    assert seen.locator(".veil:visible").count() == 0
    assert colour(seen, "predicted", 2) == pytest.approx(expected(seen, "predicted", 2), abs=2)
    seen.keyboard.press("k")
    assert colour(seen, "predicted", 14) == pytest.approx(expected(seen, "predicted", 14), abs=2) != covered
    assert seen.get_attribute("#genes tr.untrusted button", "title") == "KRT19"


def test_what_must_be_known_first_of_a_new_slide_stands_first(seen: Page, tmp_path: Path) -> None:
    """How unlike it is, before any verdict on a gene; genes by what predicts transfer; those never judged as such."""
    predicted, _ = values(3)
    far = np.array([5.0] * 4 + [99.9] * (SIDE**2 - 4), np.float32)
    write_prediction(
        tmp_path / "new.h5ad",
        slide_data("new"),
        GENES,
        Prediction(predicted),
        None,
        None,
        {"recipe": "nh2st", "out_of_fold": False, "trusted": "on 4 slides held out, chance is ruled out"},
        {
            "cv_pcc": dict(zip(GENES, (0.9, 0.5, 0.7), strict=True)),
            "half_pcc": dict(zip(GENES, (0.1, 0.4, 0.3), strict=True)),
            "trusted": {GENES[0]: True, GENES[1]: False},
        },
        familiar=Familiarity((far / 50).astype(np.float32), far),
    )
    opened(seen, report(tmp_path))
    first, second, third = seen.locator("#sentences li").all_inner_texts()
    assert first.startswith("12 of 16 tiles (75.0%) are unlike the training tiles")
    assert "say little of this tissue" in second
    assert third.startswith("1 of 3 genes are to be trusted: on 4 slides held out, chance is ruled out.")
    assert "1 were not judged" in third
    rows = seen.locator("#genes tbody tr").all_inner_texts()
    assert [row.split()[0] for row in rows] == [GENES[1], HOSTILE, GENES[0]], "by halves, not by PCC"
    assert [row.split("\t")[1] for row in rows] == ["no", "not judged", "yes"]
    assert seen.locator("#genes tr.unjudged").count() == 1


def test_several_genes_are_searched_for_and_what_is_not_there_is_said(seen: Page, run_page: Path) -> None:
    opened(seen, run_page)
    seen.fill("#search", "krt, ACTB")
    assert seen.inner_text("#found") == "2 of 3 genes"
    seen.fill("#search", "ACTG")
    assert seen.inner_text("#found") == "0 of 3 genes; none is called actg (nearest: ACTB)"
    seen.fill("#search", " , ")
    assert seen.inner_text("#found") == "3 of 3 genes"


def test_keys_of_a_single_character_can_be_switched_off(seen: Page, run_page: Path) -> None:
    opened(seen, run_page)
    gene = seen.inner_text("#chosen")
    seen.click("#help")
    seen.uncheck("#letters")
    seen.click("h1")
    seen.keyboard.press("j")
    assert seen.inner_text("#chosen") == gene
    seen.keyboard.press("/")
    assert seen.evaluate("document.activeElement.id") != "search"
    seen.check("#letters")
    seen.click("h1")
    seen.keyboard.press("j")
    assert seen.inner_text("#chosen") != gene


def test_the_gene_table_is_whole_at_1280_px_and_a_grid(seen: Page, run_page: Path) -> None:
    opened(seen, run_page)
    wide, shown = seen.evaluate("[at('genes').scrollWidth, at('genes').clientWidth]")
    assert wide <= shown
    assert seen.get_by_role("grid", name="Genes").count() == 1
    selected = seen.get_by_role("row", selected=True)
    assert selected.count() == 1


def test_names_of_others_are_shown_and_never_run(seen: Page, tmp_path: Path) -> None:
    slide_id = "<img src=x onerror=alert(1)>"
    page = report(make_run(tmp_path / "run", fold_names=(HOSTILE, "s2"), slide_id=slide_id, head=HOSTILE))
    opened(seen, page)
    names = seen.locator("#genes tbody tr td:first-child").all_inner_texts()
    assert names == sorted(GENES, key=str.lower), "this head has no PCC to sort by: by name"
    seen.click(f"#genes tbody tr >> nth={names.index(HOSTILE)}")
    assert seen.inner_text("#chosen") == f"{HOSTILE} on slide {slide_id}"
    assert HOSTILE in seen.inner_text("#heads")
    assert seen.locator("img").count() == 0
    assert seen.locator("script").count() == 2


def test_what_is_seen_can_be_kept(seen: Page, prediction_page: Path) -> None:
    opened(seen, prediction_page, "#gene=ACTB")
    with seen.expect_download() as kept:
        seen.click("#csv")
    assert kept.value.suggested_filename == "ACTB_new.csv"
    rows = list(csv.DictReader(io.StringIO(Path(kept.value.path()).read_text("utf-8"))))
    assert [row["barcode"] for row in rows] == [f"b{i}" for i in range(SIDE**2)]
    predicted = values(3)[0][:, 0]
    assert [float(row["predicted"]) for row in rows] == pytest.approx(predicted.tolist(), abs=0.01)
    assert float(rows[0]["high"]) - float(rows[0]["low"]) == pytest.approx(0.5, abs=1e-4)
    assert [row["unlike"] for row in rows].count("true") == 2
    off = np.abs(np.array([float(row["predicted"]) for row in rows]) - predicted).max()
    assert 0 < off <= float(rows[0]["rounded_to"]) < 0.02, "how exact a page's values are is said in each row"
    with seen.expect_download() as kept:
        seen.click("#png")
    assert Path(kept.value.path()).read_bytes().startswith(b"\x89PNG")


def test_all_slides_of_a_gene_are_small_maps_that_lead_to_the_slide(seen: Page, run_page: Path) -> None:
    opened(seen, run_page)
    until(seen, "document.getElementById('multiples').children.length === 2")
    first, second = seen.locator("#multiples button").all()
    assert first.get_attribute("aria-current") == "true"
    assert "s2" in second.inner_text()
    second.click()
    assert seen.inner_text("#chosen") == "ACTB on slide s2"


def test_figures_of_slides_that_were_trained_on_say_so(seen: Page, tmp_path: Path) -> None:
    for number, said in enumerate(({"in_sample": "trained on this slide"}, {})):
        predicted, target = values(number)
        file, about = tmp_path / f"s{number}.h5ad", {"recipe": "nh2st", "out_of_fold": False, **said}
        write_prediction(file, slide_data(f"s{number}"), GENES, Prediction(predicted), target, None, about)
    opened(seen, report(tmp_path), "#gene=ACTB&slide=s0")
    until(seen, "at('multiples').textContent.includes('s1: PCC')")
    first, second = seen.locator("#multiples button").all_inner_texts()
    assert "(in-sample)" in first
    assert "(in-sample)" not in second
    for place in ("#note", "#scatter-title"):
        assert "(in-sample)" in seen.inner_text(place)
    seen.keyboard.press("]")
    for place in ("#note", "#scatter-title"):
        assert "in-sample" not in seen.inner_text(place)


def test_a_browser_that_cannot_unpack_says_so(browser: Browser, run_page: Path) -> None:
    page = browser.new_page()
    page.add_init_script("delete window.DecompressionStream")
    page.goto(run_page.as_uri())
    until(page, "document.getElementById('note').textContent !== ''")
    assert "it needs DecompressionStream" in page.inner_text("#note")
    with pytest.raises(Error):
        page.evaluate("new DecompressionStream('deflate')")
    page.close()


def sized(folder: Path, *, narrow: bool = False, measured: bool = True) -> Path:
    """Write a report of a slide of 0.5 µm a px; with `narrow` predictions hardly vary."""
    predicted, target = values(4)
    slide = slide_data("sized")
    slide.uns["image"] = {"path": "a.svs", "width": 240, "height": 240, "mpp": 0.5, "tile_level0_px": 40.0}
    if narrow:
        predicted = 1 + 0.05 * predicted
    write_prediction(
        folder / "sized.h5ad",
        slide,
        GENES,
        Prediction(predicted),
        target if measured else None,
        None,
        {"recipe": "nh2st", "out_of_fold": False, "interval_level": 0.9, "intervals": "…", "unit": "log1p(counts)"},
        {"cv_pcc": {"ACTB": 0.31, "KRT19": 0.64, HOSTILE: -0.08}},
        half_width=dict.fromkeys(GENES, 0.4),
    )
    return report(folder)


WORDS = """() => { window.said = []; window.bars = [];
    const text = CanvasRenderingContext2D.prototype.fillText;
    CanvasRenderingContext2D.prototype.fillText = function (words, ...rest) {
        window.said.push(words);
        text.call(this, words, ...rest);
    };
    const kept = scaleBar;
    scaleBar = (pen, width, height, um) => { window.bars.push([width, um]); kept(pen, width, height, um); };
}"""


def test_every_map_has_a_bar_of_a_round_length_and_so_has_the_picture(seen: Page, tmp_path: Path) -> None:
    opened(seen, sized(tmp_path))
    seen.evaluate(WORDS)
    seen.evaluate("drawMaps()")
    words, bars = seen.evaluate("window.said"), seen.evaluate("window.bars")
    assert len(bars) == 3
    slide = seen.evaluate("({ um: current.slide.um_per_px, ...placed(current.slide, 400, 400, state.view) })")
    assert words == [words[0]] * 3
    length = float(words[0].removesuffix(" µm"))
    assert length in {k * 10**p for k in (1, 2, 5) for p in range(4)}
    for width, um in bars:  # µm of a px of the canvas: that of the picture, by how large it is drawn
        assert um == pytest.approx(slide["um"] / (slide["scale"] * width / 400), rel=0.2)
        assert 0.05 * width < length / um <= 0.36 * width
    # Spots are 40 level-0 px apart, 20 µm: so they are on the map.
    apart = seen.evaluate(
        "Math.abs(current.slide.x[1] - current.slide.x[0]) + Math.abs(current.slide.y[1] - current.slide.y[0])"
    )
    assert apart * slide["um"] == pytest.approx(20, rel=0.02)
    seen.evaluate("window.said = []")
    with seen.expect_download():
        seen.click("#png")
    said = " ".join(seen.evaluate("window.said"))
    assert "Unit: log1p(counts). Colours: one scale for measured and predicted" in said
    assert said.count(" µm") == 3
    seen.select_option("#scale", "own")
    until(seen, "state.scale === 'own'")
    seen.evaluate("window.said = []")
    with seen.expect_download():
        seen.click("#png")
    assert "each map on a scale of its own" in " ".join(seen.evaluate("window.said"))


def test_without_a_resolution_there_is_no_bar(seen: Page, run_page: Path) -> None:
    opened(seen, run_page)
    seen.evaluate(WORDS)
    seen.evaluate("drawMaps()")
    assert not [words for words in seen.evaluate("window.said") if "µm" in words or " mm" in words]


@pytest.mark.parametrize("measured", [True, False], ids=["beside what was measured", "beside its interval"])
def test_colours_of_next_to_no_difference_are_said_to_be(seen: Page, tmp_path: Path, measured: bool) -> None:
    for name in ("narrow", "wide"):
        (tmp_path / name).mkdir()
    opened(seen, sized(tmp_path / "narrow", narrow=True, measured=measured))
    words = seen.inner_text("#narrow")
    assert ("of what was measured" if measured else "less than the interval around each") in words
    opened(seen, sized(tmp_path / "wide", measured=measured))
    assert seen.evaluate("at('narrow').hidden")  # they span more than half of what was measured, and the interval


def test_on_a_narrow_screen_one_map_is_seen_at_a_time(seen: Page, run_page: Path) -> None:
    opened(seen, run_page)
    assert seen.locator(".map:visible").count() == 3
    assert seen.locator("#tabs:visible").count() == 0
    seen.set_viewport_size({"width": 390, "height": 844})
    until(seen, "document.querySelectorAll('.maps figure.behind').length === 2")
    assert seen.locator(".map:visible").count() == 1
    seen.click("#tabs button >> nth=0")
    assert seen.locator(".map:visible canvas").get_attribute("data-map") == "target"
    opaque(seen)
    assert colour(seen, "target", 2) == pytest.approx(expected(seen, "target", 2), abs=2)


def test_all_genes_are_seen_at_once(seen: Page, tmp_path: Path) -> None:
    opened(seen, sized(tmp_path))
    assert seen.inner_text("#distribution-title") == "3 genes by PCC: median 0.31, 2 above 0"
    assert seen.locator("#distribution rect").count() == 3
    title = seen.inner_text("#moran-title")
    assert title.startswith("Moran's I of measured and predicted maps: ")
    assert title.endswith("of 2 genes are smoother as predicted")  # the third was not measured
    assert seen.locator("#moran circle").count() == 2
    assert "Moran's I" in seen.inner_text("#note")
    seen.click("#glossary summary")
    assert "how much of a map is structure" in seen.inner_text("#glossary")


def test_regions_are_drawn_and_their_means_told(seen: Page, tmp_path: Path) -> None:
    from tests.exporting.made import genes_of, prediction
    from tests.reporting.test_regions import LEFT, NAMED, write

    (tmp_path / "p").mkdir()
    trusted = {"G0": True, "G1": False}
    predicted = prediction(tmp_path / "p/s1.h5ad", origin=(60, 30), genes=genes_of(2), trusted=trusted)
    opened(seen, report(tmp_path / "p", regions=write(tmp_path / "s1.geojson", LEFT, NAMED)), "#gene=G0")
    rows = [row.split("\t") for row in seen.inner_text("#regions-table").splitlines() if "\t" in row]
    assert rows[0] == ["Region", "spots", "measured", "predicted", "its middle half", "difference"]
    assert [row[0].strip() for row in rows[1:]] == ["Tumor", "Field 1"]
    assert float(rows[1][3]) == pytest.approx(predicted[[0, 4, 8, 12], 0].mean(), abs=0.006)
    assert rows[1][5] == "−1"
    assert "how far means of regions are off is not known" in seen.inner_text("#regions-words")
    edge = seen.evaluate(
        """() => {
            const { canvas } = panels.find((panel) => panel.key === "predicted");
            const box = canvas.getBoundingClientRect();
            const { scale, ox, oy } = placed(current.slide, box.width, box.height, state.view);
            const [[x0, y0], [x1, y1]] = current.slide.regions[1].rings[0];
            const dense = canvas.width / box.width;
            const at = [ox + (x0 + x1) / 2 * scale, oy + (y0 + y1) / 2 * scale].map((v) => Math.round(v * dense));
            return [...canvas.getContext("2d").getImageData(...at, 1, 1).data].slice(0, 3);
        }"""
    )
    assert edge == pytest.approx([0xD5, 0x5E, 0x00], abs=60)  # the second of the colours, in the middle of an edge
    seen.evaluate("choose(D.genes.names.indexOf('G1'))")
    until(seen, "current.name === 'G1'")
    assert "covered" in seen.inner_text("#regions-table")


def test_the_tissue_under_a_spot_is_shown(seen: Page, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from PIL import Image

    from nh2st_pipe.reporting import crops
    from tests.exporting.made import prediction

    monkeypatch.setattr(crops, "_BYTES", 4 * 45_000)
    (tmp_path / "p").mkdir()
    prediction(tmp_path / "p/s1.h5ad")
    Image.new("RGB", (350, 370), (200, 100, 150)).save(tmp_path / "s1.png")
    (tmp_path / "manifest.csv").write_text("slide_id,slide\ns1,s1.png\n")
    opened(seen, report(tmp_path / "p", slides=tmp_path / "manifest.csv"))
    rows = seen.evaluate("current.slide.crop_rows")
    assert len(rows) == 4
    seen.evaluate(f"point({rows[2]}, null)")
    assert seen.inner_text("#crop-title") == f"H&E of three by three tiles at AA-{rows[2]}"
    assert seen.evaluate("at('crop').naturalWidth") == 672
    other = next(row for row in range(16) if row not in rows)
    seen.evaluate(f"point({other}, null)")
    assert "µm from it: the page keeps some of them" in seen.inner_text("#crop-title")
    assert int(seen.inner_text("#crop-title").split(", ")[1].split(" ")[0]) in {
        25,
        35,
        50,
        56,
        71,
    }  # 50 px of 0.5 µm apart


def test_domains_are_drawn_beside_each_other_with_how_they_match(seen: Page, tmp_path: Path) -> None:
    from tests.exporting.made import genes_of, prediction

    (tmp_path / "p").mkdir()
    prediction(tmp_path / "p/s1.h5ad", side=8, genes=genes_of(3))
    opened(seen, report(tmp_path / "p", domains=3))
    assert seen.locator("#domains canvas").count() == 2
    assert seen.inner_text("#domains-words").startswith("Adjusted Rand index with what was measured: predicted 1.00 (")
    middle = seen.evaluate(
        """() => {
            const canvas = document.querySelector("[data-domains=predicted]");
            const box = canvas.getBoundingClientRect();
            const { scale, ox, oy } = placed(current.slide, box.width, box.height, { k: 1, x: 0.5, y: 0.5 });
            const dense = canvas.width / box.width;
            const { x, y } = current.slide;
            const at = [ox + x[9] * scale, oy + y[9] * scale].map((v) => Math.round(v * dense));
            const hex = HUES[current.slide.domains.predicted.labels[9]];
            return [[...canvas.getContext("2d").getImageData(...at, 1, 1).data].slice(0, 3),
                [1, 3, 5].map((k) => parseInt(hex.slice(k, k + 2), 16))];
        }"""
    )
    assert middle[0] == middle[1]
    shapes = seen.evaluate("[...document.querySelectorAll('#domains canvas')].map((c) => c.width / c.clientWidth)")
    assert shapes == [1.0, 1.0], "drawn as wide as it is shown"
