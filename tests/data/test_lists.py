"""Images whose labels stand in a list: CSV, TSV, JSONL and text, Kaggle's ImageNet, Tiny ImageNet."""

import json

import pytest

from fastdeit import cli
from fastdeit.data.sources.source import DataError
from tests.data.layouts import NAMES, NUMBERS, as_train, files, labels

CAT, DOG = "n02121808", "n02084071"
WNIDS = ([DOG, DOG, CAT], [DOG, CAT])


def lists(*lines, train="train.csv", val="val.csv", images=("a.jpg", "b.jpg", "c.jpg", "d.jpg", "e.jpg")):
    """A writer of two lists: perhaps a head, three training and two held-out lines; and of the images."""

    def write(root):
        files(root, *images)
        head, rows = lines[:-5], lines[-5:]
        for file, part in ((train, rows[:3]), (val, rows[3:])):
            (root / file).parent.mkdir(parents=True, exist_ok=True)
            (root / file).write_text("\n".join([*head, *part]) + "\n")

    return write


def lines(form, values):
    return [form.format(name, value) for name, value in zip("abcde", values, strict=True)]


def arrays(root, indent):
    """What `frame.to_json(FILE, orient="records", indent=...)` writes."""
    files(root, *(f"{one}.jpg" for one in "abcde"))
    rows = [{"path": f"{one}.jpg", "label": label} for one, label in zip("abcde", (0, 1, 1, 1, 0), strict=True)]
    for split, part in (("train", rows[:3]), ("val", rows[3:])):
        (root / f"{split}.json").write_text(json.dumps(part, indent=indent))


def several_roots(root):
    disks = root / "disk1", root / "disk2"
    files(disks[0], "a.jpg", "b.jpg", "d.jpg")
    files(disks[1], "c.jpg", "e.jpg")
    (root / "train.csv").write_text(f"{disks[0]}/a.jpg,cat\n{disks[0]}/b.jpg,dog\n{disks[1]}/c.jpg,dog\n")
    (root / "val.csv").write_text(f"disk1/d.jpg,dog\n{disks[1]}/e.jpg,cat\n")


def kaggle(root, numbers=(1, 2), also=()):
    place = root / "ILSVRC" / "Data" / "CLS-LOC"
    files(place, f"train/{CAT}/{CAT}_1.JPEG", f"train/{DOG}/{DOG}_1.JPEG", f"train/{DOG}/{DOG}_2.JPEG", "test/x.JPEG")
    files(place / "val", *(f"ILSVRC2012_val_{number:08d}.JPEG" for number in numbers), *also)
    head = "ImageId,PredictionString"
    (root / "LOC_train_solution.csv").write_text(f"{head}\n{CAT}_1,{CAT} 1 2 3 4 \n")
    rows = [f"ILSVRC2012_val_00000002,{CAT} 85 1 499 272 ", f"ILSVRC2012_val_00000001,{DOG} 1 1 2 2 {DOG} 3 3 4 4 "]
    (root / "LOC_val_solution.csv").write_text("\n".join([head, *rows]) + "\n")


def tiny(root, images=("val_0.JPEG", "val_1.JPEG")):
    files(root, f"train/{CAT}/images/a.JPEG", f"train/{DOG}/images/a.JPEG", f"train/{DOG}/images/b.JPEG")
    files(root, *(f"val/images/{image}" for image in images), "test/images/test_0.JPEG")
    (root / "wnids.txt").write_text(f"{CAT}\n{DOG}\n")
    rows = (f"{name}\t{wnid}\t0\t32\t44\t62\n" for name, wnid in (("val_1.JPEG", CAT), ("val_0.JPEG", DOG)))
    (root / "val" / "val_annotations.txt").write_text("".join(rows))


