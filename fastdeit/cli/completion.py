"""`fastdeit completion`: what a shell needs to complete verbs, flags, their values, and names of recipes."""

import argparse
from collections.abc import Callable, Mapping
from pathlib import Path

from fastdeit.cli.parser import Verb

_RECIPES = Path(__file__).parents[1] / "recipes"

# COMP_WORDS and COMP_CWORD are bash's: the words of the line, and the number of the one that is completed.
_BASH = """\
_fastdeit() {{
    local current="${{COMP_WORDS[COMP_CWORD]}}" previous="${{COMP_WORDS[COMP_CWORD-1]}}" words=""
    local verb="${{COMP_WORDS[1]}}"
    case "$verb ${{COMP_WORDS[2]}}" in
{families}
    esac
    if [ "$COMP_CWORD" -eq 1 ]; then
        words="{first}"
    else
        case "$verb $previous" in
{values}
        *)
            case "$verb" in
{verbs}
            esac
            [ "$COMP_CWORD" -eq 2 ] && case "${{COMP_WORDS[1]}}" in
{second}
            esac ;;
        esac
    fi
    COMPREPLY=($(compgen -W "$words" -- "$current"))
}}
complete -o default -F _fastdeit fastdeit
"""
_ZSH = "autoload -U +X bashcompinit && bashcompinit\n"  # zsh runs bash's form


def verb(verbs: Callable[[], Mapping[str, Verb]]) -> Verb:
    """The verb; `verbs` gives all there are, this one included, by name."""

    def run(args: argparse.Namespace, argv: list[str]) -> None:
        print(script(args.shell, verbs()), end="")

    made = Verb(
        "completion",
        "print what bash or zsh needs to complete command lines",
        "bash|zsh",
        run,
        examples=[
            "fastdeit completion bash > ~/.local/share/bash-completion/completions/fastdeit",
            "fastdeit completion zsh > ~/.fastdeit.zsh  # and in ~/.zshrc: source ~/.fastdeit.zsh",
        ],
    )
    made.parser.add_argument("shell", choices=("bash", "zsh"), help="for which shell")
    return made


def script(shell: str, known: Mapping[str, Verb]) -> str:
    """The script for `shell`, bash or zsh, that completes the verbs `known`."""
    families: dict[str, list[str]] = {}
    for name in known:
        first, _, second = name.partition(" ")
        families.setdefault(first, []).extend([second] if second else [])
    recipes = sorted(path.stem for path in _RECIPES.glob("*.yaml"))
    verbs, values = [], []
    for name, verb in known.items():
        takes_a_recipe = verb.parser.takes("words") and name != "eval"
        verbs.append(_case(name, [*verb.parser.flags, *(recipes if takes_a_recipe else [])], 12))
        for action in verb.parser._actions:
            if action.choices:
                for flag in action.option_strings or [name.split()[-1]]:
                    values.append(_case(f"{name} {flag}", [*map(str, action.choices)], 8))
    text = _BASH.format(
        families="\n".join(f'    "{name}") verb="{name}" ;;' for name in known if " " in name),
        first=" ".join([*families, "--help", "--version"]),
        values="\n".join(values),
        verbs="\n".join(verbs),
        second="\n".join(_case(first, seconds, 12, add=True) for first, seconds in families.items() if seconds),
    )
    return (_ZSH if shell == "zsh" else "") + text


def _case(pattern: str, words: list[str], indent: int, add: bool = False) -> str:
    before = "$words " if add else ""
    return f'{" " * indent}"{pattern}") words="{before}{" ".join(words)}" ;;'
