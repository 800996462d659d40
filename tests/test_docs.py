"""What the documentation shows works: code blocks run, command lines parse, named files exist, and what is public has a
docstring."""

import ast
import importlib
import re
import shlex
import sys
from itertools import groupby
from pathlib import Path

import pytest
import timm
import torch
import torchvision
from torch import nn

from fastdeit import cli
from fastdeit.kernels import _op
from fastdeit.recipe import describe, overlays
from fastdeit.recipe import resolve as recipes
from fastdeit.run.request import Request
from fastdeit.verbs import dry_run

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "fastdeit"
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r'^```(\w*)(?: title="([^"]+)")?\n(.*?)^```$', re.MULTILINE | re.DOTALL)


def blocks(page, language):
    """(title or "", text) of each code block of a page."""
    return [(title, text) for found, title, text in BLOCK.findall(page.read_text()) if found == language]


# ---- docs/extending.md -----------------------------------------------------------------------------------------------

EXTENDING = dict(blocks(ROOT / "docs" / "extending.md", "python"))
TESTS = [title for title in EXTENDING if title.startswith("tests/")]


@pytest.fixture(scope="module")
def extended(tmp_path_factory):
    """The page's files on the disk, where Python finds them: those of fastdeit as a part of fastdeit."""
    root = tmp_path_factory.mktemp("extending")
    for title, text in EXTENDING.items():
        path = root / title
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    inside = [Path(title).with_suffix("").parts for title in EXTENDING if title.startswith("fastdeit/")]
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(root)
        for *folders, _ in inside:
            package = importlib.import_module(".".join(folders))
            patch.setattr(package, "__path__", [*package.__path__, str(root.joinpath(*folders))])
        yield root
    for name in [name for name in sys.modules if name.split(".")[0] == "mine"] + [".".join(parts) for parts in inside]:
        sys.modules.pop(name, None)
    _op.OPS.pop("squared_relu", None)


def test_the_page_has_seven_things_and_a_test_of_each():
    assert len(TESTS) == 8  # a source has two: images in classes, and with boxes
    assert all(title.endswith(".py") for title in EXTENDING)


@pytest.mark.parametrize("title", TESTS)
def test_extending(title, extended, tmp_path):
    names = {"__name__": title}
    exec(compile(EXTENDING[title], str(extended / title), "exec"), names)
    tests = [value for name, value in names.items() if name.startswith("test_")]
    assert tests
    for test in tests:
        test(*[tmp_path] * ("tmp_path" in test.__code__.co_varnames[: test.__code__.co_argcount]))


# ---- README.md -------------------------------------------------------------------------------------------------------


def test_python_blocks_of_the_readme_run(monkeypatch):
    """On a machine without a GPU, and with a shallow model of the same family."""
    create = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda name, **options: create(name, depth=1, embed_dim=96, **options))
    monkeypatch.setattr(nn.Module, "cuda", lambda module: module)
    names = {}
    found = blocks(ROOT / "README.md", "python")
    assert len(found) == 2
    for _, text in found:
        exec(text, names)
    assert type(names["model"].blocks[0]).__module__.startswith("timm")
    assert names["Encoder"](dim=16, depth=1, heads=2)(names["torch"].zeros(1, 3, 16)).shape == (1, 3, 16)


