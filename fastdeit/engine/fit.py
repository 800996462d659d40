"""Whether tensors by name are those that are asked for: the same names, shapes and dtypes.

`copy_` alone would broadcast a moment `[4]` into one `[6, 4]`, and round float64 to float32, without a word.
"""

from collections.abc import Callable, Mapping

from torch import Tensor


class FitError(ValueError):
    """The tensors are not those that are asked for; the message names the first and both sides."""


def check_fit(file: str, theirs: Mapping[str, Tensor], ours: Mapping[str, Tensor]) -> None:
    """Raise FitError unless `theirs`, of the `file` of a checkpoint, have the names, shapes and dtypes of `ours`."""
    for name in dict.fromkeys([*ours, *theirs]):
        for what, of in _FACTS.items():
            found, asked = (of(group[name]) if name in group else None for group in (theirs, ours))
            if found != asked:
                there, here = (
                    "there is none" if fact is None else f"it has the {what} {fact}" for fact in (found, asked)
                )
                raise FitError(f"of {file}, {name}: in the checkpoint {there}, here {here}")


_FACTS: dict[str, Callable[[Tensor], str]] = {
    "shape": lambda tensor: str(list(tensor.shape)),
    "dtype": lambda tensor: str(tensor.dtype).removeprefix("torch."),
}
