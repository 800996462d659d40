"""Whatever a verb is given, it ends in a sentence: no traceback, and exit code 2, for every verb and bad input.

The table is generated: a verb that is new, or an argument that is, is in it without anything being written here, and
fails until an argument that makes its command line whole is named below.
"""

import os

import pytest

from fastdeit import cli

NUL, LONG = "a\0b", "x" * 5000
WORDS = {
    "empty": "",
    "nothing": "nowhere",
    "nul": NUL,
    "long": LONG,
    "device": "/dev/null",
    "folder": ".",
    "dashes": "---",
}
"""In the place of a path, an address, a recipe or a name."""
OVERRIDES = [
    "=",
    "a=",
    ".=1",
    "optim=1",
    "optim.lr=",
    "optim.lr=[",
    "optim.lr=x",
    "base=digits",
    "optim.lr=1 optim.lr=2",
]
"""In the place of an override, of verbs that take a recipe."""
REQUIRED = {
    "data pack": {"path": "x", "out": "y"},
    "data show": {"--sample": "0", "--out": "x.png"},
    "data preview": {"--out": "x.png"},
    "data make": {"name": "glyphs"},
    "show attention": {"--out": "x.png"},
    "runs diff": {"a": "x", "b": "y"},
}
"""What a command line needs besides the argument that is bad, by verb."""
RIGHT = {("models", "pattern", "empty"), ("runs list", "folder", "folder")}
"""Words that are none of the bad ones to this argument."""


def positionals(verb):
    return [action for action in verb.parser._actions if not action.option_strings and action.dest != "overrides"]


def valued_flags(verb):
    return [action for action in verb.parser._actions if action.option_strings and action.nargs != 0]


def line(name, changes):
    """The words of a command line of the verb `name`, whole but for `changes`, by argument."""
    given = {**REQUIRED.get(name, {}), **changes}
    flags = [part for key, value in given.items() if key.startswith("--") for part in (key, value)]
    places = [action.dest for action in positionals(cli.VERBS[name])]
    return [*name.split(), *flags, "--", *(given[dest] for dest in places if dest in given)]


CASES = [
    pytest.param(name, action.dest, kind, id=f"{name} {action.dest} {kind}")
    for name, verb in cli.VERBS.items()
    if name != "bench report"  # its folder is made, and all its results are shown
    for action in positionals(verb)
    for kind in WORDS
    if (name, action.dest, kind) not in RIGHT
]
FLAGS = [
    pytest.param(name, action.option_strings[-1], kind, id=f"{name} {action.option_strings[-1]} {kind}")
    for name, verb in cli.VERBS.items()
    for action in valued_flags(verb)
    if action.choices or action.type is not None
    for kind in ("empty", "nul" if action.type is cli.parser.path else "nothing")
]


@pytest.fixture(autouse=True)
def empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("RANK", "SLURM_STEP_NUM_TASKS"):
        monkeypatch.delenv(name, raising=False)


def refused(capsys, argv):
    """The message of a command that is refused, in a sentence."""
    code = cli.main(argv)
    out, err = capsys.readouterr()
    assert "Traceback" not in err
    assert code == 2, (code, out[-500:], err[-500:])
    assert err.startswith("fastdeit: ")
    return err


@pytest.mark.parametrize(("name", "dest", "kind"), CASES)
def test_a_bad_word_is_refused(name, dest, kind, capsys):
    refused(capsys, line(name, {dest: WORDS[kind]}))
    assert os.listdir() == []


@pytest.mark.parametrize(("name", "flag", "kind"), FLAGS)
def test_a_bad_value_of_a_flag_is_refused(name, flag, kind, capsys):
    refused(capsys, line(name, {flag: WORDS[kind]}))


@pytest.mark.parametrize("name", [name for name, verb in cli.VERBS.items() if verb.parser.takes("words")])
@pytest.mark.parametrize("override", OVERRIDES)
def test_a_bad_override_is_refused(name, override, capsys):
    first, *others = line(name, {"words": "digits"})
    given = [*(word for word in [first, *others] if word != "--"), *override.split(" ")]
    refused(capsys, [*given, *(["--resolved"] if name == "recipes show" else [])])
    assert os.listdir() == []


@pytest.mark.parametrize("name", cli.VERBS)
def test_an_unknown_flag_is_refused(name, capsys):
    assert "has no flag --xyzzy" in refused(capsys, [*name.split(), "--xyzzy"])
