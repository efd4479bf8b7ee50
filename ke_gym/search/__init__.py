"""The search: store, tree, budget, session and the loop that runs it."""

from ke_gym.search.budget import Budget, Spent
from ke_gym.search.run import Transition, Watch, run
from ke_gym.search.session import Ask, Session, Situation
from ke_gym.search.store import Setting, Store
from ke_gym.search.tree import Node, Tree

__all__ = [
    "Ask",
    "Budget",
    "Node",
    "Session",
    "Setting",
    "Situation",
    "Spent",
    "Store",
    "Transition",
    "Tree",
    "Watch",
    "run",
]
