"""WebDataset shards, read in any order: what is well-formed is used, what is not is left out with a reason."""

import gzip
import io
import os
import re
import tarfile

import numpy as np
import pytest

from fastdeit.data.sources import tar
from fastdeit.data.sources.source import BadImage, DataError
from fastdeit.data.sources.tar import TarSource, shards

END = 2 * 512


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FASTDEIT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def root(tmp_path):
    (tmp_path / "data").mkdir()
    return tmp_path / "data"


def write(path, members, **options):
    """members: (name, bytes), or a TarInfo."""
    with tarfile.open(path, "w", **options) as archive:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                archive.addfile(member)
            else:
                info = tarfile.TarInfo(member[0])
                info.size = len(member[1])
                archive.addfile(info, io.BytesIO(member[1]))
    return path


def samples(images, start=0):
    for i, data in enumerate(images, start):
        yield from ((f"{i:04d}.jpg", data), (f"{i:04d}.cls", b"%d" % (i % 3)))


def link(name, kind=tarfile.SYMTYPE, target="/etc/passwd"):
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


@pytest.fixture
def two_shards(root, varied):
    write(root / "train-00.tar", samples(varied[:5]))
    write(root / "train-01.tar", samples(varied[5:9], start=5))
    return root


def test_samples_are_those_of_the_shards(two_shards, varied):
    ours = TarSource(two_shards, shards(two_shards, "train"))
    assert (len(ours), ours.classes, list(ours.skipped)) == (9, ["0", "1", "2"], [])
    for i in (8, 0, 4, 5, 3, 8):
        assert ours.read(i).tobytes() == varied[i]
        assert ours.label(i) == i % 3
    assert ours.path(6) == f"{two_shards}/train-01.tar:0006.jpg"