def test_files_that_the_readme_lists_exist():
    """The list is indented by folder: a line is a name, two spaces or more, and what it is."""
    text = re.search(r"^## Files\n+```\n(.*?)^```", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)[1]
    folders, missing = [], []
    for line in text.splitlines():
        entry = re.match(r"^(?P<indent> {0,6})(?P<name>[\w./]+)( {2,}\S|$)", line)
        if entry is None:
            assert line.startswith(" " * 8), f"neither a file nor a continued line: {line!r}"
            continue
        folders[len(entry["indent"]) // 2 :] = [entry["name"]]
        path = ROOT.joinpath(*folders)
        if not path.exists():
            missing.append(str(path))
    assert missing == []


# ---- docs/use.md -----------------------------------------------------------------------------------------------------

USE = dict(blocks(ROOT / "docs" / "use.md", "python"))
SMALL = {"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32, "image_size": 32}


def run_use(*titles):
    names = {}
    for title in titles:
        exec(USE[title], names)
    return names


def test_every_example_of_the_page_is_run():
    titles = ["timm", "transformers", "torchvision", "vit-pytorch", "vit-pytorch, fused", "modules", "loader"]
    assert list(USE) == titles


def test_models_of_timm_and_torchvision_as_the_page_uses_them(monkeypatch, capsys):
    """Shallow ones of the same families."""
    create = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda name, **options: create(name, depth=1, embed_dim=96, **options))
    small = torchvision.models.VisionTransformer(32, 16, 1, 2, 24, 32)
    monkeypatch.setattr(torchvision.models, "vit_b_16", lambda: small)
    assert type(run_use("timm")["model"].blocks[0]).__module__.startswith("timm")
    run_use("torchvision")
    said = capsys.readouterr().out
    assert all(f"  {op}" in said for op in ("add_layer_norm", "attention", "mlp", "query_attention"))
    assert type(small.encoder.layers[0]).__name__ == "AcceleratedEncoderBlock"


def test_the_input_in_a_loop_as_the_page_uses_it():
    names = run_use("loader")
    assert names["saved"]["step"] == len(names["loader"]) * 2
    assert names["loss"] < 3


@pytest.mark.slow
def test_models_of_transformers_as_the_page_uses_them(monkeypatch):
    """Without their weights, which are not here."""
    transformers = pytest.importorskip("transformers", minversion="5.24")
    monkeypatch.setattr(
        transformers.PreTrainedModel, "from_pretrained", classmethod(lambda cls, _: cls(cls.config_class(**SMALL)))
    )
    names = run_use("transformers")
    for name, model in (("vit", names["vit"].vit.layers), ("dinov2", names["dinov2"].encoder.layer)):
        assert type(model[0]).__name__.startswith("Accelerated"), name
        assert type(model[0].mlp).__name__.startswith("Accelerated"), name
    assert type(names["siglip"].encoder.layers[0]).__name__ == "AcceleratedSiglipEncoderLayer"


def test_another_forward_of_code_in_the_manner_of_vit_pytorch():
    names = run_use("vit-pytorch", "vit-pytorch, fused")
    sizes = {"dim": 16, "depth": 2, "heads": 2, "dim_head": 4, "hidden": 24}
    theirs, fused = names["Transformer"](**sizes).double(), names["FusedTransformer"](**sizes).double()
    fused.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 5, 16, dtype=torch.float64)
    outs = [model(x) for model in (theirs, fused)]
    torch.testing.assert_close(*outs)
    grads = [
        torch.autograd.grad(out.square().sum(), list(m.parameters()))
        for out, m in zip(outs, (theirs, fused), strict=True)
    ]
    torch.testing.assert_close(*grads)


def test_an_encoder_of_the_modules():
    encoder = run_use("modules")["Encoder"](dim=24, depth=2, heads=2, grid=(2, 3)).eval()
    patches, mask = torch.randn(2, 6, 24), torch.ones(2, 11, dtype=torch.bool)
    mask[:, 9:] = False
    out = encoder(patches, key_mask=mask)
    assert out.shape == (2, 24)
    patches[:, 4:] = 7.0  # behind the mask
    torch.testing.assert_close(encoder(patches, key_mask=mask), out)
    assert not torch.equal(encoder(patches), out)


