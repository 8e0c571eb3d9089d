"""Which ranks own which blocks: pure arithmetic without weights and without processes."""

from __future__ import annotations

from sdp_llm.plan.analysis import PlanAnalysis, analyze
from sdp_llm.plan.assignment import Plan, make_plan, plan_from_config
from sdp_llm.plan.render import render_ownership

__all__ = ["Plan", "PlanAnalysis", "analyze", "make_plan", "plan_from_config", "render_ownership"]