@pytest.mark.parametrize("layout", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_names_long_nested_and_in_any_alphabet(root, varied, layout):
    folder = "./n01440764/" + "long/" * 25
    names = [folder + "É one", folder + "v1"]
    members = [(f"{name}.{end}", data) for name in names for end, data in (("JPEG", varied[0]), ("cls", b" 1\n"))]
    write(root / "a.tar", members, format=layout)
    ours = TarSource(root, ["a.tar"])
    assert [ours.name(i) for i in range(len(ours))] == [f"a.tar:{name}.JPEG" for name in names]
    assert ours.read(1).tobytes() == varied[0]


@pytest.mark.parametrize("padding", [0, 3 * 512, 40 * 512])
def test_a_file_of_several_tar_files_is_read_to_its_end(root, varied, padding):
    """`cat a.tar b.tar`: tarfile itself ends at the first end mark, and loses the rest."""
    first, second = (write(root / name, samples(varied[at : at + 3], at)) for at, name in ((0, "a.tar"), (3, "b.tar")))
    (root / "c.tar").write_bytes(first.read_bytes() + bytes(padding) + second.read_bytes())
    ours = TarSource(root, ["c.tar"])
    assert [ours.name(i) for i in range(len(ours))] == [f"c.tar:{i:04d}.jpg" for i in range(6)]
    assert [ours.read(i).tobytes() for i in range(6)] == varied[:6]


def test_what_follows_the_end_and_is_no_tar_file_is_named(root, varied):
    whole = write(root / "a.tar", samples(varied[:3])).read_bytes()
    (root / "a.tar").write_bytes(whole + b"junk" * 200)
    with pytest.warns(UserWarning, match=rf"a\.tar: the .* damaged at byte {len(whole)} of"):
        assert len(TarSource(root, ["a.tar"])) == 3


@pytest.mark.parametrize("before", ["./", "././", "images/./", "images//", ".//images/./"])
def test_a_dot_in_a_path_is_no_hidden_folder_and_no_other_key(root, before):
    """As `tar -cf a.tar images/./*` and `find . | tar -T -` write names; the label may be added later without it."""
    after = before.replace("./", "").replace("//", "/").lstrip("/")
    members = [(f"{before}0.jpg", b"x"), (f"{before}0.cls", b"0"), (f"{before}1.jpg", b"y"), (f"{after}1.cls", b"1")]
    write(root / "a.tar", [*members, (f"{after}0.jpg", b"z"), (f"{after}0.cls", b"1")])
    with pytest.warns(UserWarning, match=r"2 entries of tar files are left out:\n.*an earlier file .* has this name"):
        ours = TarSource(root, ["a.tar"])
    found = [(ours.name(i), ours.label(i), ours.read(i).tobytes()) for i in range(len(ours))]
    assert found == [(f"a.tar:{before}0.jpg", 0, b"x"), (f"a.tar:{before}1.jpg", 1, b"y")]


def test_keys_may_have_dots(root, varied):
    members = [
        (f"{key}.{end}", data)
        for key in ("a/cat.v1", "a/cat.v2", "b.x")
        for end, data in (("jpg", b"x"), ("cls", b"1"))
    ]
    write(root / "a.tar", [*members, ("c.jpg", b"y"), ("c.mask.png", b"z"), ("c.json", b'{"label": 0}')])
    ours = TarSource(root, ["a.tar"])
    expected = [("a/cat.v1.jpg", 1), ("a/cat.v2.jpg", 1), ("b.x.jpg", 1), ("c.jpg", 0)]
    assert [(ours.name(i).removeprefix("a.tar:"), ours.label(i)) for i in range(len(ours))] == expected


CLS = [b"cat\n", b"dog", b"a cat", b"dog"]
LABELS = {
    "names": ([("cls", data) for data in CLS], "label", ["cat", "dog", "a cat", "dog"]),
    "names that Python takes for numbers": (
        [("cls", data) for data in (b"0_2", b"1e5", b"0_2", b"4_6")],
        "label",
        ["0_2", "1e5", "0_2", "4_6"],
    ),
    "names in JSON": (
        [("json", b'{"label": "%s"}' % data) for data in (b"n02", b"n01", "caf\u00e9".encode(), b"n01")],
        "label",
        ["n02", "n01", "caf\u00e9", "n01"],
    ),
    "numbers as text": ([("json", b'{"label": "%d"}' % n) for n in (10, 2, 0, 10)], "label", ["10", "2", "0", "10"]),
    "a field of an object": (
        [("json", b'{"label": {"id": %d, "name": "x"}}' % n) for n in (1, 0, 2, 1)],
        "label.id",
        ["1", "0", "2", "1"],
    ),
    "a name in an object": (
        [("json", b'{"label": {"id": 7, "of": {"name": "%s"}}}' % name) for name in (b"b", b"a", b"b", b"a")],
        "label.of.name",
        ["b", "a", "b", "a"],
    ),
    "a field with a dot": ([("json", b'{"a.b": %d, "a": {"b": 5}}' % n) for n in (1, 0, 1, 0)], "a.b", [*"1010"]),
    "names in both": (
        [("cls", b"cat"), ("json", b'{"label": "dog"}'), ("cls", b"dog"), ("json", b'{"label": "cat"}')],
        "label",
        ["cat", "dog", "dog", "cat"],
    ),
}


@pytest.mark.parametrize("name", LABELS)
@pytest.mark.filterwarnings("error")
def test_labels_are_numbers_or_names(root, varied, name):
    members, field, expected = LABELS[name]
    for shard, few in ((0, slice(0, 2)), (1, slice(2, 4))):
        pairs = enumerate(zip(members[few], varied[few], strict=True))
        write(
            root / f"{shard}.tar",
            (one for at, ((end, label), image) in pairs for one in ((f"{at}.jpg", image), (f"{at}.{end}", label))),
        )
    for _ in range(2):  # from the files, and from the kept list
        ours = TarSource(root, ["0.tar", "1.tar"], field)
        assert [ours.classes[ours.label(i)] for i in range(4)] == expected
        assert [ours.read(i).tobytes() for i in range(4)] == varied[:4]
    named = not all(label.isdigit() for label in expected)
    assert ours.classes == (sorted(set(expected)) if named else [str(n) for n in range(max(map(int, expected)) + 1)])


def test_of_numbers_and_names_the_fewer_are_left_out(root):
    labels = [b"cat", b"1", b"dog", b"cat"]
    write(root / "a.tar", (one for i, x in enumerate(labels) for one in ((f"{i}.jpg", b"%d" % i), (f"{i}.cls", x))))
    with pytest.warns(UserWarning, match=r"a\.tar:1\.jpg: its label 1 is a number, most are names"):
        ours = TarSource(root, ["a.tar"])
    assert [(ours.read(i).tobytes(), ours.classes[ours.label(i)]) for i in range(3)] == [
        (b"0", "cat"),
        (b"2", "dog"),
        (b"3", "cat"),
    ]


def test_one_name_is_no_classification(root):
    write(root / "a.tar", [("0.jpg", b"x"), ("0.cls", b"cat"), ("1.jpg", b"y"), ("1.cls", b"cat")])
    with pytest.raises(DataError, match="every label is 'cat'; classification needs two or more classes"):
        TarSource(root, ["a.tar"])


def test_what_programs_leave_behind_is_passed_over(root):
    litter = ["._0000.jpg", ".DS_Store", "__MACOSX/a.jpg", "a/.git/b.jpg", "a/._0000.cls"]
    write(
        root / "a.tar",
        [*samples([b"sound"] * 3), *((name, b"") for name in litter), ("./x.jpg", b""), ("./x.cls", b"0")],
    )
    ours = TarSource(root, ["a.tar"])
    assert (len(ours), ours.skipped) == (4, [])


def test_labels_may_be_a_field_of_json(root, varied):
    members = [
        ("a.jpg", varied[0]),
        ("a.json", b'{"label": 1, "cls": 0}'),
        ("b.json", b'{"label": 0}'),
        ("b.png", b"x"),
    ]
    write(root / "a.tar", members)
    ours = TarSource(root, ["a.tar"])
    assert [(ours.name(i), ours.label(i)) for i in range(2)] == [("a.tar:a.jpg", 1), ("a.tar:b.png", 0)]


PATTERNS = {
    "train": ["train-00.tar", "train-01.tar"],
    "train-{00..01}.tar": ["train-00.tar", "train-01.tar"],
    "train-{01,00}.tar": ["train-01.tar", "train-00.tar"],
    "train-0{0..1}.tar": ["train-00.tar", "train-01.tar"],
    "t*1.tar": ["train-01.tar"],
    "sub": ["sub/a.tar", "sub/b.tar"],
    "{sub,.}/{a,train-00}.tar": None,
    "train-{00..02}.tar": None,
    "val": None,
    "train-{x": None,
    "no.tar": None,
}


@pytest.mark.parametrize("pattern", PATTERNS)
def test_shards_by_folder_braces_glob_or_first_part(two_shards, pattern):
    (two_shards / "sub").mkdir()
    for name in "ba":
        write(two_shards / "sub" / f"{name}.tar", [])
    if PATTERNS[pattern] is None:
        with pytest.raises(DataError, match=r"data: no tar file .*; give the folder of the shards, or their names"):
            shards(two_shards, pattern)
    else:
        assert shards(two_shards, pattern) == PATTERNS[pattern]


def leave_out(root, members, **options):
    """(number of samples, reasons by name) of a shard of sound samples, `members`, and one more sound sample."""
    sound = list(samples([b"sound"] * 3))
    write(root / "a.tar", [*sound[:4], *members, *sound[4:]], **options)
    with pytest.warns(UserWarning, match=r"data: \d+ entries of tar files are left out:\n"):
        ours = TarSource(root, ["a.tar"])
    assert {ours.read(i).tobytes() for i in range(3)} == {b"sound"}
    return len(ours), {path.removeprefix(f"{root}/a.tar:"): reason for path, reason in ours.skipped}


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("../x", "absolute, leads upwards"),
        ("a/../../x", "absolute, leads upwards"),
        ("/abs", "absolute, leads upwards"),
    ],
)
def test_names_that_lead_out_of_the_data_set(root, name, reason):
    count, reasons = leave_out(root, [(f"{name}.jpg", b"evil"), (f"{name}.cls", b"0")])
    assert count == 3
    assert [reason in reasons[f"{name}.{end}"] for end in ("jpg", "cls")] == [True, True]


