from __future__ import annotations

import itertools
import subprocess
import sys
from pathlib import Path

import anndata
import h5py
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from anndata.io import write_elem

from nh2st_pipe.core.errors import ExpressionError, WriteError, written_to
from nh2st_pipe.core.h5ad import new_h5ad, read_h5ad, require_h5, write_h5ad, write_matrix


def data() -> anndata.AnnData:
    obs = pd.DataFrame({"kind": ["a", "b", "a"]}, index=["x", "y", "z"])
    found = anndata.AnnData(sp.csr_matrix(np.eye(3, dtype=np.float32)), obs=obs, layers={"more": np.ones((3, 3))})
    found.obsm["spatial"] = np.arange(6.0).reshape(3, 2)
    found.uns["said"] = {"of": "it", "n": 3}
    return found


def test_a_file_is_what_anndata_itself_writes(tmp_path: Path) -> None:
    ours, theirs = tmp_path / "a" / "ours.h5ad", tmp_path / "theirs.h5ad"
    write_h5ad(data(), ours)
    data().write_h5ad(theirs, compression="gzip")
    one, two = read_h5ad(ours), anndata.read_h5ad(theirs)
    assert one.obs.equals(two.obs)
    assert str(one.obs["kind"].dtype) == str(two.obs["kind"].dtype) == "category"
    assert (one.X != two.X).nnz == 0
    assert np.array_equal(one.layers["more"], two.layers["more"])
    assert np.array_equal(one.obsm["spatial"], two.obsm["spatial"])
    assert one.uns == two.uns
    assert [path.name for path in ours.parent.iterdir()] == ["ours.h5ad"]


FULL = """
import resource, sys
import numpy as np, anndata
from pathlib import Path
from nh2st_pipe.core.errors import WriteError
from nh2st_pipe.core.h5ad import write_h5ad
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))
try:
    write_h5ad(anndata.AnnData(np.random.default_rng(0).random((200, 200))), Path(sys.argv[1]))
except WriteError as error:
    print(error)
"""


