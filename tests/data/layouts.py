"""What the tests of layouts share: files of a few bytes, and how `fastdeit train` opens what lies there."""

from fastdeit.recipe import resolve as recipes
from fastdeit.run import build
from fastdeit.verbs import data as data_verbs

NUMBERS = (["0", "1", "1"], ["1", "0"])
NAMES = (["cat", "dog", "dog"], ["dog", "cat"])
"""Labels of three training and two held-out samples."""


def files(root, *names):
    """Files with their own names in them."""
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(name.encode())


def as_train(root, *overrides):
    """(training, held-out) samples as `fastdeit train deit_tiny --data root` opens them."""
    words = [*overrides, f"data.root={root}"]
    words += data_verbs.implied("deit_tiny", words, str(root))
    return build.sources(recipes.load("deit_tiny", words))


def labels(source):
    """The class name of each sample."""
    return [source.classes[source.label(i)] for i in range(len(source))]


def folders(root, *splits):
    """Two files in each of two classes of every split."""
    files(root, *(f"{split}/{name}/{i}.jpg" for split in splits for name in ("cat", "dog") for i in (1, 2)))
