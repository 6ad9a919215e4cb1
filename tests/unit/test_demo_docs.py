"""The page's settings file as the documentation shows it."""

import re
from dataclasses import fields
from pathlib import Path

from sgm.serving.limits import Limits

DOCS = Path(__file__).parents[2] / "docs" / "demo.md"


def test_the_settings_file_of_the_docs_holds_every_default_and_its_help(tmp_path):
    # Catches: an entry that is added, renamed or given another default, and not in the docs.
    (shown,) = re.findall("```yaml\n(.*?)```", DOCS.read_text(encoding="utf-8"), re.DOTALL)
    file = tmp_path / "settings.yaml"
    file.write_text(shown)
    assert Limits.read(file) == Limits()
    lines = shown.splitlines()
    assert [line.partition(":")[0] for line in lines] == [each.name for each in fields(Limits)]
    for line, each in zip(lines, fields(Limits), strict=True):
        assert line.endswith(f"# {each.metadata['help']}")