NOT_REGULAR = ["SYMTYPE", "LNKTYPE", "CHRTYPE", "BLKTYPE", "FIFOTYPE", "GNUTYPE_SPARSE"]


@pytest.mark.parametrize("kind", [getattr(tarfile, name) for name in NOT_REGULAR], ids=NOT_REGULAR)
def test_links_devices_and_sparse_files(root, kind):
    count, reasons = leave_out(root, [link("x.jpg", kind), ("x.cls", b"0")])
    assert count == 3
    assert "not a regular file" in reasons["x.jpg"]
    assert "here is only cls" in reasons["x"]


def test_a_name_with_a_nul(root):
    info = tarfile.TarInfo("x.jpg")
    info.pax_headers = {"path": "a\0b.jpg"}
    count, reasons = leave_out(root, [info], format=tarfile.PAX_FORMAT)
    assert count == 3
    assert reasons == {"a\0b.jpg": "the name is absolute, leads upwards or contains a NUL"}


def test_the_first_of_two_members_with_one_name_is_used(root):
    count, reasons = leave_out(root, [("0000.jpg", b"other"), ("0000.cls", b"2")])
    assert count == 3
    assert reasons == dict.fromkeys(("0000.jpg", "0000.cls"), "an earlier file in the tar file has this name")


@pytest.mark.parametrize(
    ("members", "reason"),
    [
        ([], r"there is no \.cls and no \.json file"),
        ([("x.cls", b"dog")], r"its label 'dog' is a name, most are numbers"),
        ([("x.cls", b"two\nlines")], r"its \.cls file is not a class number or name: b'two"),
        ([("x.cls", b"")], r"not a class number or name: b''"),
        ([("x.cls", b"1.5")], "not a class number or name"),
        ([("x.cls", b"nan")], "not a class number or name"),
        ([("x.cls", b"n" * 201)], "not a class number or name"),
        ([("x.cls", b"caf\xe9")], "not a class number or name"),
        ([("x.cls", b"-1")], "its label -1 is not a class number"),
        ([("x.cls", b"4294967295")], "its label 4294967295 is not a class number"),
        ([("x.cls", b"9" * 5000)], "not a class number or name"),
        ([("x.cls", bytes(2 << 20))], "2097152 bytes, too many"),
        ([("x.json", b"{")], "its .json file is not an object with field 'label'"),
        ([("x.json", b"[1]")], "not an object"),
        ([("x.json", b"[" * 100_000)], "not an object"),
        ([("x.json", b"\xff\xfe")], "not an object"),
        ([("x.json", b'{"label": true}')], "its label True"),
        ([("x.json", b'{"label": "dog"}')], "its label 'dog' is a name, most are numbers"),
        ([("x.json", b'{"label": 1.0}')], "its label 1.0"),
        ([("x.json", b'{"label": "-1"}')], "its label -1 is not a class number"),
        ([("x.json", b'{"label": null}')], "its label None"),
        (
            [("x.json", b'{"label": {"id": 1, "name": "cat"}}')],
            r"its label is an object; say .* by data\.label_column=label\.id or data\.label_column=label\.name",
        ),
    ],
)
def test_samples_without_a_label(root, members, reason):
    count, reasons = leave_out(root, [("x.jpg", b"picture"), *members])
    assert count == 3
    assert list(reasons) == ["x.jpg"]
    assert re.search(reason, reasons["x.jpg"])


