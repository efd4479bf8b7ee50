"""Kernels without an LLM: graph -> loop nests -> schedule -> kernel module text."""

from ke_gym.codegen import rewrites
from ke_gym.codegen.errors import CodegenError
from ke_gym.codegen.program import Program
from ke_gym.codegen.rewrites import knobs, with_knobs
from ke_gym.codegen.schedule import Group, Plan, Schedule

__all__ = ["CodegenError", "Group", "Plan", "Program", "Schedule", "knobs", "rewrites", "with_knobs"]
