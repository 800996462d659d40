"""`fastdeit data make`: on small packages that are laid out as the real ones."""

import errno
import gzip
import json
import os
from dataclasses import replace
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from PIL import Image, features

from fastdeit import cli
from fastdeit.data.sources.datasets import open_pair
from fastdeit.errors import UsageError
from fastdeit.recipe import resolve as recipes
from fastdeit.verbs.make import cliparts, emoji, glyphs, packages
from fastdeit.verbs.make.names import SETS
from fastdeit.verbs.make.typefaces import HELD_OUT, TRAINED

FONTS = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
TYPEFACES = {"sans": "DejaVuSans.ttf", "serif": "DejaVuSerif.ttf", "mono": "DejaVuSansMono.ttf"}
EMOJI = [  # file, category; the flag has a variant in another skin colour, which no flag has
    ("1f600.png", "Smileys & Emotion"),
    ("1f1e6.png", "Flags"),
    ("1f3fb.png", "Component"),
]
CLIPS = "animals", "food", "signs_and_symbols/flags", "people", "tools", "transportation"


def npm(root, name, version):
    """The folder of a package that npm has installed below `root`."""
    folder = root / "node_modules" / name
    folder.mkdir(parents=True)
    (folder / "package.json").write_text(json.dumps({"name": name, "version": version}))
    (folder / "LICENSE").write_text(f"licence of {name}\n")
    return folder