def test_samples_with_no_image_or_two(root):
    members = [("x.cls", b"0"), ("y.cls", b"0"), ("y.jpg", b"1"), ("y.png", b"2"), (".hidden", b""), ("README", b"")]
    count, reasons = leave_out(root, members)
    assert count == 3
    assert reasons == {
        "x": "a sample has one image; here is only cls",
        "y": "a sample has one image; here is 'y.jpg' and 'y.png'",
        "README": "the name is not KEY.EXTENSION",
    }


@pytest.mark.parametrize("cut", [1, 512, 700, END + 1, END + 512, END + 600, 5000])
def test_a_cut_tail_costs_the_samples_in_it(root, varied, cut):
    whole = write(root / "a.tar", samples(varied[:6]))
    with tarfile.open(whole) as archive:
        members = archive.getmembers()
    length = members[-1].offset_data + 512 + END
    os.truncate(whole, length - cut)
    complete = {info.name for info in members if info.offset_data + info.size <= length - cut}
    count = sum({f"{i:04d}.jpg", f"{i:04d}.cls"} <= complete for i in range(6))
    if cut <= 512:
        ours = TarSource(root, ["a.tar"])
        assert not ours.skipped
    else:
        with pytest.warns(UserWarning, match="cut short"):
            ours = TarSource(root, ["a.tar"])
    assert len(ours) == count
    assert [ours.read(i).tobytes() for i in range(count)] == varied[:count]


