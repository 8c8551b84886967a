"""What docs/central.md says to type works."""

from __future__ import annotations

import re

import pytest
from sqlalchemy import Engine, text

from tests.central.collecting import ROOT

PAGE = (ROOT / "docs" / "central.md").read_text()


@pytest.mark.parametrize("block", re.findall(r"```sql\n(.*?)```", PAGE, re.DOTALL))
@pytest.mark.parametrize("database_url", ["postgresql"], indirect=True)
def test_the_questions_for_grafana_have_answers(engine: Engine, block: str) -> None:
    for statement in re.sub(r"\$__timeFilter\((\w+)\)", r"\1 IS NOT NULL", block).split(";"):
        if statement.strip():
            with engine.connect() as connection:
                assert connection.execute(text(statement)).all() == []


def test_every_table_stands_in_the_drawing() -> None:
    from agent.central.tables import metadata

    drawing = PAGE.split("## The schema")[1].split("### Questions")[0]
    assert [table for table in metadata.tables if table not in drawing] == []
