"""Parts of a model that are not trained (`model.freeze`): what the words mean, and what freezing does."""

import re
from collections.abc import Callable, Iterable, Sequence

from torch import nn

from fastdeit.models.layers import layers
from fastdeit.text import did_you_mean

_RANGE = re.compile(r"(\d+)-(\d+)")


def freeze_parts(model: nn.Module, words: Sequence[str]) -> None:
    """Freeze what `words` name: the parameters ask for no gradient, and statistics beside them stand still.

    A word is the name of a parameter or module of the model (`patch_embed`, `blocks.3.mlp`). In a name, `0-5` stands
    for these numbers and `*` for any part: `blocks.0-5`, `blocks.*.mlp`. Four words stand for themselves:

    embedding          all before the blocks: the first layer of `models.layers`
    attention          the attention of all blocks: what has a part `attn` in its name
    all_but_head       all but the heads, for a linear probe
    all_but_attention  all but attention, heads and positions: fine-tuning of attention alone (Touvron et al., "Three
                       things everyone should know about vision transformers", ECCV 2022), as DeiT's `--attn-only`

    A normalisation with running statistics (BatchNorm) whose parameters are all frozen normalises by these statistics
    and no longer changes them. Drop-path and dropout go on in frozen blocks.

    Raises ValueError, with similar names, for a word that names nothing in the model.
    """
    frozen = {name for word in words for name in _named(model, word)}
    # With the second names of tied parameters: a tensor is frozen under any of its names.
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if name in frozen:
            parameter.requires_grad_(False)
    if frozen:
        _still_statistics(model)


def _named(model: nn.Module, word: str) -> Iterable[str]:
    """Names of the parameters that a word stands for."""
    names = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    if word in _WORDS:
        return _WORDS[word](model, names)
    return _under(names, word)


def _attention(model: nn.Module, names: Sequence[str]) -> list[str]:
    found = [name for name in names if "attn" in name.split(".")]
    if not found:
        raise ValueError(f"{type(model).__name__} has no attention: no part of a parameter's name is 'attn'")
    return found


def _heads(model: nn.Module, names: Sequence[str]) -> set[str]:
    return {name for name in names if name.startswith(tuple(f"{head}." for head in model.head_names))}


def _all_but_attention(model: nn.Module, names: Sequence[str]) -> set[str]:
    return set(names) - _heads(model, names) - {*_attention(model, names), "pos_embed"}


_WORDS: dict[str, Callable[[nn.Module, Sequence[str]], Iterable[str]]] = {
    "embedding": lambda model, names: layers(model)[0],
    "attention": _attention,
    "all_but_head": lambda model, names: set(names) - _heads(model, names),
    "all_but_attention": _all_but_attention,
}


def _under(names: Sequence[str], word: str) -> list[str]:
    """Of `names` those that are or lie below what `word` names, with its ranges and stars."""
    found = list(names)
    for place, part in enumerate(word.split(".")):
        choices = list(dict.fromkeys(name.split(".")[place] for name in found if name.count(".") >= place))
        fits = _fitting(part, choices)
        if not fits:
            inside = ".".join(word.split(".")[:place])
            raise ValueError(f"{word!r}: {inside or 'the model'} has no {part!r}{_hint(part, choices, not inside)}")
        found = [name for name in found if name.count(".") >= place and name.split(".")[place] in fits]
    return found


def _fitting(part: str, choices: Sequence[str]) -> set[str]:
    """Which of `choices` a part of a word stands for; none where a range names a number that is not among them."""
    if part == "*":
        return set(choices)
    wanted = {part}
    if limits := _RANGE.fullmatch(part):
        first, last = map(int, limits.groups())
        # No range is longer than the numbers there are; a longer one fits nothing, and costs nothing.
        wanted = {str(number) for number in range(first, min(last, first + len(choices)) + 1)}
    return wanted if wanted <= set(choices) else set()


def _hint(part: str, choices: Sequence[str], first: bool) -> str:
    """What to say of a part of a word that fits none of `choices`; `first`: it is the first part of the word."""
    if not choices:
        return ""
    if all(choice.isdigit() for choice in choices):
        return f"; there are {choices[0]} to {choices[-1]}"
    return did_you_mean(part, [*choices, *_WORDS] if first else choices) or f"; there are {', '.join(choices)}"


class _StandsStill:
    """Beside a normalisation's class: it is always in eval mode, so its running statistics are used and not changed."""

    def train(self, mode: bool = True) -> nn.Module:
        return super().train(False)


def _still_statistics(model: nn.Module) -> None:
    """Running statistics stand still where the parameters of their module, or else those beside it, are all frozen."""
    for name, module in model.named_modules():
        if getattr(module, "running_mean", None) is None or isinstance(module, _StandsStill):
            continue
        parameters = list(module.parameters()) or list(model.get_submodule(name.rpartition(".")[0]).parameters())
        if parameters and not any(p.requires_grad for p in parameters):
            kind = type(module)
            module.__class__ = type(kind.__name__, (_StandsStill, kind), {})
            module.eval()