def test_an_image_that_is_cut_is_no_sample_though_its_label_is_there(root, varied):
    path = write(root / "a.tar", [*samples(varied[:3]), ("x.cls", b"0"), ("x.jpg", varied[3])])
    with tarfile.open(path) as archive:
        last = archive.getmembers()[-1]
    os.truncate(path, last.offset_data + last.size - 1)
    with pytest.warns(UserWarning, match=r"x\.jpg: the tar file is cut short: it ends at byte \d+, inside this file"):
        assert len(TarSource(root, ["a.tar"])) == 3


def test_a_damaged_header_costs_what_comes_after_it(root, varied):
    path = write(root / "a.tar", samples(varied[:6]))
    with tarfile.open(path) as archive:
        at = archive.getmembers()[6].offset
    with open(path, "r+b") as file:
        file.seek(at)
        file.write(b"\xff" * 200)
    with pytest.warns(UserWarning, match=f"cut short or damaged at byte {at}"):
        assert len(TarSource(root, ["a.tar"])) == 3


@pytest.mark.parametrize("size", [-1, -512, -1024, 1 << 40, (1 << 63) - 1])
@pytest.mark.parametrize("kind", [tarfile.REGTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE, tarfile.GNUTYPE_SPARSE])
def test_headers_that_lie_about_the_size(root, size, kind):
    """A negative size leads back to the same header for ever, a large one beyond the end."""
    sound = io.BytesIO()
    with tarfile.open(fileobj=sound, mode="w") as archive:
        for name, data in samples([b"sound"] * 3):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    info = tarfile.TarInfo("lie.jpg")
    info.type, info.size = kind, size
    lie = info.tobuf(tarfile.GNU_FORMAT)
    (root / "a.tar").write_bytes(sound.getvalue()[: 12 * 512] + lie + sound.getvalue()[12 * 512 :])
    with pytest.warns(UserWarning, match=r"a\.tar"):
        ours = TarSource(root, ["a.tar"])
    assert [ours.read(i).tobytes() for i in range(len(ours))] == [b"sound"] * 3


def test_headers_nested_without_end(root, varied):
    info = tarfile.TarInfo("x")
    info.type = tarfile.GNUTYPE_LONGNAME
    path = write(root / "a.tar", samples(varied[:3]))
    with tarfile.open(path) as archive:
        last = archive.getmembers()[-1]
    path.write_bytes(path.read_bytes()[: last.offset_data + 512] + 3000 * info.tobuf(tarfile.GNU_FORMAT))
    with pytest.warns(UserWarning, match=r"a\.tar: not a tar file, or one that is cut short or damaged: .*recursion"):
        assert len(TarSource(root, ["a.tar"])) == 3


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "not a tar file, or one that is cut short or damaged: empty file"),
        (b"<!DOCTYPE html>" * 100, "not a tar file, or one that"),
        (b"\0" * 10_240, "no image with a label in 1 tar file;"),
        (gzip.compress(bytes(5000), mtime=0), "compressed with gzip; only a plain tar file can be read in any order"),
        (None, "the tar file cannot be read: Is a directory"),
        ("pipe", "the tar file cannot be read: Illegal seek"),
    ],
)
def test_nothing_usable_is_an_error_with_the_reasons(root, data, reason):
    if data is None:
        (root / "a.tar").mkdir()
    elif data == "pipe":
        os.mkfifo(root / "a.tar")
    else:
        (root / "a.tar").write_bytes(data)
    with pytest.raises(DataError, match=r"data: no image with a label in 1 tar file; a sample is KEY\.jpg") as info:
        TarSource(root, ["a.tar"])
    assert reason in str(info.value)


