from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nh2st_pipe.core.errors import ManifestError
from nh2st_pipe.tiles.manifest import SlideRow, read_manifest, write_manifest


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
    path = write(tmp_path, "slide_id,slide,mpp,expression\nA,a.png,zero,\nA,nope.png,-1,\n../x,b.png,,gone.h5ad\n,,,\n")
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
        ("slide_id,slide\nA,a.png,1,2,3\n", "not a readable CSV"),
    ],
)
def test_a_table_that_is_no_manifest_says_so(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ManifestError, match=message.replace("?", r"\?")):
        read_manifest(write(tmp_path, text))


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
