"""The README says what the code does."""

from __future__ import annotations

import json
import re
from fractions import Fraction

from sdp_llm.config import markdown_table, parse_config
from sdp_llm.plan import make_plan, render_ownership, schedule_from_config
from tests.conftest import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_table_of_keys_is_the_schemas() -> None:
    assert markdown_table().strip() in README


def test_picture_is_the_demos_plan() -> None:
    plan = make_plan(4, 8, coverage=Fraction(1, 2))
    assert render_ownership(plan) in README


def test_the_example_of_phases_is_a_config() -> None:
    [example] = re.findall(r'```json\n("sdp": \{.*?)```', README, re.DOTALL)
    sdp = parse_config(json.loads(f"{{{example}}}")).sdp
    schedule = schedule_from_config(sdp, 4, 8, 1000)
    assert [(str(phase), phase.stop) for phase in schedule.phases] == [
        ("coverage 1/4, forward masking", 300),
        ("coverage 1/2, forward masking, rotating every 500 steps", 800),
        ("coverage 1/2, backward masking", 1000),
    ]


def test_named_files_exist() -> None:
    names = set(re.findall(r"\b(?:launch|configs|data_prep|sdp_llm)/[\w/]+\.(?:py|json)", README))
    assert len(names) > 8
    missing = [name for name in names if not (ROOT / name).is_file()]
    assert not missing


def test_links_lead_somewhere() -> None:
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", README):
        assert (ROOT / target).exists(), target
