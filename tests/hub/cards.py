"""Read the YAML block at the top of a README, and validate it as the Hub does on upload."""

from __future__ import annotations

import re
from typing import Any

import yaml

_LICENSES = """
    afl-3.0 agpl-3.0 apache-2.0 apple-amlr apple-ascl artistic-2.0 bigcode-openrail-m
    bigscience-bloom-rail-1.0 bigscience-openrail-m bsd bsd-2-clause bsd-3-clause
    bsd-3-clause-clear bsl-1.0 c-uda cc cc-by-2.0 cc-by-2.5 cc-by-3.0 cc-by-4.0 cc-by-nc-2.0
    cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nc-nd-3.0 cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 cc-by-nc-sa-3.0
    cc-by-nc-sa-4.0 cc-by-nd-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc0-1.0 cdla-permissive-1.0
    cdla-permissive-2.0 cdla-sharing-1.0 creativeml-openrail-m deepfloyd-if-license ecl-2.0 epl-1.0
    epl-2.0 etalab-2.0 eupl-1.1 eupl-1.2 fair-noncommercial-research-license gemma gfdl gpl gpl-2.0
    gpl-3.0 grok2-community h-research intel-research isc lgpl lgpl-2.1 lgpl-3.0 lgpl-lr llama2
    llama3 llama3.1 llama3.2 llama3.3 llama4 lppl-1.3c mit mpl-2.0 ms-pl ncsa odbl odc-by ofl-1.1
    openmdw-1.0 openrail openrail++ osl-3.0 other pddl postgresql unknown unlicense wtfpl zlib
    """
LICENSES = frozenset(_LICENSES.split())
TEXT_FIELDS = ("library_name", "pipeline_tag", "pretty_name", "license_name", "license_link", "sdk")
SPACE_COLORS = ("red", "yellow", "green", "blue", "indigo", "purple", "pink", "gray")
LIST_FIELDS = ("tags", "datasets", "language", "metrics", "base_model", "task_categories")


def front_matter(readme: str) -> str | None:
    """Return the text between the two `---` lines at the top, or None."""
    match = re.match(r"\s*---[ \t]*\r?\n(.*?)(?:^|\n)---[ \t]*(?:\r?\n|$)", readme, re.S)
    return match[1] if match else None


def metadata(readme: str) -> dict[str, Any]:
    """Return the parsed block, empty if it is absent or invalid."""
    try:
        value = yaml.safe_load(front_matter(readme) or "")
    except yaml.YAMLError:
        return {}
    return value if isinstance(value, dict) else {}


def validate(readme: str) -> tuple[list[str], list[str]]:
    """Return the errors and warnings of a README."""
    block = front_matter(readme)
    if not (block or "").strip():
        return [], ["empty or missing yaml metadata in repo card"]
    try:
        value = yaml.safe_load(block or "")
    except yaml.YAMLError as error:
        return [f"YAML metadata cannot be parsed: {error}"], []
    if not isinstance(value, dict):
        return ["YAML metadata is not a mapping"], []
    errors = [
        f'"{name}" must be a string'
        for name in TEXT_FIELDS
        if name in value and not isinstance(value[name], str)
    ]
    for name in LIST_FIELDS:
        items = value.get(name, [])
        items = [items] if isinstance(items, str) else items
        if not isinstance(items, list) or not all(isinstance(item, str) for item in items):
            errors.append(f'"{name}" must be a string or a list of strings')
    licenses = value.get("license", [])
    for name in [licenses] if not isinstance(licenses, list) else licenses:
        if name not in LICENSES:
            errors.append(f'"license" must be one of the known licenses, not {name!r}')
    for name in ("colorFrom", "colorTo"):  # of a Space
        if value.get(name, "gray") not in SPACE_COLORS:
            errors.append(f'"{name}" must be one of {", ".join(SPACE_COLORS)}')
    if not isinstance(value.get("model-index", []), list):
        errors.append('"model-index" must be a list')
    return errors, []