def picture(path, color, size=(8, 8)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGBA", size, color).save(path)


def lay_glyphs(root, version="5.3.0"):
    for typeface, file in TYPEFACES.items():
        folder = npm(root, f"@fontsource/{typeface}", version) / "files"
        folder.mkdir()
        (folder / f"{typeface}-latin-400-normal.woff").symlink_to(FONTS / file)


def lay_emoji(root, version="16.0.0"):
    for style, color in (("google", "red"), ("twitter", "blue")):
        folder = npm(root, f"emoji-datasource-{style}", version)
        entries = [
            {"image": file, "category": category, f"has_img_{style}": True, "skin_variations": {}}
            for file, category in EMOJI
        ]
        entries[1]["skin_variations"] = {
            "1F3FB": {"image": "1f1e6-1f3fb.png", f"has_img_{style}": True},
            "1F3FC": {"image": "1f1e6-1f3fc.png", f"has_img_{style}": False},
        }
        (folder / "emoji.json").write_text(json.dumps(entries))
        for file in [*(file for file, _ in EMOJI), "1f1e6-1f3fb.png"]:
            picture(folder / "img" / style / "64" / file, color)


def lay_cliparts(root, version="1:0.18+dfsg-19"):
    for folder in CLIPS:
        for name in ("one_01", "under/two", "held"):
            picture(root / "usr/share/openclipart/png" / folder / f"{name}.png", "green", (8, 4))
    doc = root / "usr/share/doc/openclipart-png"
    doc.mkdir(parents=True)
    (doc / "copyright").write_text("public domain\n")
    with gzip.open(doc / "changelog.Debian.gz", "wt") as file:
        file.write(f"openclipart ({version}) unstable; urgency=medium\n")


LAY = {"glyphs": lay_glyphs, "emoji": lay_emoji, "cliparts": lay_cliparts}
every = pytest.mark.parametrize("name", SETS)
# What `small` replaces, as it is shipped.
SHIPPED = {"glyphs": glyphs.SET, "emoji": emoji.SET, "cliparts": cliparts.SET}
side_of_clip = cliparts._split


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """The sets as the small packages give them: a few pictures each."""
    emojis = {"flags": 2, "smileys_and_emotion": 1}
    clips = [folder.rpartition("/")[2] for folder in CLIPS]
    counts = {"train": dict.fromkeys(clips, 2), "val": dict.fromkeys(clips, 1)}
    monkeypatch.setattr(glyphs, "SET", glyphs.made(("sans", "serif"), ("mono",)))
    monkeypatch.setattr(emoji, "SET", replace(emoji.SET, expected={"train": emojis, "val": emojis}))
    monkeypatch.setattr(cliparts, "SET", replace(cliparts.SET, expected=counts))
    monkeypatch.setattr(cliparts, "_split", lambda stem: "val" if stem == "held" else "train")


@pytest.fixture
def run(capsys):
    """run(code, *words) is (stdout, stderr without progress) of `fastdeit data make`, which ends with `code`."""

    def run(code, *words):
        assert cli.main(["data", "make", *map(str, words)]) == code
        out, err = capsys.readouterr()
        return out, "".join(line for line in err.splitlines(keepends=True) if not line.startswith("making "))

    return run


def files(root):
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


# ---- what is made ----------------------------------------------------------------------------------------------------


@every
def test_a_set_is_an_image_folder_with_its_licence_and_origin(name, run, tmp_path):
    LAY[name](tmp_path / "packages")
    out, err = run(0, name, "--from", tmp_path / "packages", "--out", tmp_path / "sets" / "made")
    made = files(tmp_path / "sets" / "made")
    train, val = open_pair("folder", tmp_path / "sets" / "made", "train", "val")
    assert err == ""
    assert f"made/train: {len(train)} pictures" in out
    assert f"made/val: {len(val)} pictures" in out
    assert out.endswith(f"next: fastdeit train {name} --data {tmp_path}/sets/made\n")
    readme = made.pop("README.md").decode()
    digest = next(line.split()[-1] for line in out.splitlines() if line.startswith("SHA-256"))
    assert digest in readme
    assert "differs" not in readme.lower()
    assert made.pop("LICENCE")
    assert len(made) == len(train) + len(val)
    assert os.listdir(tmp_path / "sets") == ["made"]
    assert (tmp_path / "sets" / "made").stat().st_mode & 0o777 == 0o755


@every
def test_the_same_packages_give_the_same_bytes(name, run, tmp_path):
    for copy in "ab":  # written in another order, and at another time
        LAY[name](tmp_path / copy)
        run(0, name, "--from", tmp_path / copy, "--out", tmp_path / f"made {copy}")
    made = files(tmp_path / "made a")
    assert len(made) > 5
    assert made == files(tmp_path / "made b")


def test_glyphs_keep_size_and_line(run, tmp_path):
    """What tells c from C, and an apostrophe from a comma, is size and place."""
    lay_glyphs(tmp_path)
    run(0, "glyphs", "--from", tmp_path, "--out", tmp_path / "made")
    assert len(list((tmp_path / "made" / "train").iterdir())) == 62

    def rows(label):
        ink = np.asarray(Image.open(tmp_path / "made" / "train" / label / "sans.png")) < 128
        assert ink.shape == (32, 32)
        return np.flatnonzero(ink.any(axis=1))

    upper, lower, hanging = rows("upper_C"), rows("lower_c"), rows("lower_p")
    assert lower[0] > upper[0] + 2
    assert abs(lower[-1] - upper[-1]) <= 1
    assert hanging[-1] > upper[-1] + 2
    licence = (tmp_path / "made" / "LICENCE").read_text()
    assert [licence.count(f"licence of @fontsource/{typeface}\n") for typeface in TYPEFACES] == [1, 1, 1]


def test_emoji_are_of_one_style_in_each_split(run, tmp_path):
    lay_emoji(tmp_path)
    picture(tmp_path / "node_modules/emoji-datasource-google/img/google/64/1f600.png", (0, 0, 0, 0))
    run(0, "emoji", "--from", tmp_path / "node_modules", "--out", tmp_path / "made")
    made = tmp_path / "made"
    names = ["flags/1f1e6", "flags/1f1e6-1f3fb", "smileys_and_emotion/1f600"]
    for split in ("train", "val"):
        assert sorted(str(p.relative_to(made / split).with_suffix("")) for p in (made / split).rglob("*.png")) == names
    assert Image.open(made / "train/flags/1f1e6.png").getpixel((5, 5)) == (255, 0, 0)
    assert Image.open(made / "val/flags/1f1e6.png").getpixel((5, 5)) == (0, 0, 255)
    assert Image.open(made / "train/smileys_and_emotion/1f600.png").getpixel((5, 5)) == (255, 255, 255)


def test_cliparts_leave_out_links_and_the_largest(run, tmp_path, monkeypatch):
    lay_cliparts(tmp_path)
    clips = tmp_path / "usr/share/openclipart/png"
    (clips / "food" / "three.png").symlink_to(clips / "animals" / "one_01.png")
    picture(clips / "food" / "poster.png", "black", (20, 20))
    sheet = Image.new("RGBA", (16, 16))  # half transparent, half white, but for 2 x 1 pixels
    sheet.paste("white", (0, 0, 16, 8))
    sheet.paste("red", (7, 7, 9, 8))
    sheet.save(clips / "people" / "one_01.png")
    monkeypatch.setattr(cliparts, "_LARGEST", 399)
    run(0, "cliparts", "--from", tmp_path, "--out", tmp_path / "made")
    made = sorted(str(path.relative_to(tmp_path / "made")) for path in (tmp_path / "made").rglob("*.png"))
    food = ["train/food/one_01.png", "train/food/under-two.png", "val/food/held.png"]
    assert [path for path in made if "food" in path] == food
    wide = np.asarray(Image.open(tmp_path / "made" / "train" / "food" / "one_01.png"))
    assert wide.shape == (64, 64, 3)
    assert [tuple(wide[row, 32]) for row in (10, 32, 53)] == [(255, 255, 255), (0, 128, 0), (255, 255, 255)]
    trimmed = np.asarray(Image.open(tmp_path / "made" / "train" / "people" / "one_01.png"))
    assert [tuple(trimmed[row, 2]) for row in (10, 32, 53)] == [(255, 255, 255), (255, 0, 0), (255, 255, 255)]
    assert (tmp_path / "made" / "LICENCE").read_text() == "public domain\n"


def test_drawings_of_a_series_are_on_one_side():
    for stem in ("car", "bunny_simon", "arrow-left"):
        assert len({side_of_clip(f"{stem}{end}") for end in ("", "_01", "_02", "-3", "2", "_01r", "_.")}) == 1
    sides = [side_of_clip(f"drawing {'abcdefghij'[i // 20]} {'klmnopqrstuvwxyz'[i % 16]}") for i in range(200)]
    assert 0.1 < sides.count("val") / len(sides) < 0.3


# ---- packages that are missing, other, or damaged --------------------------------------------------------------------


@every
def test_a_missing_package_is_named_with_the_command_that_gets_it(name, run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    out, err = run(2, name, "--from", tmp_path, "--out", tmp_path / "made")
    assert (out, err.count("\n")) == ("", 1)
    assert "--from FOLDER" in err
    if name == "cliparts":
        assert "apt-get install openclipart-png; or apt-get download openclipart-png && dpkg-deb -x " in err
        assert run(0, name, "--packages")[0] == "openclipart-png=1:0.18+dfsg-19\n"
        return
    assert f"fastdeit data make {name} --packages | xargs npm install --no-save --prefix FOLDER" in err
    listed = run(0, name, "--packages")[0].splitlines()
    first = "@fontsource/mono@5.3.0" if name == "glyphs" else "emoji-datasource-google@16.0.0"
    assert listed[0] == first
    assert len(listed) == (3 if name == "glyphs" else 2)
    # One that is there is not asked for; and the current folder is where npm installs.
    npm(tmp_path, first.rpartition("@")[0], "1")
    err = run(2, name, "--out", tmp_path / "made")[1]
    assert first.rpartition("@")[0] not in err
    assert os.listdir(tmp_path) == ["node_modules"]


@every
def test_another_version_is_made_and_told(name, run, tmp_path):
    LAY[name](tmp_path / "packages", "7.7")
    gone = {
        "glyphs": None,
        "emoji": tmp_path / "packages/node_modules/emoji-datasource-twitter/emoji.json",
        "cliparts": tmp_path / "packages/usr/share/openclipart/png/tools/one_01.png",
    }[name]
    if name == "emoji":
        gone.write_text(json.dumps([entry for entry in json.loads(gone.read_text()) if entry["category"] != "Flags"]))
    elif gone:
        gone.unlink()
    out, err = run(0, name, "--from", tmp_path / "packages", "--out", tmp_path / "made")
    assert err == ""
    readme = (tmp_path / "made" / "README.md").read_text()
    version, count = {
        "glyphs": ("@fontsource/mono has version 7.7, expected is 5.3.0", None),
        "emoji": (
            "emoji-datasource-google has version 7.7, expected is 16.0.0",
            "val/flags has 0 pictures, expected are 2",
        ),
        "cliparts": (
            "openclipart-png has version 7.7, expected is 1:0.18+dfsg-19",
            "train/tools has 1 pictures, expected are 2",
        ),
    }[name]
    assert f"this is not the set as documented: {version}" in out
    assert f"* Differs from the set as documented: {version}." in readme
    assert count is None or f"* Differs from the set as documented: {count}." in readme


def test_the_version_of_an_installed_package_is_dpkg_s(run, tmp_path):
    lay_cliparts(tmp_path, "old")
    status = tmp_path / "var/lib/dpkg/status"
    status.parent.mkdir(parents=True)
    entry = "Package: openclipart-png\nStatus: {}\nDescription: x\n more: y\nVersion: 1:0.18+dfsg-19\n"
    for state, told in (("install ok installed", False), ("deinstall ok config-files", True)):
        status.write_text("Package: other\nStatus: install ok installed\nVersion: 3\n\n" + entry.format(state))
        out = run(0, "cliparts", "--from", tmp_path, "--out", tmp_path / state)[0]
        assert ("has version old" in out) == told


def _cut(path):
    data = path.read_bytes()
    path.unlink()  # it may be a link
    path.write_bytes(data[: len(data) // 2])


def _no_text(path):
    path.write_text("[1, 2]")


NODE, CLIP = "node_modules", "usr/share/openclipart/png"
DAMAGE = [
    ("glyphs", f"{NODE}/@fontsource/serif/files/serif-latin-400-normal.woff", _cut, "cannot be drawn"),
    ("glyphs", f"{NODE}/@fontsource/serif/files/serif-latin-400-normal.woff", Path.unlink, "cannot be drawn"),
    ("glyphs", f"{NODE}/@fontsource/mono/LICENSE", Path.unlink, "licence"),
    ("emoji", f"{NODE}/emoji-datasource-twitter/img/twitter/64/1f600.png", _cut, "cannot be read"),
    ("emoji", f"{NODE}/emoji-datasource-twitter/img/twitter/64/1f600.png", Path.unlink, "cannot be read"),
    ("emoji", f"{NODE}/emoji-datasource-google/emoji.json", _cut, "list of emoji"),
    ("emoji", f"{NODE}/emoji-datasource-google/emoji.json", _no_text, "list of emoji"),
    ("cliparts", f"{CLIP}/tools/one_01.png", _cut, "cannot be read"),
    ("cliparts", f"{CLIP}/tools/one_01.png", _no_text, "cannot be read"),
]


@pytest.mark.parametrize(("name", "file", "damage", "said"), DAMAGE)
def test_a_damaged_package_is_named_and_nothing_is_left(name, file, damage, said, run, tmp_path):
    LAY[name](tmp_path / "packages")
    damage(tmp_path / "packages" / file)
    out, err = run(2, name, "--from", tmp_path / "packages", "--out", tmp_path / "sets" / "made")
    assert (out, err.count("\n")) == ("", 1)
    assert str(tmp_path / "packages" / file) in err
    assert said in err
    assert os.listdir(tmp_path / "sets") == []


def test_pictures_that_are_missing_from_the_expected_version_are_counted(run, tmp_path):
    lay_cliparts(tmp_path / "packages")
    for path in (tmp_path / "packages" / CLIP / "tools").rglob("*.png"):
        path.unlink()
    err = run(2, "cliparts", "--from", tmp_path / "packages", "--out", tmp_path / "sets" / "made")[1]
    assert "train/tools has 0 pictures, expected are 2, val/tools has 0 pictures, expected are 1" in err
    assert os.listdir(tmp_path / "sets") == []


# ---- other bad input -------------------------------------------------------------------------------------------------


def test_an_existing_folder_is_left_alone(run, tmp_path):
    lay_emoji(tmp_path)
    (tmp_path / "made").mkdir()
    (tmp_path / "dangling").symlink_to("nowhere")
    for there in ("made", "dangling"):
        assert "already there" in run(2, "emoji", "--from", tmp_path, "--out", tmp_path / there)[1]
    assert os.listdir(tmp_path / "made") == []


def test_a_full_disk_ends_in_a_sentence_and_leaves_nothing(run, tmp_path, monkeypatch):
    lay_emoji(tmp_path / "packages")
    save = Image.Image.save

    def full(image, path, *args):
        if "1f600" in str(path):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        save(image, path, *args)

    monkeypatch.setattr(Image.Image, "save", full)
    out, err = run(1, "emoji", "--from", tmp_path / "packages", "--out", tmp_path / "sets" / "made")
    assert (out, err.count("\n")) == ("", 1)
    assert f"{tmp_path}/sets/made: the set cannot be written there: No space left on device" in err
    assert os.listdir(tmp_path / "sets") == []


def test_words_that_name_no_set_or_folder(run, tmp_path):
    assert "did you mean emoji?" in run(2, "emojis", "--out", tmp_path / "made")[1]
    assert "glyphs, emoji, cliparts" in run(2, "digits", "--out", tmp_path / "made")[1]
    assert "fastdeit data make emoji --out DIR" in run(2, "emoji")[1]
    assert "no such folder" in run(2, "emoji", "--from", tmp_path / "none", "--out", tmp_path / "made")[1]
    lay_emoji(tmp_path)
    (tmp_path / "file").touch()
    err = run(1, "emoji", "--from", tmp_path, "--out", tmp_path / "file" / "made")[1]
    assert "cannot be written there" in err


# ---- the sets as they are shipped ------------------------------------------------------------------------------------

# SHA-256 of names and pixels; glyphs as FreeType 2.14.3 draws them.
FINGERPRINTS = {
    "glyphs": "dfed13247cc08115094da7b5658a87bca9fe8982debac1d0b3ccacc370da7d49",
    "emoji": "b21a7aa1dac5547c51dd961b55f7f9fb6b8a089eb44d68326f147ff296c63b3e",
    "cliparts": "5f9149baf180693eae2bcaa9a837b6d3f7f4a0561ce3c80ae83a25aa5895cca5",
}


@every
def test_a_set_has_a_line_of_help_and_a_recipe(name):
    size = SHIPPED[name].size // (2 if name == "emoji" else 1)
    assert f"{size:,} pictures" in SETS[name]
    recipe = recipes.load(name)
    assert recipe.about.command == f"fastdeit train {name} --data {name}"
    assert recipe.data.source == "folder"


def test_typefaces_are_on_one_side_with_their_siblings():
    assert (len(TRAINED), len(HELD_OUT)) == (200, 40)
    families = [{typeface.partition("-")[0] for typeface in typefaces} for typefaces in (TRAINED, HELD_OUT)]
    assert not families[0] & families[1]
    assert len({*TRAINED, *HELD_OUT}) == 240


@pytest.mark.slow
@every
def test_the_real_packages_give_the_documented_sets(name, run, tmp_path, monkeypatch):
    """FASTDEIT_TEST_PACKAGES is a folder for `--from` that has all of them."""
    monkeypatch.undo()  # what `small` has done
    root = os.environ.get("FASTDEIT_TEST_PACKAGES")
    try:
        packages.find(name, SHIPPED[name].packages, Path(root) if root else None)
    except UsageError as missing:
        pytest.skip(str(missing))
    out = run(0, name, *(["--from", root] if root else []), "--out", tmp_path / "made")[0]
    assert "not the set as documented" not in out
    assert (name == "glyphs" and features.version("freetype2") != "2.14.3") or FINGERPRINTS[name] in out
