"""The JSON schema of a recipe, for editors that complete and check TOML (Even Better TOML, Taplo)."""

from __future__ import annotations

from typing import Any

from thence.recipe.schema import KINDS, Recipe

DRAFT = "https://json-schema.org/draft/2020-12/schema"


def recipe_schema() -> dict[str, Any]:
    """The schema of a recipe's file: its fields with their types, bounds, defaults and meaning.

    The table of a kind of stage, such as ``[rl]``, and that of a single stage, such as ``[rl-second]``, have the same
    fields, none of which must be set. What only a run can know (whether files are there, which options a method has,
    what fields go together) is not in it: ``thence run RECIPE --dry-run`` says that.
    """
    schema = Recipe.model_json_schema()
    definitions = schema.setdefault("$defs", {})
    for kind, section in KINDS.items():
        made = section.model_json_schema(ref_template="#/$defs/{model}")
        definitions |= made.pop("$defs", {})
        made.pop("required", None)  # a table may set one field and leave the others to [kind] or their defaults
        definitions[section.__name__] = made
        schema["properties"][kind] = {"$ref": f"#/$defs/{section.__name__}"}
    del schema["properties"]["tables"]
    schema["patternProperties"] = {
        f"^{kind}-.+$": {"$ref": f"#/$defs/{section.__name__}"} for kind, section in KINDS.items()
    }
    return {"$schema": DRAFT, **schema, "title": "A recipe of thence"}