IN_FOLDERS = ("train/a.jpg", "train/b.jpg", "train/c.jpg", "validation/d.jpg", "validation/e.jpg")
OTHER = ["data.image_column=Where", "data.label_column=What"]
SETS = {
    "names": (lists("path,label", *lines("{}.jpg,{}", ("cat", "dog", "dog", "dog", "cat"))), [], NAMES),
    "no head": (lists(*lines("{}.jpg,{}", "01110")), [], NUMBERS),
    "byte order mark": (lists("\ufefffile,class", *lines("{}.jpg,{}", "01110")), [], NUMBERS),
    "fields with spaces": (lists("path, label", *lines('{}.jpg, "{}"', "01110")), [], NUMBERS),
    "characters that end a line elsewhere": (
        lists(
            *(
                f'{{"path": "{one}.jpg", "label": "a\u2028{name}\x85b"}}'
                for one, name in zip("abcde", "01110", strict=True)
            ),
            train="train.jsonl",
            val="val.jsonl",
        ),
        [],
        tuple([f"a\u2028{label}\x85b" for label in part] for part in ("011", "10")),
    ),
    "ids": (lists("id,breed", *lines("{},{}", "01110"), images=[f"images/{one}.png" for one in "abcde"]), [], NUMBERS),
    "other columns": (lists("n,Where,What", *lines('1,"{}.jpg", {}', "01110")), OTHER, NUMBERS),
    "names that Python takes for numbers": (
        lists("path,label", *lines("{}.jpg,{}", ("0_2", "1e5", "1e5", "1e5", "0_2"))),
        [],
        (["0_2", "1e5", "1e5"], ["1e5", "0_2"]),
    ),
    "tabs": (
        lists("x\ttarget\timg", *lines("9\t{1}\t{0}.jpg", "01110"), train="train.tsv", val="val.tsv"),
        [],
        NUMBERS,
    ),
    "objects": (
        lists(
            *(line.replace("'", '"') for line in lines("{{'label': {1}, 'file_name': '{0}.jpg'}}", "01110")),
            train="train.jsonl",
            val="test.jsonl",
        ),
        [],
        NUMBERS,
    ),
    **{
        f"an array, {form}": (lambda root, indent=indent: arrays(root, indent), [], NUMBERS)
        for form, indent in (("in a line", None), ("in many lines", 2))
    },
    "objects in .json": (
        lists(
            *(line.replace("'", '"') for line in lines("{{'label': {1}, 'file_name': '{0}.jpg'}}", "01110")),
            train="train.json",
            val="test.json",
        ),
        [],
        NUMBERS,
    ),
    "a folder of Kaggle's": (
        lists("image_id,label", *lines("{},{}", "01110"), images=[f"train_images/{one}.jpg" for one in "abcde"]),
        [],
        NUMBERS,
    ),
    "another folder": (
        lists("id,label", *lines("{},{}", "01110"), images=[f"photos/{one}.jpg" for one in "abcde"]),
        [],
        NUMBERS,
    ),
    "spaces around names in objects": (
        lists(
            *(
                f'{{"path": "{one}.jpg", "label": "{name} "}}'
                for one, name in zip("abcde", (*NAMES[0], *NAMES[1]), strict=True)
            ),
            train="train.jsonl",
            val="val.jsonl",
        ),
        [],
        NAMES,
    ),
    "words": (lists(*lines("{}.jpg {}", "01110"), train="train.txt", val="val.txt"), [], NUMBERS),
    "inside the split": (
        lists(
            "file_name,label",
            *lines("{}.jpg,{}", "01110"),
            train="train/metadata.csv",
            val="validation/metadata.csv",
            images=IN_FOLDERS,
        ),
        [],
        NUMBERS,
    ),
    "names of files": (
        lists("path,label", *lines("{}.jpg,{}", "01110"), train="a.csv", val="b.csv"),
        ["data.source=list", "data.train=a.csv", "data.val=b.csv"],
        NUMBERS,
    ),
    "fewer held-out classes": (
        lists("path,label", *lines("{}.jpg,{}", ("cat", "dog", "dog", "dog", "dog"))),
        [],
        (NAMES[0], ["dog", "dog"]),
    ),
    "several roots": (several_roots, [], NAMES),
    "Kaggle": (kaggle, [], WNIDS),
    "Tiny ImageNet": (tiny, [], WNIDS),
}


@pytest.mark.parametrize("name", SETS)
@pytest.mark.filterwarnings("error")
def test_what_a_list_names_has_the_right_labels(tmp_path, name):
    write, overrides, expected = SETS[name]
    write(tmp_path)
    train, val = as_train(tmp_path, *overrides)
    assert (labels(train), labels(val)) == expected
    assert train.classes == val.classes
    assert [train.read(i).tobytes()[-5:-4] for i in range(3)] == [train.name(i)[-5:-4].encode() for i in range(3)]


def test_a_first_image_that_is_missing_is_a_bad_file(tmp_path):
    lists("id,label", *lines("{},{}", "01110"), images=("images/b.jpg", "d.jpg"))(tmp_path)
    train, _ = as_train(tmp_path)
    assert (len(train), train.path(0), train.read(1).tobytes()) == (3, f"{tmp_path}/images/a.jpg", b"images/b.jpg")
    with pytest.raises(FileNotFoundError):
        train.read(0)


