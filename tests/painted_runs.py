"""A small data set of painted pictures, and a run on it: what the verbs about weights are tried on."""

import numpy as np
from PIL import Image

from fastdeit.cli import main as cli

CLASSES = "blue", "green", "red"
RECIPE = """\
model: {name: deit_digits_distilled_patch8_32, image_size: [16, 32]}
method: {use: supervised}
data: {source: folder, mixup: 0, cutmix: 0, group_size: 4, repeats: 1, eval_crop_ratio: 1.0}
optim: {lr: 1e-3, warmup_epochs: 0, ema_decay: 0.5}
train: {epochs: 1, batch_size: 12}
engine: {device: cpu}
"""


def paint(root, splits=("train", "val"), names=CLASSES, each=6):
    """Folders of small pictures, each of the colour that its folder is called by."""
    generator = np.random.default_rng(0)
    for split in splits:
        for name in names:
            (root / split / name).mkdir(parents=True)
            for number in range(each):
                pixels = generator.integers(0, 90, (24, 48, 3), dtype=np.uint8)
                pixels[..., ("red", "green", "blue").index(name)] += 150
                Image.fromarray(pixels).save(root / split / name / f"{number}.png")
    return root


def refused(capsys, *argv, code=2):
    """The message of a command that ends with `code`."""
    assert cli([str(word) for word in argv]) == code
    error = capsys.readouterr().err
    assert "Traceback" not in error
    return error
