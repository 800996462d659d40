"""The page "Recipes": those that are shipped, and every field with its type, default and meaning, and its names in the
training scripts of timm and DeiT."""

from collections.abc import Iterator

from fastdeit.recipe import describe, flags, overlays
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


OVERLAYS = """
## Settings that go together

`--as NAME` lays several settings over a recipe at once. `fastdeit train`, `cache`, `plan` and `recipes show --resolved`
take it, and it may be repeated. The command line's own overrides win. Training prints each field that an overlay
changes, and why.

| `--as` | what it is | what it sets |
|---|---|---|
"""


def page() -> str:
    """The page, in Markdown."""
    shipped = (f"| `{name}` | {summary} |" for name, summary in recipe.summaries())
    laid_over = (
        f"| `{name}` | {overlay.meaning} | {_settings(overlay)} |" for name, overlay in overlays.OVERLAYS.items()
    )
    return "\n".join([INTRODUCTION.rstrip("\n"), *shipped, OVERLAYS.rstrip("\n"), *laid_over, *_sections()])


def _settings(overlay: overlays.Overlay) -> str:
    return ", ".join(f"`{setting.field}={setting.value}`" for setting in overlay.settings)


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
