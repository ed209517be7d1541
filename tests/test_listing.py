"""What a folder, a glob or a name is taken for."""

import os
import shutil

import pytest

from features import listing
from features.finder import ImageFinder
from features.listing import as_line, as_text, find_images, list_folder


@pytest.fixture
def folder(photos, tmp_path):
    """A folder with pictures under all sorts of names, and other things."""
    picture = sorted(photos.glob("*.jpg"))[0]
    for name in ("a.jpg", "b.jfif", "c.jpe", "d.jpg_large", "noextension", "wrong.txt", ".hidden.jpg"):
        shutil.copy(picture, tmp_path / name)
    (tmp_path / "._a.jpg").write_bytes(b"\0\5\16\7\0\2\0\0Mac OS X" + bytes(90))
    (tmp_path / "e.heic").write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic")
    (tmp_path / "notes.txt").write_text("some notes\n")
    (tmp_path / "Thumbs.db").write_bytes(b"\xd0\xcf\x11\xe0")
    os.mkfifo(tmp_path / "pipe")
    os.mkfifo(tmp_path / "pipe.jpg")
    os.symlink("loop.jpg", tmp_path / "loop.jpg")
    os.symlink("nowhere", tmp_path / "dangling.jpg")
    (tmp_path / "below.jpg").mkdir()
    shutil.copy(picture, tmp_path / "below.jpg" / "f.jpg")
    return tmp_path


PICTURES = "a.jpg b.jfif c.jpe d.jpg_large dangling.jpg e.heic loop.jpg noextension pipe.jpg wrong.txt".split()


def test_pictures_whatever_they_are_called(folder):
    """By ending or by content; bad names are kept, to be named; hidden ones do not count."""
    found = list_folder(folder)
    assert [path.name for path in found.images] == PICTURES
    assert found.others == ["Thumbs.db", "notes.txt", "pipe"] and found.folders == 1


def test_what_is_left_out_is_counted(folder, capsys):
    assert [path.name for path in find_images([str(folder)])] == PICTURES
    assert capsys.readouterr().err == (
        f"left out of folder {folder}: 3 files of other kinds (Thumbs.db, notes.txt, pipe) and 1 folder; "
        f'for what the folders hold, quote a glob: "{folder}/**/*.jpg"\n'
    )


def test_globs(folder, capsys):
    """Folders that match are no pictures, and what is no picture is counted."""
    assert [path.name for path in find_images([f"{folder}/**/*.jpg"])] == [
        "a.jpg", "f.jpg", "dangling.jpg", "loop.jpg", "pipe.jpg",
    ]  # fmt: skip
    assert capsys.readouterr().err == ""
    assert [path.name for path in find_images([f"{folder}/*"])] == PICTURES
    assert "3 files of other kinds" in capsys.readouterr().err
    with pytest.raises(ValueError, match="holds no images, but 1 file of other kinds \\(notes.txt\\)"):
        find_images([f"{folder}/notes.t*"])
    with pytest.raises(FileNotFoundError, match="none"):
        find_images([f"{folder}/none*"])


def test_what_is_no_folder(folder):
    with pytest.raises(FileNotFoundError, match="'' is no image file"):
        find_images([""])
    with pytest.raises(ValueError, match="is a file; pass its folder"):
        list_folder(folder / PICTURES[0])


def test_a_folder_of_folders(tmp_path):
    (tmp_path / "00000").mkdir()
    with pytest.raises(ValueError, match=r'holds no images, but 1 folder; .* quote a glob: ".*/\*\*/\*.jpg"'):
        find_images([str(tmp_path)])


def test_known_endings_are_not_opened(folder, monkeypatch):
    monkeypatch.setattr(listing, "_holds_picture", lambda entry: False)
    assert [path.name for path in list_folder(folder).images] == [n for n in PICTURES if "." in n and n not in (
        "d.jpg_large", "wrong.txt",
    )]  # fmt: skip


def test_the_finder_lists_the_same(folder):
    finder = ImageFinder([folder])
    assert finder.find({"image_id": "noextension"}) == folder / "noextension"
    assert finder.find({"image_id": "._a"}) is None


def test_names_that_are_no_text():
    """Bytes that are not UTF-8 are escaped; what would break a line is too, on a line."""
    name = os.fsdecode(b"caf\xe9\tau\nlait.jpg")
    assert as_text(name) == "caf\\xe9\tau\nlait.jpg" and as_line(name) == "caf\\xe9\\tau\\nlait.jpg"
    assert as_line("café.jpg") == "café.jpg"