def test_a_disk_that_takes_no_more_is_one_line_that_names_the_file(tmp_path: Path) -> None:
    """And nothing of it is left, nor said by HDF5 when the process ends."""
    path = tmp_path / "a.h5ad"
    done = subprocess.run([sys.executable, "-c", FULL, str(path)], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == (f"{path} cannot be written: File too large\n", "")
    assert list(tmp_path.iterdir()) == []


LARGE = """
import resource, sys
import numpy as np
from pathlib import Path
from nh2st_pipe.core.errors import WriteError
from nh2st_pipe.core.h5ad import new_h5ad, write_matrix
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), resource.RLIM_INFINITY))
values = np.random.default_rng(0).random((3000, 100), np.float32)
try:
    with new_h5ad(Path(sys.argv[1]), large=True) as file:
        write_matrix(file, "X", values.shape, np.float32, [values[:, :70], values[:, 70:]])
except WriteError as error:
    print(error)
"""


@pytest.mark.parametrize("most", [1000, 200_000, 900_000])
def test_a_disk_that_fills_while_a_large_file_is_written_is_one_line_too(tmp_path: Path, most: int) -> None:
    path = tmp_path / "a.h5ad"
    call = [sys.executable, "-c", LARGE, str(path), str(most)]
    done = subprocess.run(call, capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == (f"{path} cannot be written: File too large\n", "")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("shape", [(5, 7), (2048, 64), (3000, 150), (0, 4), (4, 0)])
@pytest.mark.parametrize("kind", [np.float32, np.float16])
@pytest.mark.parametrize("large", [False, True])
def test_a_matrix_in_blocks_is_read_as_any(
    tmp_path: Path, shape: tuple[int, int], kind: type[np.floating], large: bool
) -> None:
    values = np.random.default_rng(0).standard_normal(shape).astype(kind)
    cuts = [0, *(cut for cut in (3, 66, 67) if cut < shape[1]), shape[1]]
    with new_h5ad(tmp_path / "a.h5ad", large=large) as file:
        names = [np.array([f"{i}" for i in range(n)], object) for n in shape]
        bare = anndata.AnnData(obs=pd.DataFrame(index=names[0]), var=pd.DataFrame(index=names[1]))
        anndata.io.write_elem(file, "/", bare)
        blocks = [values[:, a:b] for a, b in itertools.pairwise(cuts)]
        write_matrix(file, "X", shape, kind, blocks)
        write_matrix(file.require_group("layers"), "more", shape, kind, [values])
    found = anndata.read_h5ad(tmp_path / "a.h5ad")
    assert found.X.dtype == kind
    assert np.array_equal(found.X, values)
    assert np.array_equal(found.layers["more"], values)


def test_an_error_that_is_none_of_the_disks_stays_as_it_is() -> None:
    with pytest.raises(OSError, match="odd") as kept, written_to("x"):
        raise OSError("odd")
    assert type(kept.value) is OSError
    with pytest.raises(WriteError, match=r"^x cannot be written: Read-only file system$") as error, written_to("x"):
        raise OSError(30, "Read-only file system", "elsewhere")
    assert error.value.errno == 30
    with pytest.raises(WriteError, match=r"^x cannot"), written_to("y"), written_to("x"):
        raise OSError(30, "Read-only file system")


@pytest.mark.parametrize(("number", "length"), [(0, 0), (0, 3), (0, 2**40), (1, 2**40)])
def test_a_heap_of_texts_that_does_not_come_to_its_end_is_no_endless_loop(
    tmp_path: Path, number: int, length: int
) -> None:
    """HDF5 goes from text to text by their lengths, and for ever where one takes no bytes."""
    path = tmp_path / "a.h5ad"
    write_h5ad(data(), path)
    require_h5(path)
    content = bytearray(path.read_bytes())
    heap = content.index(b"GCOL\x01\0\0\0")
    size = int.from_bytes(content[heap + 8 : heap + 16], "little")
    at, last = heap + 16, heap + 16
    while int.from_bytes(content[at : at + 2], "little"):
        last = at
        at += 16 + -(-int.from_bytes(content[at + 8 : at + 16], "little") // 8) * 8
        if at + 16 > heap + size:
            break
    place = at if number == 0 else last
    content[place : place + 2] = number.to_bytes(2, "little")
    content[place + 8 : place + 16] = length.to_bytes(8, "little")
    path.write_bytes(content)
    with pytest.raises(ExpressionError, match=r"a text in a heap of them, at byte [0-9,]+, takes"):
        require_h5(path)


@pytest.mark.parametrize("name", ["told", "told in µm"])
@pytest.mark.parametrize("where", ["/", "/layers", "/obs/kind", "/uns/said/of"])
def test_a_text_attribute_that_declares_more_than_the_file_takes_no_memory(
    tmp_path: Path, name: str, where: str
) -> None:
    path = tmp_path / "a.h5ad"
    with h5py.File(path, "w") as file:
        write_elem(file, "/", data())
        file[where].attrs[name] = "some text"
    require_h5(path)
    content = bytearray(path.read_bytes())
    at = content.index(len(b"some text").to_bytes(4, "little"), content.index(name.encode() + b"\0"))
    content[at : at + 4] = (4_000_000_000).to_bytes(4, "little")
    path.write_bytes(content)
    with pytest.raises(ExpressionError, match=f"a text in its attribute {name} declares 4,000,000,000 bytes"):
        require_h5(path)


def _with_texts(path: Path) -> bytearray:
    """A file with a list of texts, and a text in an attribute."""
    with h5py.File(path, "w") as file:
        file["names"] = np.array([f"name {i} of them" for i in range(5)], dtype=h5py.string_dtype())
        file["names"].attrs["told"] = "some text of its own"
    return bytearray(path.read_bytes())


@pytest.mark.parametrize("what", ["length", "heap", "number"])
@pytest.mark.parametrize("of", ["names", "told"])
def test_a_text_that_is_not_where_it_should_be_is_refused(tmp_path: Path, of: str, what: str) -> None:
    """A few bytes too many, another heap, a number that is not in it: HDF5 reads memory that is not its own."""
    path = tmp_path / "a.h5"
    content = _with_texts(path)
    require_h5(path)
    length = len("name 0 of them" if of == "names" else "some text of its own")
    heap = content.index(b"GCOL")
    reference = length.to_bytes(4, "little") + heap.to_bytes(8, "little")
    at = content.index(reference)
    if what == "length":
        content[at : at + 4] = (length + 40).to_bytes(4, "little")
    elif what == "heap":
        content[at + 4 : at + 12] = (heap + 8).to_bytes(8, "little")
    else:
        content[at + 12 : at + 16] = (4321).to_bytes(4, "little")
    path.write_bytes(content)
    name = "names" if of == "names" else "its attribute told"
    with pytest.raises(ExpressionError, match=f"1 texts in {name} are not where they should be"):
        require_h5(path)


def test_a_file_with_a_block_of_somebodys_own_and_references_to_objects_are_read(tmp_path: Path) -> None:
    path = tmp_path / "a.h5"
    with h5py.File(path, "w", userblock_size=512) as file:
        file["names"] = np.array(["a", "", "long enough"], dtype=h5py.string_dtype())
        file["to"] = np.array([file["names"].ref] * 3, dtype=h5py.ref_dtype)
    require_h5(path)
    with h5py.File(tmp_path / "b.h5", "w") as file:
        file["names"] = np.array(["a", "", "long enough"], dtype=h5py.string_dtype())
        file["to"] = np.array([file["names"].ref] * 3, dtype=h5py.ref_dtype)
        lists = file.create_dataset("lists", (2,), dtype=h5py.vlen_dtype(np.int64))
        lists[0], lists[1] = np.arange(3), np.arange(5)
    require_h5(tmp_path / "b.h5")


@pytest.mark.parametrize("of", ["names", "told"])
def test_values_of_a_kind_that_there_is_not_are_refused(tmp_path: Path, of: str) -> None:
    path = tmp_path / "a.h5"
    content = _with_texts(path)
    kind = b"\x19\x01\x01\x00\x10\x00\x00\x00"  # of any length, a text, in UTF-8, sixteen bytes a reference
    at = [place for place in range(len(content)) if content[place : place + 8] == kind]
    assert len(at) == 2
    content[at[of == "told"] + 1] = 9
    path.write_bytes(content)
    name = "names" if of == "names" else "its attribute told"
    with pytest.raises(ExpressionError, match=f"{name} is of a kind that there is not"):
        require_h5(path)


def test_what_is_left_of_a_heap_that_was_given_up_is_no_damage(tmp_path: Path) -> None:
    """A file that was written into once more: nothing leads to it."""
    path = tmp_path / "a.h5"
    whole = bytes(_with_texts(path))
    for left in (b"GCOL\x01\0\0\0" + (4096).to_bytes(8, "little") + b"\0" * 4080, b"GCOL\x01\0\0\0" + b"\xff" * 8):
        path.write_bytes(whole + left)
        require_h5(path)
