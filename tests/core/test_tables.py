from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nh2st_pipe.core.errors import ManifestError, NH2STError, SlideError, fault_of
from nh2st_pipe.core.tables import read_table, read_text


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"a,a\n1,2\n", "has the column 'a' twice or more"),
        (b"a,b\n1\n2,3\n4,5,6\n", r"row 2 has 1 cells, and the header has 2, row 4 has 3 cells"),
        (b"a;b\n1;2\n", "separated by semicolons, and commas are expected"),
        (b"a\tb\n1\t2\n", "separated by tabs"),
        (b'a,b\n"1,2\n', "is a quotation mark not closed"),
        (b"a,b\n\xff\xfe\x00,2\n", "not UTF-8 text .at byte 4"),
    ],
)
def test_what_is_no_table_says_why(tmp_path: Path, data: bytes, message: str) -> None:
    path = tmp_path / "t.csv"
    path.write_bytes(data)
    with pytest.raises(ManifestError, match=message):
        read_table(path, ManifestError)


def test_rows_are_numbered_as_a_spreadsheet_shows_them(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text('a,b\n\n"x, y",2\n,\n 3 ,4,,\n')
    assert read_table(path, ManifestError).rows == [(3, {"a": "x, y", "b": "2"}), (5, {"a": "3", "b": "4"})]
    path.write_text("")
    assert read_table(path, ManifestError).columns == []
    with pytest.raises(ManifestError, match="cannot be read: No such file"):
        read_text(tmp_path / "none", ManifestError)


@given(data=st.binary(max_size=60))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=200)
def test_whatever_a_file_holds_it_is_a_table_or_a_fault_of_that_file(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "t.csv"
    path.write_bytes(data)
    said = ""
    try:
        read_table(path, ManifestError)
    except ManifestError as error:
        said = str(error)
    assert not said or str(path) in said


@pytest.mark.parametrize(
    "cause", [ValueError("no"), KeyError("x"), RecursionError("deep"), OSError(5, "disk"), TypeError()]
)
def test_whatever_a_parser_meets_is_a_fault_of_its_file(cause: Exception) -> None:
    with pytest.raises(SlideError, match=r"the mask m\.png: .+") as error, fault_of(SlideError, "the mask m.png"):
        raise cause
    assert error.value.__cause__ is cause
    own = ManifestError("said already")
    with pytest.raises(NH2STError) as kept, fault_of(SlideError, "x"):
        raise own
    assert kept.value is own