def test_a_single_class_is_refused(root, varied):
    write(root / "a.tar", [("a.jpg", varied[0]), ("a.cls", b"0")])
    with pytest.raises(DataError, match="every label is 0; classification needs two or more classes"):
        TarSource(root, ["a.tar"])


def test_a_shard_that_vanishes_or_is_cut_while_in_use(two_shards):
    ours = TarSource(two_shards, shards(two_shards, "train"))
    os.truncate(two_shards / "train-00.tar", 600)
    (two_shards / "train-01.tar").unlink()
    with pytest.raises(BadImage, match="ends before the image"):
        ours.read(0)
    with pytest.raises(OSError, match="No such file"):
        ours.read(7)
    with pytest.raises(DataError, match=r"train-01\.tar: the tar file cannot be read: No such file"):
        TarSource(two_shards, ["train-00.tar", "train-01.tar"])


@pytest.fixture
def scans(monkeypatch):
    """Shards whose headers are read."""
    seen, members = [], tar.members
    monkeypatch.setattr(tar, "members", lambda path, skipped: seen.append(path) or members(path, skipped))
    return seen


def same(a, b):
    return a.fingerprint == b.fingerprint and all(np.array_equal(a.read(i), b.read(i)) for i in range(len(a)))


def test_headers_are_read_once(two_shards, scans, varied):
    names = shards(two_shards, "train")
    first = TarSource(two_shards, names)
    assert same(first, TarSource(two_shards, names))
    assert len(scans) == 2
    write(two_shards / "train-01.tar", samples(varied[5:8], start=5))
    assert len(TarSource(two_shards, names)) == 8
    assert len(scans) == 4
    TarSource(two_shards, names[:1])
    assert len(scans) == 5


def test_a_shard_of_the_same_size_but_newer_is_read_again(two_shards, scans):
    names = shards(two_shards, "train")
    TarSource(two_shards, names)
    os.utime(two_shards / "train-00.tar", ns=(1, 1))
    TarSource(two_shards, names)
    assert len(scans) == 4


def test_other_labels_of_the_same_size_and_time_are_noticed(two_shards, varied):
    path = two_shards / "train-00.tar"
    before, labels = path.stat(), [TarSource(two_shards, [path.name]).label(i) for i in range(5)]
    data = path.read_bytes()
    at = data.index(b"0001.cls") + 512
    path.write_bytes(data[:at] + b"2" + data[at + 1 :])
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert [TarSource(two_shards, [path.name]).label(i) for i in range(5)] == [labels[0], 2, *labels[2:]]


def test_a_damaged_list_is_made_anew(two_shards, scans):
    names = shards(two_shards, "train")
    first = TarSource(two_shards, names)
    (kept,) = two_shards.glob(".fastdeit-tar-*")
    for damage in (lambda data: data[:-9], lambda data: b"", lambda data: data[:99] + b"?" + data[100:]):
        kept.write_bytes(damage(kept.read_bytes()))
        assert same(first, TarSource(two_shards, names))
    assert len(scans) == 8


def test_where_the_folder_cannot_be_written_the_list_goes_to_the_cache(two_shards, scans, cache):
    names = shards(two_shards, "train")
    TarSource(two_shards, names)
    (kept,) = two_shards.glob(".fastdeit-tar-*")
    kept.unlink()
    kept.mkdir()
    (kept / "in the way").touch()
    first = TarSource(two_shards, names)
    assert len(list(cache.iterdir())) == 1
    assert same(first, TarSource(two_shards, names))
    assert len(scans) == 4


def test_what_was_left_out_is_said_at_every_start(root, scans):
    write(root / "a.tar", [*samples([b"sound"] * 3), ("x.jpg", b"")])
    for _ in range(2):
        with pytest.warns(UserWarning, match=r"a\.tar:x\.jpg: there is no \.cls"):
            assert TarSource(root, ["a.tar"]).skipped == [
                (f"{root}/a.tar:x.jpg", "there is no .cls and no .json file with its label")
            ]
    assert len(scans) == 1