# ---- what the site adds ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def hooks():
    """`hooks(name)` is a module of docs/hooks; they need no MkDocs, except for `pages`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "docs" / "hooks")
        yield importlib.import_module


def test_the_page_of_recipes_has_every_field_with_type_default_and_meaning(hooks):
    rows = hooks("recipes_page").page().splitlines()
    assert any(row.startswith("| `engine.keep_checkpoints` | integer ≥ 2 | `2` | Newest checkpoints k") for row in rows)
    fields = {row.split("`")[1] for row in rows if row.startswith("| `")}
    for name, section in recipes.Recipe.model_fields.items():
        if name not in ("name", "method"):
            assert {f"{name}.{field}" for field in section.annotation.model_fields} <= fields
    assert any(row.startswith("| `train.batch_size` |") and row.endswith(" | `--batch-size`, `--b` |") for row in rows)
    assert {"method.smoothing", "method.teacher.timm", "data.views.NAME.flip", "optim.nesterov"} <= fields


@pytest.mark.parametrize(
    ("schema", "words"),
    [
        ({"type": "number", "exclusiveMinimum": 0, "maximum": 1}, "number > 0 and ≤ 1"),
        ({"type": "integer", "minimum": 1, "maximum": 2**63}, "integer ≥ 1"),
        ({"anyOf": [{"enum": ["a", "b"]}, {"type": "null"}]}, "`a`, `b`, or null"),
        ({"type": "array", "minItems": 2, "maxItems": 2, "items": {"type": "number"}}, "list of 2, each: number"),
        ({"$ref": "#/$defs/Side"}, "text"),
    ],
)
def test_types_in_words(schema, words):
    assert describe.words(schema, {"Side": {"type": "string"}}) == words


@pytest.mark.slow  # `.ci/run` has the packages of the documentation for the long proofs, and not before
def test_columns_of_a_docstring_become_a_list(hooks):
    pytest.importorskip("griffe")
    text = "It makes  a tensor.\nx  remains\n\nx, y   a tensor\n       of tokens\nnoise  uniforms\n\nReturns nothing."
    columns = "- `x`, `y`: a tensor\n    of tokens\n- `noise`: uniforms"
    assert hooks("columns").with_lists(text) == f"It makes  a tensor.\nx  remains\n\n\n{columns}\n\nReturns nothing."


# ---- command lines ---------------------------------------------------------------------------------------------------


COMMANDED = [*PAGES, *(ROOT / name for name in ("SECURITY.md", "CHANGELOG.md", "benchmarks/README.md"))]
COMMANDED += sorted((ROOT / "docs").glob("*/*.md"))
IN_TEXT = re.compile(r"`(fastdeit [^`]+)`")


def calls(line):
    """The calls of fastdeit in a line of shell, as words behind the program."""
    for ends, command in groupby(shlex.split(line, comments=True), lambda word: word in ("&&", "|", ";")):
        program, *words = command
        if not ends and program == "fastdeit":
            yield words[: words.index(">")] if ">" in words else words


def command_lines():
    """By page and words every call of fastdeit: in blocks of shell, whether they say so or not, in the text, and in the
    help of verbs."""
    found = {}
    for page in COMMANDED:
        shell = [text for language in ("bash", "") for _, text in blocks(page, language)]
        lines = [line for text in shell for line in text.replace("\\\n", " ").splitlines() if re.match(r"\w", line)]
        lines += IN_TEXT.findall(BLOCK.sub("", page.read_text()))
        found |= {f"{page.name}: {' '.join(words)}": words for line in lines for words in calls(line)}
    examples = [example for verb in cli.VERBS.values() for example in verb.examples]
    return found | {f"--help: {' '.join(words)}": words for example in examples for words in calls(example)}


COMMANDS = command_lines()


def verb_of(words):
    """(verb, the words behind it): the longest that there is; (None, words) of a group of verbs."""
    name = next((name for name in (" ".join(words[:2]), words[0]) if name in cli.VERBS), None)
    return name, words if name is None else words[len(name.split()) :]


def test_commands_are_found_wherever_they_stand():
    """In blocks of bash and of no language, in tables and in sentences, below docs/, and beside it."""
    for place in (
        *("README.md: train --resume", "distillation.md: train deit_small --data DATA method.use=cosub"),
        *(
            "runs.md: submit deit_base --nproc 8",
            "parity.md: bench parity --case finetune",
            "crops.md: experiments run",
        ),
        *("CHANGELOG.md: chaos RECIPE", "--help: cache deit_small_distilled"),
    ):
        assert any(command.startswith(place) for command in COMMANDS), place


@pytest.mark.parametrize("command", COMMANDS)
def test_command_lines_are_understood(command, extended):
    """The verb and its flags. What names no more than a verb is the verb itself and not a call of it."""
    name, words = verb_of(COMMANDS[command])
    if words and name is not None:
        cli.VERBS[name].parse(words)
    else:
        assert name or words == ["--help"] or any(verb.startswith(f"{words[0]} ") for verb in cli.VERBS)


TEACHER = "timm:resnet18.a1_in1k"


def of_a_recipe():
    """(verb, parsed) of the commands that train a recipe which comes with fastdeit, cache for it, or plan it, otherwise
    than as its header says: tests/recipe/test_shipped.py has those."""
    found = {}
    for words in COMMANDS.values():
        name, behind = verb_of(words)
        if name in ("train", "cache", "plan") and len(behind) > 1:
            args = cli.VERBS[name].parse(behind)
            changed = [text for text in args.overrides if not text.startswith("data.")]
            spread = "--nproc" in words or "--nnodes" in words
            if args.words and args.words[0] in recipes.names() and (changed or args.overlays or spread):
                found[" ".join(words)] = pytest.param(name, args, id=" ".join(words))
    return found.values()


@pytest.mark.usefixtures("roomy")
@pytest.mark.parametrize(("verb", "args"), of_a_recipe())
def test_commands_of_recipes_would_run(verb, args, extended):
    """As a dry run says, with images, teachers and weights in the place of those that a reader has."""
    name = args.words[0]
    source = recipes.load(name, args.overrides).data.source
    given = [
        text
        for text in args.overrides
        if not re.match(r"data\.(root|source|val)=|model\.weights=|method\.cached=", text)
    ]
    given = [re.sub(r"\bruns/[\w@]+", TEACHER, text) for text in given]
    given += [f"data.source={'digits' if source == 'digits' else 'synthetic'}"]
    recipe = recipes.load(name, [*overlays.overrides(name, args.overlays, given), *given])
    processes = (args.nproc or 1) * (args.nnodes or 1) if verb == "train" else 1  # the others share no batch
    assert next(dry_run.lines(Request(recipe), processes)).startswith(f"recipe    {name}, ")


# ---- docstrings ------------------------------------------------------------------------------------------------------

Definition = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def undocumented(path):
    """Names of the public functions, classes and methods of a file that have no docstring."""
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, Definition):
            yield from _undocumented_in(node, path)


def _undocumented_in(node, path):
    if node.name.startswith("_"):
        return
    if ast.get_docstring(node) is None:
        yield node.name
    if isinstance(node, ast.ClassDef):
        for member in node.body:
            if isinstance(member, Definition):
                bare = _undocumented_in(member, path)
                yield from (f"{node.name}.{name}" for name in bare if not _inherits(path, node, name))


def _inherits(path, owner, name):
    """Whether a base class documents what it calls `name`, such as `forward` of `nn.Module`."""
    if not owner.bases:
        return False
    module = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    bases = getattr(importlib.import_module(module), owner.name).__mro__[1:]
    return any(vars(base)[name].__doc__ for base in bases if name in vars(base))


def test_what_is_public_has_a_docstring():
    found = {str(path.relative_to(PACKAGE)): list(undocumented(path)) for path in sorted(PACKAGE.rglob("*.py"))}
    assert {file: names for file, names in found.items() if names} == {}


WITHOUT = """
def function(): ...
def _private(): ...
@triton.jit
def kernel(): ...
class Owner:
    "A class."
    def __init__(self): ...
    def method(self): ...
    class Inner: ...
"""


def test_what_has_no_docstring_is_seen(tmp_path):
    (tmp_path / "x.py").write_text(WITHOUT)
    assert list(undocumented(tmp_path / "x.py")) == ["function", "kernel", "Owner.method", "Owner.Inner"]
