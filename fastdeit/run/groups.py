"""From a recipe and a method to the optimizer's groups: decay, the method's own factors, layer decay, matrices."""

from fastdeit.engine import optimizers
from fastdeit.engine.groups import GroupError, ParamGroup, check, check_owned, default_groups, refined
from fastdeit.errors import UsageError, naming
from fastdeit.methods.base import Method
from fastdeit.models.layers import hidden_matrices, layer_scales
from fastdeit.recipe.resolve import Recipe


def param_groups(method: Method, recipe: Recipe) -> list[ParamGroup]:
    """Optimizer groups of what asks for gradients now, validated.

    First come two groups, with and without weight decay. `Method.param_groups` changes them. Then each is split by
    layer, and `optim.layer_decay` multiplies the factors that the method gave; for Muon, matrices stand apart. What the
    method leaves out of all groups is not trained, and asks for no gradient any more.

    Raises UsageError, which names the method, for groups that make no sense.
    """
    trained = {name: p for name, p in method.named_parameters() if p.requires_grad}
    base = decay_groups(method, recipe)
    with naming(f"method {recipe.method.use}", GroupError):
        groups = refined(method.param_groups(base), _scales(method, recipe), _matrices(method, recipe))
        check_owned(groups, trained)
        check(groups)
    grouped = {name for group in groups for name in group.params}
    for name, parameter in trained.items():
        parameter.requires_grad_(name in grouped)
    return groups


def decay_groups(method: Method, recipe: Recipe) -> list[ParamGroup]:
    """Base optimizer groups of what is trained now: what the student exempts from weight decay, by its names there."""
    _, exempt = method.model.decay_groups(decay_dist_token=recipe.optim.decay_dist_token)
    return default_groups(method.named_parameters(), recipe.optim.weight_decay, {f"model.{name}" for name in exempt})


def _scales(method: Method, recipe: Recipe) -> dict[str, float]:
    """Factors of `optim.layer_decay` by the names of the method; what is not the student's is as near as its head."""
    decay = recipe.optim.layer_decay
    if decay is None:
        return {}
    with naming("optim.layer_decay", ValueError):
        return {f"model.{name}": scale for name, scale in layer_scales(method.model, decay).items()}


def _matrices(method: Method, recipe: Recipe) -> set[str]:
    """The student's hidden matrices by the names of the method, for an optimizer that treats them otherwise."""
    if not optimizers.find(recipe.optim.name).tells_matrices:
        return set()
    with naming(f"optim.name {recipe.optim.name}", ValueError):
        found = {f"model.{name}" for name in hidden_matrices(method.model)}
    if not found:
        raise UsageError(
            f"optim.name {recipe.optim.name} is for 2-D weights between embedding and head, of which the model has "
            "none; use adamw"
        )
    return found
