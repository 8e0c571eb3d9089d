"""Which ranks own which blocks: pure arithmetic without weights and without processes."""

from __future__ import annotations

from sdp_llm.plan.analysis import PlanAnalysis, analyze
from sdp_llm.plan.assignment import Plan, make_plan, plan_from_config
from sdp_llm.plan.render import render_ownership
from sdp_llm.plan.schedule import Phase, Schedule, schedule_from_config

__all__ = [
    "Phase",
    "Plan",
    "PlanAnalysis",
    "Schedule",
    "analyze",
    "make_plan",
    "plan_from_config",
    "render_ownership",
    "schedule_from_config",
]
