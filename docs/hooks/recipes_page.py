"""The page "Recipes": those that are shipped, and every field with its type, default and meaning, and its names in the
training scripts of timm and DeiT."""

from collections.abc import Iterator

from fastdeit.recipe import describe, flags
from fastdeit.recipe import resolve as recipe

INTRODUCTION = """\
# Recipes and their fields

A recipe is a YAML file that says everything about a run. `fastdeit recipes show NAME` prints one that is shipped, and
`fastdeit explain data.crop` what this page says of a field. A field is set in the file, or for one run on the command
line:

```bash
fastdeit train deit_tiny optim.lr=5e-4 data.flip=0 --data /path/to/imagenet
```

A recipe may start from another one: `base: NAME` at its top takes over the other's fields.

## Shipped recipes

| name | what it trains |
|---|---|
"""


def page() -> str:
    """The page, in Markdown."""
    shipped = (f"| `{name}` | {summary} |" for name, summary in recipe.summaries())
    return "\n".join([INTRODUCTION.rstrip("\n"), *shipped, *_sections()])


def _sections() -> Iterator[str]:
    for section in describe.SECTIONS:
        for table in describe.tables(section):
            yield f"\n## {section}{f', with `{table.choice}`' if table.choice else ''}\n"
            yield f"{table.meaning}\n"
            yield "| field | type | default | meaning | timm, DeiT |\n|---|---|---|---|---|"
            for field in table.fields:
                cells = f"`{field.path}`", field.type, field.default, field.meaning, _elsewhere(field.path)
                yield "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _elsewhere(path: str) -> str:
    """Flags of timm and DeiT for the field."""
    names = dict.fromkeys(name for flag in flags.FLAGS if flag.ours == path for name in (*flag.timm, *flag.deit))
    return ", ".join(f"`--{name}`" for name in names)
