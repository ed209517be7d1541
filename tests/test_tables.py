"""Annotation files of every format: told by content, one fault per bad row, the right line and a remedy."""

import bz2
import gzip
import json
import lzma

import pytest
from conftest import run_script
from test_check import check, folder  # noqa: F401  fixtures

from features.annotations import distinct_ids, image_id_of, normal_id, read_annotations, read_places
from features.references import read_captions, read_references


def write(where, name, data):
    (where / name).write_bytes(data if isinstance(data, bytes) else data.encode())
    return where / name


def captions(path):
    return [(record.get("file_name", record["image_id"]), record["caption"]) for record in read_annotations(path)]


DOG, CAT = ("a.jpg", "A dog."), ("b.jpg", "A cat, asleep.")
READ = {
    "comma.tsv": 'image,caption\na.jpg,A dog.\nb.jpg,"A cat, asleep."\n',
    "tab.csv": "image\tcaption\na.jpg\tA dog.\nb.jpg\tA cat, asleep.\n",
    "comma.txt": 'image,caption\na.jpg,A dog.\nb.jpg,"A cat, asleep."\n',
    "tab.txt": "image\tcaption\r\na.jpg\tA dog.\r\nb.jpg\tA cat, asleep.\r\n",
    "excel.csv": 'sep=,\nimage,caption\na.jpg,A dog.\nb.jpg,"A cat, asleep."\n',
    "blanks.csv": 'image, caption\na.jpg, A dog.\nb.jpg, "A cat, asleep."\n',
    "capitals.csv": 'ID,Image,Caption\n1,a.jpg,A dog.\n2,b.jpg,"A cat, asleep."\n',
    "mac.csv": 'image,caption\ra.jpg,A dog.\rb.jpg,"A cat, asleep."\r',
    "empty_lines.csv": '\n\nimage,caption\n\na.jpg,A dog.\n\nb.jpg,"A cat, asleep."\n\n',
    "mark.csv": '\ufeffimage,caption\na.jpg,A dog.\nb.jpg,"A cat, asleep."\n',
    "utf16.csv": 'image,caption\na.jpg,A dog.\nb.jpg,"A cat, asleep."\n'.encode("utf-16"),
    "zipped.csv.gz": gzip.compress(b'image,caption\na.jpg,A dog.\nb.jpg,"A cat, asleep."\n'),
    "zipped.csv": gzip.compress(b'image,caption\na.jpg,A dog.\nb.jpg,"A cat, asleep."\n'),
    "metadata.csv": 'file_name,text\na.jpg,A dog.\nb.jpg,"A cat, asleep."\n',
    "metadata.jsonl": '{"file_name": "a.jpg", "text": "A dog."}\n{"file_name": "b.jpg", "text": "A cat, asleep."}',
    "lines.json": '{"image": "a.jpg", "caption": "A dog."}\n{"image": "b.jpg", "caption": "A cat, asleep."}\n',
    "lines.txt": '{"image": "a.jpg", "caption": "A dog."}\n{"image": "b.jpg", "caption": "A cat, asleep."}\n',
    "list.jsonl": '[{"image": "a.jpg", "caption": "A dog."},\n {"image": "b.jpg", "caption": "A cat, asleep."}]\n',
    "lavis.json": json.dumps([{"image": "a.jpg", "caption": ["A dog."]}, {"image": "b.jpg", "caption": [CAT[1]]}]),
    "ids.json": json.dumps({"a.jpg": "A dog.", "b.jpg": ["A cat, asleep."]}),
    "gts.json": json.dumps({"a.jpg": [{"caption": "A dog."}], "b.jpg": [{"image_id": "b.jpg", "caption": CAT[1]}]}),
    "Flickr8k.token.txt": "a.jpg#0\tA dog.\nb.jpg#0\tA cat, asleep.\n",
    "results.csv": "image_name| comment_number| comment\na.jpg| 0| A dog.\nb.jpg| 0| A cat, asleep.\n",
}


@pytest.mark.parametrize("name", READ)
def test_formats_are_told_by_content(tmp_path, name):
    assert captions(write(tmp_path, name, READ[name])) == [DOG, CAT]


def test_tabs_have_no_quoting_and_only_line_feeds_end_json_lines(tmp_path):
    table = 'image\tcaption\na.jpg\t"No entry\nb.jpg\tA dog.\nc.jpg\tof 12"\nd.jpg\t"Stop" it says.\n'
    assert [text for _, text in captions(write(tmp_path, "a.tsv", table))] == [
        '"No entry', "A dog.", 'of 12"', '"Stop" it says.',
    ]  # fmt: skip
    lines = '{"image": "a.jpg", "caption": "A\u2028dog"}\r\n{"image": "b.jpg", "caption": "a\u0085cat"}\n'
    assert [text for _, text in captions(write(tmp_path, "a.jsonl", lines))] == ["A\u2028dog", "a\u0085cat"]