JSON = {"train": "train.jsonl", "val": "val.jsonl"}
ARRAY = {"train": "train.json", "val": "val.json"}
REFUSED = {
    "unknown columns": (
        lists("where,what", *lines("{}.jpg,{}", "01110")),
        [],
        r"train\.csv: no column is known to be that of the images; the columns are 'where', 'what': .*data\.image_colu",
    ),
    "no such column": (
        lists("path,label", *lines("{}.jpg,{}", "01110")),
        ["data.label_column=kind"],
        r"train\.csv: no column 'kind'; the columns are 'path', 'label': name the right one by data\.label_column=NAME",
    ),
    "two labels": (
        lists("path,label", "a.jpg,0", "b.jpg,1", "a.jpg,1", "d.jpg,1", "e.jpg,0"),
        [],
        r"train\.csv: 'a\.jpg' stands in lines 2 and 4; an image has one label",
    ),
    "two labels, by two spellings": (
        lists("path,label", "x//a.jpg,0", "b.jpg,1", "./x/a.jpg,1", "d.jpg,1", "e.jpg,0"),
        [],
        r"train\.csv: '\./x/a\.jpg' stands in lines 2 and 4; an image has one label",
    ),
    "two labels, by a path and a whole path": (
        lambda root: (
            lists("path,label", "x/a.jpg,0", "b.jpg,1", f"{root}/x/a.jpg,1", "d.jpg,1", "e.jpg,0")(root),
            files(root, "x/a.jpg"),
        ),
        [],
        r"train\.csv: '/.*/x/a\.jpg' stands in lines 2 and 4; an image has one label",
    ),
    "another separator": (
        lists("path;label", *lines("{}.jpg;{}", "01110")),
        [],
        r"train\.csv: its columns are separated by ';'; of a \.csv file, by ','",
    ),
    "another encoding": (
        lambda root: (root / "train.csv").write_text("path,label\na.jpg,0\n", "utf-16"),
        [],
        r"train\.csv: the text is in UTF-16; save it as UTF-8",
    ),
    **{
        f"the label {label}": (
            lists("path,label", *lines("{}.jpg,{}", ("0", label, "1", "0", "1"))),
            [],
            rf"train\.csv, line 3: the label '{label}' is neither a class number nor a name",
        )
        for label in ("-1", "1.0", "1e-05", "NaN", "nan", "-inf")
    },
    "what pandas makes of numbers with a gap": (
        lists("path,label", *lines("{}.jpg,{}", ("0.0", "", "1.0", "1.0", "0.0"))),
        [],
        r"train\.csv, line 2: the label '0\.0' is neither .*; pandas makes floats of whole numbers .*; remove the rows",
    ),
    "what pandas makes of numbers with a gap, in objects": (
        lists('{"path": "a.jpg", "label": 1.0}', '{"path": "b.jpg", "label": null}', "", "", "", **JSON),
        [],
        r"train\.jsonl, line 1: 1\.0 is neither a class number nor a name; pandas .*write whole numbers, as by frame",
    ),
    "an array in columns": (
        lists('{"path": {"0": "a.jpg"}, "label": {"0": 1}}', "", "", "", "", **ARRAY),
        [],
        r"train\.json: no array of objects with a path and a label each; write one, as frame\.to_json\(FILE, orient=",
    ),
    "an array that is cut": (
        lists('[{"path": "a.jpg", "label": 1}', "", "", "", "", **ARRAY),
        [],
        r"train\.json: not JSON, or damaged: ",
    ),
    "an array of pairs": (
        lists('[["a.jpg", 1]]', "", "", "", "", **ARRAY),
        [],
        r"train\.json, line 1: not an object with the fields of the first one",
    ),
    "images of the same name in two folders": (
        lists(
            "id,label",
            *lines("{},{}", "01110"),
            images=[f"{folder}/{one}.jpg" for folder in ("day", "night") for one in "abcde"],
        ),
        [],
        r"train\.csv: its image 'a' is in 'day/', 'night/'; write the folder into the paths",
    ),
    "a list of a test set": (
        lambda root: (
            lists("id,label", *lines("{}.jpg,{}", "01110"), val="x")(root),
            (root / "test.csv").write_text("id\nd\n"),
        ),
        [],
        r"test\.csv: no column is known to be that of the labels; .* without labels, .* data\.val=10% holds a share of",
    ),
    "a list of another name": (
        lambda root: lists("id,label", *lines("{}.jpg,{}", "01110"), train="labels.csv", val="x")(root),
        [],
        r"'labels\.csv' in .* may be a list of its images: add data\.source=list data\.train=labels\.csv, and",
    ),
    "one number, written twice": (
        lists("path,label", *lines("{}.jpg,{}", ("7", "007", "1", "1", "7"))),
        [],
        r"train\.csv: the labels '007', '7' are one number; write it alike",
    ),
    "half a character": (
        lists('{"path": "a.jpg", "label": "\\ud800"}', *[""] * 4, **JSON),
        [],
        r"train\.jsonl, line 1: '.ud800' is neither a path nor a class name or number",
    ),
    "a NUL": (
        lists("path,label", "a.jpg,0", "b\0.jpg,1", "c.jpg,1", "d.jpg,1", "e.jpg,0"),
        [],
        r"train\.csv, line 3: 'b.x00\.jpg' is no path",
    ),
    "words with commas": (
        lists(*lines("{}.jpg,{}", "01110"), train="train.txt", val="val.txt"),
        [],
        r"train\.txt, line 1: 'a\.jpg,0' is no line PATH LABEL, with a space between them",
    ),
    "folders of Windows": (
        lists("path,label", *lines("x\\{}.jpg,{}", "01110")),
        [],
        r"train\.csv: its first image, 'x..a\.jpg', is not in .*; write / between folders",
    ),
    "no label": (
        lists("path,label", "a.jpg,0", "b.jpg,", "c.jpg,1", "d.jpg,1", "e.jpg,0"),
        [],
        r"train\.csv, line 3: an image has no label",
    ),
    "no path": (
        lists("path,label", "a.jpg,0", ",1", "c.jpg,1", "d.jpg,1", "e.jpg,0"),
        [],
        r"train\.csv, line 3: an image has no path",
    ),
    "a short line": (
        lists("path,label", "a.jpg,0", "b.jpg", "c.jpg,1", "d.jpg,1", "e.jpg,0"),
        [],
        r"train\.csv, line 3: fewer columns than the first line has",
    ),
    "another class": (
        lists("path,label", *lines("{}.jpg,{}", ("cat", "dog", "dog", "eel", "cat"))),
        [],
        r"val\.csv: the classes 'eel' are not among those of the training images",
    ),
    "another number": (
        lists("path,label", *lines("{}.jpg,{}", "01120")),
        [],
        r"val\.csv: a label is larger than 1, the largest class number that there can be",
    ),
    "a number without end": (
        lists("path,label", *lines("{}.jpg,{}", ("0", "9" * 5000, "1", "1", "0"))),
        [],
        r"train\.csv: a label is larger than 999999, the largest class number that there can be",
    ),
    "one class": (
        lists("path,label", *lines("{}.jpg,{}", ("cat",) * 5)),
        [],
        r"train\.csv: every label is 'cat'; classification needs two",
    ),
    "images elsewhere": (
        lists("path,label", *lines("x{}.jpg,{}", "01110")),
        [],
        r"train\.csv: its first image, 'xa\.jpg', is not in .*; paths are relative to that folder, or absolute",
    ),
    "empty": (lists(*[""] * 5), [], r"train\.csv: the list names no image"),
    "broken object": (
        lists('{"path": "a.jpg", "label": 1}', "{", "", "", "", **JSON),
        [],
        r"train\.jsonl, line 2: not an object with the fields of the first one",
    ),
    "several labels": (
        lists('{"path": "a.jpg", "label": [1]}', "", "", "", "", **JSON),
        [],
        r"train\.jsonl, line 1: \[1\] is neither a path nor a class name or number",
    ),
    "two lists": (
        lambda root: files(root, "train.csv", "train.jsonl"),
        [],
        r"train\.csv and train\.jsonl may both be the list of split 'train'; give the file's name",
    ),
    "no held-out list": (
        lambda root: (lists("path,label", *lines("{}.jpg,{}", "01110"))(root), (root / "val.csv").unlink()),
        [],
        r"no list of split 'val'; looked for 'val\.csv', .* 'val\.json', .*; if there is no held-out split, .*10%",
    ),
    "Kaggle, an image missing": (
        lambda root: kaggle(root, numbers=(2,), also=("._ILSVRC2012_val_00000001.JPEG",)),
        [],
        r"CLS-LOC/val: the label .*LOC_val_solution\.csv, which has 2, but .* 1 are missing, as 'ILSVRC2012_val_000000",
    ),
    "Kaggle, images too many": (
        lambda root: kaggle(root, also=("ILSVRC2012_val_00000003.JPEG", "copy.JPEG")),
        [],
        r"2 are none of them: 'ILSVRC2012_val_00000003\.JPEG', 'copy\.JPEG'",
    ),
    "Tiny ImageNet, an image missing and one too many": (
        lambda root: tiny(root, ("val_1.JPEG", "val_2.JPEG")),
        [],
        r"val/images: .* 1 are missing, as 'val_0\.JPEG' and 1 are none of them: 'val_2\.JPEG'",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_lists_that_cannot_be_used_are_refused_with_line_and_way_out(tmp_path, name):
    write, overrides, message = REFUSED[name]
    write(tmp_path)
    with pytest.raises(DataError, match=message) as refused:
        as_train(tmp_path, *overrides)
    assert cli.exit_code(refused.value) == 2
