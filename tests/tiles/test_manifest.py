from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nh2st_pipe.core.errors import ManifestError
from nh2st_pipe.tiles.manifest import SlideRow, manifest_lines, read_manifest, write_manifest


def write(folder: Path, text: str) -> Path:
    (folder / "a.png").touch()
    (folder / "b.png").touch()
    path = folder / "manifest.csv"
    path.write_text(text)
    return path


def test_rows_are_read_with_defaults_and_extra_columns(tmp_path: Path) -> None:
    path = write(tmp_path, "slide_id,slide,mpp,stage\nA,a.png,0.5,T1\n B ,b.png,,\n")
    a, b = read_manifest(path)
    assert (a.slide_id, a.patient, a.mpp, a.extra) == ("A", "A", 0.5, {"stage": "T1"})
    assert a.slide == (tmp_path / "a.png").resolve()
    assert (b.slide_id, b.mpp, b.expression) == ("B", None, None)


def test_every_fault_is_named_with_row_and_column_at_once(tmp_path: Path) -> None:
    path = write(
        tmp_path, "slide_id,slide,mpp,expression\nA,a.png,zero,\nA,nope.png,-1,\n../x,b.png,,gone.h5ad\n,,0.5,\n"
    )
    with pytest.raises(ManifestError) as error:
        read_manifest(path)
    text = str(error.value)
    for part in (
        "row 2, column mpp: 'zero'",
        "row 3, column slide: there is no file at",
        "row 3, column mpp: '-1'",
        "row 3, column slide_id: 'A' is already in row 2",
        "row 4, column slide_id: '../x'",
        "row 4, column expression: there is no file",
        "row 5, column slide_id: is empty",
        "row 5, column slide: is empty",
        "nothing was started",
    ):
        assert part in text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty"),
        ("slide_id,slide\n", "no rows"),
        ("slideid,slide\nA,a.png\n", "lacks the column 'slide_id'; did you mean 'slideid'?"),
        ("slide_id,slide\nA,a.png,1,2,3\n", "row 2 has 5 cells, and the header has 2"),
        ("slide_id;slide\nA;a.png\n", "separated by semicolons, and commas are expected"),
    ],
)
def test_a_table_that_is_no_manifest_says_so(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ManifestError, match=message.replace("?", r"\?")):
        read_manifest(write(tmp_path, text))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("zarr.json,a.png,", "row 2, column slide_id: 'zarr.json' names a folder of the store, and is taken"),
        (f"{'a' * 300},a.png,", "has 300 letters, more than 100"),
        ("A,a.png,250", "mpp: 250 is not µm per px of a slide (0.05 to 10 are plausible; in nm it would be 0.25 µm)"),
        ("A,a.png,20", "a magnification of 20× is about 0.5 µm per px"),
        ("A,a.png,0.01", "mpp: 0.01 is not µm per px of a slide"),
    ],
)
def test_what_no_slide_can_be_is_named(tmp_path: Path, row: str, message: str) -> None:
    with pytest.raises(ManifestError) as error:
        read_manifest(write(tmp_path, f"slide_id,slide,mpp\n{row}\n"))
    assert message in str(error.value)


def test_a_manifest_is_read_as_spreadsheets_save_it(tmp_path: Path) -> None:
    text = "slide_id,slide,mpp,\r\n\r\nA,a.png,0.5,\r\n,,,\r\nB,b.png,,\r\n\r\n"
    for encoding in ("utf-8", "utf-8-sig", "utf-16"):
        path = write(tmp_path, "")
        path.write_bytes(text.encode(encoding))
        assert [(row.slide_id, row.mpp) for row in read_manifest(path)] == [("A", 0.5), ("B", None)]
    write(tmp_path, "").rename(tmp_path / "ma.csv")
    named = tmp_path / "m[ab].csv"
    named.write_text("slide_id,slide\nZ,a.png\n")
    (tmp_path / "ma.csv").write_text("slide_id,slide\nY,a.png\n")
    assert read_manifest(named)[0].slide_id == "Z"  # no character of a file's name is a pattern


def test_a_manifest_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match="there is no manifest at"):
        read_manifest(tmp_path / "none.csv")
    with pytest.raises(ManifestError, match="is a folder"):
        read_manifest(tmp_path)


names = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,8}", fullmatch=True)
texts = st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Cs", "Z"]), max_size=8)


@given(
    ids=st.lists(names, min_size=1, max_size=5, unique=True),
    patient=texts,
    extra=texts,
    mpp=st.none() | st.floats(0.1, 9),
)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=40)
def test_what_is_written_is_read_back(
    tmp_path: Path, ids: list[str], patient: str, extra: str, mpp: float | None
) -> None:
    (tmp_path / "a.png").touch()
    rows = [
        SlideRow(
            i, tmp_path / "a.png", None, patient or i, None if mpp is None else round(mpp, 3), None, {"note": extra}
        )
        for i in ids
    ]
    write_manifest(rows, tmp_path / "m.csv")
    assert read_manifest(tmp_path / "m.csv") == [
        SlideRow(r.slide_id, r.slide.resolve(), None, r.patient, r.mpp, None, r.extra) for r in rows
    ]


def test_a_cell_with_the_end_of_a_line_in_it_is_one_cell(tmp_path: Path) -> None:
    """As spreadsheets write a note of two lines."""
    for name in ("a.png", "b.png"):
        (tmp_path / name).write_bytes(b"x")
    path = write(tmp_path, 'slide_id,slide,patient,note\na,a.png,P1,"first\nsecond, and more"\nb,b.png,P2,\n')
    rows = read_manifest(path)
    assert [row.extra["note"] for row in rows] == ["first\nsecond, and more", ""]
    assert len(manifest_lines(rows, tmp_path)) == 1 + len(rows)
    write_manifest(rows, tmp_path / "again.csv")
    assert read_manifest(tmp_path / "again.csv") == rows