LATIN = "caf\xe9".encode("latin-1")
FAULTS = {  # bad rows: (place, part of what is said); the others are read
    "latin1.csv": (b"image,caption\na.jpg,dog\nb.jpg," + LATIN + b"\nc.jpg,cat\n", [("line 3", "0xe9")], 2),
    "latin1.tsv": (b"image\tcaption\na.jpg\tdog\nb.jpg\t" + LATIN + b"\n", [("line 3", "save the file as UTF-8")], 1),
    "latin1.jsonl": (b'{"image": "a", "caption": "' + LATIN + b'"}\n{"image": "b", "caption": "c"}',
                     [("line 1", "0xe9")], 1),
    "latin1.json": (b'[{"image": "a", "caption": "b"}, {"image": "' + LATIN + b'", "caption": "c"}]',
                    [("record 2", "0xe9")], 1),
    "token.txt": (b"a.jpg#0\tdog\na.jpg 1 cat\nb.jpg#0\t" + LATIN + b"\nb.jpg#1\tbird\n",
                  [("line 2", "a tab"), ("line 3", "0xe9")], 2),
    "stray.csv": ('image,caption\na.jpg,"Stop" says it\nb.jpg,dog\nc.jpg,12" long\n', [("line 2", "quote")], 2),
    "open.csv": ('image,caption\na.jpg,dog\nb.jpg,"No entry\nc.jpg,cat\nd.jpg,of 12"\ne.jpg,bird\n',
                 [("line 3", "not closed")], 4),
    "end.csv": ('image,caption\na.jpg,dog\nb.jpg,"No entry\nc.jpg,cat\n', [("line 3", "not closed")], 2),
    "open_ids.csv": ('image_id,caption\n1,"No entry\n2,cat\n3,of 12"\n', [("line 2", "not closed")], 2),
    "fields.csv": ("image,caption\na.jpg,a,b\nb.jpg,dog\nc.jpg\n", [("line 2", "2 fields"), ("line 4", "2 fields")], 1),
    "fields.tsv": ("image\tcaption\na.jpg\ta\tb\nb.jpg\tdog\n", [("line 2", "delimiter is a tab")], 1),
    "quoted.tsv": ('image\tcaption\na.jpg\t"""Stop"" says it"\nb.jpg\tdog\n', [("line 2", "quoted as in CSV")], 1),
    "decimal.csv": ("image,caption\n1.0,dog\n2,cat\n1.2E+10,bird\n", [("line 2", "1.0"), ("line 4", "1.2E+10")], 1),
    "written.csv": ('image,caption\na.jpg,"[""x"", ""y""]"\nb.jpg,"[\'x\']"\nc.jpg,[sic]\n',
                    [("line 2", "list"), ("line 3", "one row")], 1),
    "nested.json": ('{"data": [{"image": "a.jpg", "caption": "x"}], "7": [{"image_id": 7, "caption": "y"}]}',
                    [("record 1", "'data'")], 1),
    "karpathy.json": ('{"images": [{"split": "train", "filename": "a.jpg", "sentences": "x"}, {"split": "train", '
                      '"filename": "a.jpg", "sentences": [{"raw": "x"}]}]}', [("image 1", "not as Karpathy")], 1),
    "one.jsonl": ('{"file_name": "a.jpg", "prompt": "x"}\n', [("record 1", "has no 'caption'")], 0),
    "results.csv": ("image_name| comment_number| comment\na.jpg| 4   A dog.\nb.jpg| 0| cat\n", [("line 2", "|")], 1),
    "floats.csv": ("image_id,caption\n1.0,dog\n2,cat\n1.2E+10,bird\n", [("line 2", "1.0"), ("line 4", "1.2E+10")], 1),
    "floats.json": ('[{"image_id": 1.0, "caption": "a"}, {"image_id": true, "caption": "a"}, '
                    '{"image_id": NaN, "caption": "a"}, {"image_id": 1, "caption": "a"}]',
                    [("record 1", "1.0"), ("record 2", "True"), ("record 3", "nan")], 1),
    "lines.jsonl": ('{"image": \n\n[1]\n{"image": "a.jpg", "caption": "dog"}\n' + "[" * 10**5 + "\n",
                    [("line 1", "JSON"), ("line 3", "no object"), ("line 5", "JSON")], 1),
    "first.json": ('{"image": \n{"image": "a.jpg", "caption": "dog"}\n', [("line 1", "JSON")], 1),
    "lists.json": ('[{"image": "a.jpg", "caption": []}, {"image": "a.jpg", "caption": ["a", 5]}]',
                   [("record 1", "empty list"), ("record 2", "caption 5")], 1),
    "half.json": ('[{"image": "a.jpg", "caption": "\\ud83d"}]', [("record 1", "half a character")], 0),
    "image.json": ('[{"image": {"bytes": ""}, "caption": "a"}, {"image": 7, "caption": "a"}]',
                   [("record 1", "no file name")], 1),
    "coco.json": ('{"images": [{"id": 1, "file_name": "a.jpg"}, {"id": 1, "file_name": "b.jpg"}, {"id": 2}], '
                  '"annotations": [{"image_id": 1, "caption": "a"}, {"image_id": 2, "caption": "b"}, '
                  '{"image_id": 3, "caption": "c"}]}', [("record 1", "twice"), ("record 3", "not among")], 1),
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_a_bad_row_is_named_and_the_others_are_read(tmp_path, name):
    data, expected, good = FAULTS[name]
    path = write(tmp_path, name, data)
    read = read_places(path)
    faults = [(place, error) for place, _, error in read if error]
    assert [place for place, _ in faults] == [place for place, _ in expected]
    assert all(part in error for (_, error), (_, part) in zip(faults, expected, strict=True)), faults
    assert len(read) - len(faults) == good
    with pytest.raises(ValueError, match=f"{name}, {expected[0][0]} "):
        read_annotations(path)


def test_captions_of_several_lines_stay(tmp_path):
    path = write(tmp_path, "a.csv", 'image,caption\r\na.jpg,"two\r\nlines, ""quoted"""\r\nb.jpg,dog\r\n')
    assert captions(path) == [("a.jpg", 'two\r\nlines, "quoted"'), ("b.jpg", "dog")]


TAR = b"captions.csv".ljust(257, b"\0") + b"ustar\x0000".ljust(255, b"\0")
REFUSED = {
    "semicolon.csv": ("image;caption\na.jpg;dog\n", 'the delimiter ";" in line 1'),
    "quoted.csv": ('"image";"caption"\n"a.jpg";"dog"\n', 'the delimiter ";" in line 1'),
    "quoted.tsv": ('"image"\t"caption"\n"a.jpg"\t"dog"\n', "quoted as in CSV"),
    "pointer.json": ("version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 5\n", "git lfs pull"),
    "twice.csv.gz": (gzip.compress(gzip.compress(b"image,caption\na.jpg,dog\n")), "gzip, twice"),
    "captions.csv.bz2": (bz2.compress(b"image,caption\na.jpg,dog\n"), "bzip2"),
    "captions.csv.xz": (lzma.compress(b"image,caption\na.jpg,dog\n"), "by xz"),
    "captions.tar.gz": (gzip.compress(TAR), "tar archive"),
    "page.json": ("<!DOCTYPE html>\n<html></html>\n", "an HTML page"),
    "00000.parquet": (b"PAR1\x15\x00", "Parquet"),
    "captions.csv": (b"PK\x03\x04\x14\x00", "zip"),
    "pickle.json": (b"\x80\x04\x95", "a pickle"),
    "plain16.csv": ("image,caption\n".encode("utf-16-le"), "UTF-16 without its mark"),
    "cut16.csv": ("image,caption\n".encode("utf-16")[:-1], "damaged UTF-16"),
    "empty.csv": ("", "is empty"),
    "blank.json": (" \n\n", "is empty"),
    "header.csv": ("image,caption\n", "holds no captions"),
    "noheader.csv": ("a.jpg,A dog.\n", "needs image and caption"),
    "twice.csv": ("image,caption,Caption\na.jpg,x,y\n", "two fields 'caption'"),
    "side.txt": ("A dog runs.\n", "needs image and caption"),
    "000000001.json": ('{"url": "http://a.example/1.jpg", "caption": "A dog.", "key": "1"}', "none of the formats"),
    "image_info.json": ('{"info": {}, "images": [{"id": 1, "file_name": "a.jpg"}]}', "images but no captions"),
    "empty_annotations.json": ('{"images": [{"id": 1}], "annotations": []}', "images but no captions"),
    "instances.json": ('{"images": [], "annotations": [{"image_id": 1, "bbox": [0, 0, 1, 1]}]}', "boxes"),
    "numbers.json": ('{"a": 1, "b": 2}', "none of the formats"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_files_that_are_no_annotations(check, folder, tmp_path, name):  # noqa: F811
    data, message = REFUSED[name]
    path = write(tmp_path, name, data)
    done = run_script("parse_coco.py", "--check", "--annotations", path, "--images", folder, check=2)
    assert done.stdout == "" and message in done.stderr and name in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_a_folder_is_no_annotation_file(folder, tmp_path):  # noqa: F811
    done = run_script("parse_coco.py", "--check", "--annotations", folder, "--images", folder, check=2)
    assert "is a folder; name one file" in done.stderr and len(done.stderr.splitlines()) == 1
    done = run_script("parse_coco.py", "--annotations", tmp_path / "none.csv", "--images", folder, check=2)
    assert done.stderr == f"error: {tmp_path / 'none.csv'} does not exist\n"


def test_fields_and_their_names(tmp_path):
    rows = [{"filepath": "val2014", "filename": "a.jpg", "caption": "x"}, {"filepath": "p/b.jpg", "caption": "x"},
            {"filepath": "p/b.jpg", "filename": "b.jpg", "caption": "x"}, {"image_id": 5, "caption": "x", "text": "y"},
            {"image": "a.jpg", "filename": "IMG_1.jpg", "image_id": 9, "caption": "x"}]  # fmt: skip
    records = read_annotations(write(tmp_path, "a.json", json.dumps(rows)))
    assert [(r.get("file_name"), r["image_id"]) for r in records] == [
        ("val2014/a.jpg", "a"), ("p/b.jpg", "b"), ("p/b.jpg", "b"), (None, 5), ("a.jpg", 9),
    ]  # fmt: skip
    assert records[3]["text"] == "y" and records[4]["filename"] == "IMG_1.jpg"


def test_ids():
    wide = "12345678901234567890123"
    assert [normal_id(i) for i in ("7", "007", 7, " 7 ", "v1.3", "２", "²", wide, int(wide), 2**63 - 1, 2**63)] == [
        7, 7, 7, 7, "v1.3", "２", "²", wide, wide, 2**63 - 1, str(2**63),
    ]  # fmt: skip
    assert normal_id("cafe\u0301") == "caf\xe9" == image_id_of("p/cafe\u0301.jpg")
    assert image_id_of("p/２.jpg") == "２" and image_id_of(f"{wide}.jpg") == wide and image_id_of("0.jpg") == 0
    assert image_id_of("9007199254740993.jpg") == 9007199254740993
    assert distinct_ids([7, "7", "008", "x"]) == {"7": 7, "008": 8, "x": "x"}
    assert distinct_ids(["7", "007"]) == {"7": "7", "007": "007"}


def test_ids_of_two_images_are_never_one(tmp_path):
    """Leading zeros, a name in two folders, a number too long for a column."""
    pairs = [{"image_id": i, "caption": c} for i, c in (("007", "A dog."), ("7", "A cat."))]
    references = read_references(write(tmp_path, "r.json", json.dumps(pairs)), "test")
    assert references.captions == {"007": ["A dog."], "7": ["A cat."]}
    own = write(tmp_path, "c.json", json.dumps(pairs[:1]))
    assert read_captions(own, references, "test") == {"007": "A dog."}
    padded = write(tmp_path, "d.json", '[{"image_id": "0007", "caption": "a"}]')
    one = read_references(write(tmp_path, "q.json", json.dumps(pairs[1:])), "test")
    assert read_captions(padded, one, "test") == {7: "a"} and read_captions(padded, references, "test") == {7: "a"}
    table = "image,caption\ncats/1.jpg,x\ndogs/1.jpg,y\ncats/1.jpg,z\n2.jpg,v\n007.jpg,u\n7.jpg,t\n"
    references = read_references(write(tmp_path, "r.csv", table), "test")
    assert list(references.captions) == ["cats/1.jpg", "dogs/1.jpg", 2, "007.jpg", "7.jpg"]
    assert read_captions(write(tmp_path, "e.json", '{"1": "a", "2": "b"}'), references, "test") == {1: "a", 2: "b"}
    wide = '[{"image_id": 12345678901234567890123, "caption": "a"}]'
    assert read_annotations(write(tmp_path, "w.json", wide))[0]["image_id"] == "12345678901234567890123"


def test_reference_lists(tmp_path):
    """LAVIS's lists and pycocoevalcap's gts.json: several references per image, and one caption per image."""
    texts = {42: ["A dog runs.", "A brown dog."], 73: ["A cat sleeps.", "A cat on a sofa."]}
    listed = [{"image": f"val2014/COCO_val2014_{i:012d}.jpg", "caption": t} for i, t in texts.items()]
    for name, value in (("karpathy.json", listed), ("gts.json", {str(i): t for i, t in texts.items()})):
        path = write(tmp_path, name, json.dumps(value))
        references = read_references(path, "test")
        assert references.captions == texts
        with pytest.raises(ValueError, match="several captions for 2 images"):
            read_captions(path, references, "test")
